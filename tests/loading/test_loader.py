"""From files to weights: what loads, and what is read."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from indexproj.kernels import DenseMatrix, Fp8Matrix
from indexproj.loading import Checkpoint, CheckpointError, load
from indexproj.loading.checkpoint import INDEX
from indexproj.loading.names import parse
from support import GATE, INDEXER, SCALE, WK, bf16_layer, fp8_layer, only, problems_of, same, write_checkpoint


def test_load_fp8_keeps_bits(tmp_path):
    tensors = fp8_layer()
    weights = load(write_checkpoint(tmp_path, tensors))[0]
    assert same(weights.wk, Fp8Matrix(tensors[WK], tensors[SCALE]))
    assert same(weights.gate, DenseMatrix(tensors[GATE]))


def test_load_bf16_in_one_buffer(tmp_path):
    tensors = {**bf16_layer(), GATE: torch.full((16, 256), 1e-9).bfloat16()}
    weights = load(write_checkpoint(tmp_path, tensors))[0]
    assert torch.equal(weights.fused_weight, torch.cat((tensors[WK], tensors[GATE])))


@pytest.mark.parametrize("name", ["model.safetensors", "anything.safetensors"])
def test_load_single_file(tmp_path, name):
    tensors = fp8_layer()
    save_file(tensors, tmp_path / name)
    path = tmp_path if name == "model.safetensors" else tmp_path / name
    assert same(load(path)[0].gate, DenseMatrix(tensors[GATE]))


def test_load_matrix_over_several_shards(tmp_path):
    tensors = fp8_layer()
    shards = [{name: tensors[name]} for name in reversed(tensors)]
    assert same(load(write_checkpoint(tmp_path, *shards))[0].wk, Fp8Matrix(tensors[WK], tensors[SCALE]))


def test_load_some_layers(tmp_path):
    layers = {number: fp8_layer(number) for number in (0, 2, 11)}
    path = write_checkpoint(tmp_path, *layers.values())
    assert list(load(path)) == [0, 2, 11]
    assert load(path, []) == {}
    picked = load(path, [11])
    assert list(picked) == [11]
    assert same(picked[11].gate, DenseMatrix(layers[11][INDEXER.format(11) + "weights_proj.weight"]))
    problem = only(problems_of(path, [1, 2]))
    assert str(problem) == "layer 1: expected one of the layers with an indexer, 0, 2, 11, found no indexer in it"


def test_load_beside_a_bad_layer(tmp_path):
    bad = fp8_layer(1)
    del bad[INDEXER.format(1) + "wk.weight_scale_inv"]
    path = write_checkpoint(tmp_path, fp8_layer(0), bad)
    assert list(load(path, [0])) == [0]
    assert only(problems_of(path)).subject == INDEXER.format(1) + "wk.weight_scale_inv"


def test_load_reads_only_its_bytes(tmp_path):
    """Counted by the kernel: pages of the mapped file that the process has touched."""
    big = {f"model.layers.0.mlp.experts.{n}.w.weight": torch.zeros(64 << 20, dtype=torch.uint8) for n in range(3)}
    tensors = fp8_layer(k=7168, h=64)
    path = write_checkpoint(tmp_path, {**big, **tensors})
    needed = sum(tensors[name].nbytes for name in (WK, SCALE, GATE))
    checkpoint = Checkpoint(path)
    assert list(load(checkpoint)) == [0]
    maps = Path("/proc/self/smaps").read_text()
    touched = sum(map(int, re.findall(rf"{re.escape(str(path))}.*\n(?:.*\n)*?Rss: +(\d+) kB", maps))) << 10
    # A page fault maps up to 64 KiB around it; the header and three tensors cause a handful of partial ones.
    assert needed < touched < needed + (1 << 20)


def test_load_allocates_only_weights(tmp_path, poison):
    """Also for layers that share: every byte that a load returns is one of the checkpoint."""
    layers = {layer: fp8_layer(layer) for layer in (0, 1, 5)}
    loaded = load(write_checkpoint(tmp_path, *layers.values(), config={"num_hidden_layers": 6, "index_topk_freq": 4}))
    needed = sum(layer[name].nbytes for layer in layers.values() for name in layer if parse(name).matrix)
    assert sum(weights.nbytes for weights in loaded.values()) == needed
    assert all(matrix.dequantize().isfinite().all() for pair in loaded.values() for matrix in (pair.wk, pair.gate))


def test_names_without_an_indexer(tmp_path):
    tensors = {name.replace("self_attn", "mlp"): tensor for name, tensor in fp8_layer().items()}
    assert only(problems_of(write_checkpoint(tmp_path, tensors))).found == "none of 5 tensors"


def test_input_scale_is_not_read(tmp_path):
    """They may be of a dtype that torch does not have, and that safetensors therefore cannot read."""
    name = f"{INDEXER.format(0)}wk.input_scale"
    intact = save({**fp8_layer(), name: torch.zeros(3, dtype=torch.uint8)})
    end = 8 + int.from_bytes(intact[:8], "little")
    header = json.loads(intact[8:end])
    header[name] |= {"dtype": "F6_E2M3", "shape": [4]}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + intact[end:])
    assert list(load(tmp_path)) == [0]


def test_layers_must_be_integers(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer())
    with pytest.raises(TypeError, match="'str' object cannot be interpreted as an integer"):
        load(path, ["0"])
    assert list(load(path, np.array([0]))) == [0]


def test_all_problems_at_once(tmp_path):
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


def test_load_by_index_file(tmp_path):
    """Also in a directory named like a file."""
    path = write_checkpoint(tmp_path / "glm.safetensors", fp8_layer())
    assert list(load(path)) == list(load(path / INDEX)) == [0]


def test_load_one_shard_of_several(tmp_path):
    tensors = fp8_layer()
    path = write_checkpoint(tmp_path, {SCALE: tensors.pop(SCALE)}, tensors)
    problem = only(problems_of(path / "model-00002-of-00002.safetensors"))
    assert problem.subject == SCALE
