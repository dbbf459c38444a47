"""From files to weights: what loads, and what is read."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save, save_file

from indexproj.kernels import DenseMatrix, Fp8Matrix
from indexproj.loading import Checkpoint, CheckpointError, load
from indexproj.loading.checkpoint import INDEX
from support import GATE, INDEXER, SCALE, WK, bf16_layer, fp8_layer, only, problems_of, same, write_checkpoint


def test_fp8_comes_in_as_it_is(tmp_path):
    tensors = fp8_layer(3)
    weights = load(write_checkpoint(tmp_path, tensors))[3]
    stem = INDEXER.format(3)
    assert same(weights.wk, Fp8Matrix(tensors[f"{stem}wk.weight"], tensors[f"{stem}wk.weight_scale_inv"]))
    assert same(weights.gate, DenseMatrix(tensors[f"{stem}weights_proj.weight"]))


def test_bf16_comes_in_as_one_buffer(tmp_path):
    tensors = bf16_layer()
    weights = load(write_checkpoint(tmp_path, tensors))[0]
    assert torch.equal(weights.fused_weight, torch.cat((tensors[WK], tensors[GATE])))


@pytest.mark.parametrize("name", ["model.safetensors", "anything.safetensors"])
def test_a_single_file(tmp_path, name):
    tensors = fp8_layer()
    save_file(tensors, tmp_path / name)
    path = tmp_path if name == "model.safetensors" else tmp_path / name
    assert same(load(path)[0].gate, DenseMatrix(tensors[GATE]))


def test_a_matrix_may_be_spread_over_shards(tmp_path):
    tensors = fp8_layer()
    names = list(tensors)
    shards = [{name: tensors[name]} for name in reversed(names)]
    assert same(load(write_checkpoint(tmp_path, *shards))[0].wk, Fp8Matrix(tensors[WK], tensors[SCALE]))


def test_layers_are_told_apart_and_can_be_picked(tmp_path):
    layers = {number: fp8_layer(number) for number in (0, 2, 11)}
    path = write_checkpoint(tmp_path, *layers.values())
    assert list(load(path)) == [0, 2, 11]
    assert load(path, []) == {}
    picked = load(path, [11])
    assert list(picked) == [11]
    assert same(picked[11].gate, DenseMatrix(layers[11][INDEXER.format(11) + "weights_proj.weight"]))
    problem = only(problems_of(path, [1, 2]))
    assert str(problem) == "layer 1: expected one of the layers with an indexer, 0, 2, 11, found no indexer in it"


def test_one_bad_layer_does_not_keep_another_from_loading(tmp_path):
    bad = fp8_layer(1)
    del bad[INDEXER.format(1) + "wk.weight_scale_inv"]
    path = write_checkpoint(tmp_path, fp8_layer(0), bad)
    assert list(load(path, [0])) == [0]
    assert only(problems_of(path)).subject == INDEXER.format(1) + "wk.weight_scale_inv"


def test_only_the_needed_bytes_are_read(tmp_path):
    """Counted by the kernel: pages of the mapped file that the process has touched."""
    big = {f"model.layers.0.mlp.experts.{n}.w.weight": torch.zeros(64 << 20, dtype=torch.uint8) for n in range(3)}
    stem = INDEXER.format(0)
    tensors = fp8_layer(k=7168, h=64)
    path = write_checkpoint(tmp_path, {**big, **tensors})
    needed = sum(
        tensors[f"{stem}{leaf}"].nbytes for leaf in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight")
    )
    script = f"""
import re
from indexproj.loading import Assembly, Checkpoint, Plan
checkpoint = Checkpoint({str(path)!r})
plan = Plan.of(checkpoint).select()[0]
touched, read = 0, 0
assembly = Assembly([0])
assembly.begin()
for name, tensor in checkpoint.stream(plan.tensors):
    assembly.offer(name, tensor)
    read += tensor.nbytes
    with open("/proc/self/smaps") as maps:
        regions = re.findall(r"\\.safetensors\\n(?:.*\\n)*?Rss: +(\\d+) kB", maps.read())
    touched = max(touched, 1024 * sum(map(int, regions)))
print(list(assembly.finish()), read, touched)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    layers, read, touched = result.stdout.rsplit(maxsplit=2)
    assert layers == "[0]"
    assert int(read) == needed
    # A page fault maps up to 64 KiB around it; the header and three tensors cause a handful of partial ones.
    assert needed < int(touched) < needed + (1 << 20)


def test_scales_of_activations_are_not_read(tmp_path):
    """They may be of a dtype that torch does not have, and that safetensors therefore cannot read."""
    name = f"{INDEXER.format(0)}wk.input_scale"
    intact = save({**fp8_layer(), name: torch.zeros(3, dtype=torch.uint8)})
    end = 8 + int.from_bytes(intact[:8], "little")
    header = json.loads(intact[8:end])
    header[name] |= {"dtype": "F6_E2M3", "shape": [4]}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + intact[end:])
    assert list(load(tmp_path)) == [0]


def test_layers_are_numbers(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer())
    with pytest.raises(TypeError, match="layers must be integers, got '0'"):
        load(path, ["0"])


def test_all_problems_come_at_once(tmp_path):
    first, second, third = fp8_layer(0), fp8_layer(1), fp8_layer(2)
    del first[SCALE]
    second[INDEXER.format(1) + "wk.bias"] = torch.zeros(128)
    path = write_checkpoint(tmp_path, first, second, third)
    os.truncate(path / "model-00003-of-00003.safetensors", 50)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    subjects = [problem.subject for problem in caught.value.problems]
    assert len(subjects) == 5
    assert all(subject in str(caught.value) for subject in subjects)


def test_tiny_values_are_values(tmp_path):
    tensors = {**bf16_layer(), GATE: torch.full((16, 256), 1e-39).bfloat16()}
    assert same(load(write_checkpoint(tmp_path, tensors))[0].gate, DenseMatrix(tensors[GATE]))


def test_the_index_stands_for_its_directory(tmp_path):
    assert list(load(write_checkpoint(tmp_path, fp8_layer()) / INDEX)) == [0]


def test_a_directory_may_be_called_like_a_file(tmp_path):
    assert list(load(write_checkpoint(tmp_path / "glm.safetensors", fp8_layer()))) == [0]


def test_tensors_are_read_shard_by_shard(tmp_path):
    checkpoint = Checkpoint(write_checkpoint(tmp_path, fp8_layer(2), fp8_layer(1), fp8_layer(0)))
    names = sorted(checkpoint.headers, key=lambda name: name[::-1])
    files = [checkpoint.headers[name].file for name, _ in checkpoint.stream(names)]
    assert files == sorted(files)
    assert len(files) == 9


def test_one_shard_of_a_checkpoint(tmp_path):
    tensors = fp8_layer()
    path = write_checkpoint(tmp_path, {SCALE: tensors.pop(SCALE)}, tensors)
    problem = only(problems_of(path / "model-00002-of-00002.safetensors"))
    assert problem.subject == SCALE
