"""From files to weights: what loads, what is read, and what is said where it does not load."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from indexproj.indexer.cli import app
from indexproj.kernels import DenseMatrix, Fp8Matrix
from indexproj.loading import Checkpoint, CheckpointError, Plan, load
from indexproj.loading.checkpoint import INDEX
from support import INDEXER, bf16_layer, fp8_layer, same, write_checkpoint

WK, SCALE, GATE = (INDEXER.format(0) + leaf for leaf in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight"))

BIAS, OTHER_SCALE, FUSED = (
    INDEXER.format(0) + leaf for leaf in ("wk.bias", "wk.weight_scale", "wk_weights_proj.weight")
)


def problems_of(path, layers=None):
    """What a load says; the audit says the same, as far as headers show it, and ends with 2."""
    with pytest.raises(CheckpointError) as caught:
        load(path, layers)
    problems = caught.value.problems
    result = CliRunner().invoke(app, ["audit", str(path)])
    expected = [problem for problem in problems if problem.found not in ("values beyond that", "no indexer in it")]
    assert result.exit_code == (2 if expected else 0), result.output
    assert isinstance(result.exception, SystemExit | None)
    assert all(str(problem) in result.stderr for problem in expected)
    return problems


def only(problems):
    (problem,) = problems
    return problem


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


def test_missing_scale(tmp_path):
    tensors = fp8_layer()
    del tensors[SCALE]
    problem = only(problems_of(write_checkpoint(tmp_path, tensors)))
    assert problem.subject == SCALE
    assert problem.expected == "F32 [1, 2] to go with the F8_E4M3 [128, 256] weight"


def test_scale_without_weight(tmp_path):
    tensors = fp8_layer()
    del tensors[WK]
    problem = only(problems_of(write_checkpoint(tmp_path, tensors)))
    assert (problem.subject, problem.found) == (WK, "only weight_scale_inv (F32 [1, 2])")


def test_scale_of_another_name(tmp_path):
    tensors = fp8_layer()
    tensors[OTHER_SCALE] = tensors.pop(SCALE)
    problem = only(problems_of(write_checkpoint(tmp_path, tensors)))
    assert (problem.subject, problem.found) == (SCALE, "no such tensor, but weight_scale (F32 [1, 2])")


def test_an_indexer_without_its_projection(tmp_path):
    tensors = fp8_layer(1)
    for leaf in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight"):
        del tensors[INDEXER.format(1) + leaf]
    problems = problems_of(write_checkpoint(tmp_path, fp8_layer(0), tensors))
    assert [problem.subject for problem in problems] == [
        INDEXER.format(1) + leaf for leaf in ("wk.weight", "weights_proj.weight")
    ]


def test_an_already_fused_checkpoint(tmp_path):
    problem = only(problems_of(write_checkpoint(tmp_path, {FUSED: torch.ones(144, 256).bfloat16()})))
    assert (problem.subject, problem.found) == (FUSED, "BF16 [144, 256]")


def test_one_shard_of_a_checkpoint(tmp_path):
    tensors = fp8_layer()
    path = write_checkpoint(tmp_path, {SCALE: tensors.pop(SCALE)}, tensors)
    problem = only(problems_of(path / "model-00002-of-00002.safetensors"))
    assert problem.subject == SCALE


def test_layers_are_numbers(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer())
    with pytest.raises(TypeError, match="layers must be integers, got '0'"):
        load(path, ["0"])


def test_missing_gate(tmp_path):
    tensors = fp8_layer()
    del tensors[GATE]
    assert only(problems_of(write_checkpoint(tmp_path, tensors))).subject == GATE


def test_missing_shard_names_every_tensor_in_it(tmp_path):
    tensors = fp8_layer()
    path = write_checkpoint(tmp_path, {WK: tensors[WK], SCALE: tensors.pop(SCALE)}, {GATE: tensors[GATE]})
    (path / "model-00001-of-00002.safetensors").unlink()
    problems = problems_of(path)
    assert {problem.subject for problem in problems} == {WK, SCALE}
    assert {(problem.file, problem.found) for problem in problems} == {
        ("model-00001-of-00002.safetensors", "no such file")
    }


def test_a_missing_shard_of_other_tensors_is_no_problem(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(), {"model.norm.weight": torch.ones(4)})
    (path / "model-00002-of-00002.safetensors").unlink()
    assert Checkpoint(path).unread == ["model-00002-of-00002.safetensors"]
    assert list(load(path)) == [0]


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_file(tmp_path, keep):
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1))
    shard = path / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, int(keep * size) if isinstance(keep, float) else keep % size)
    problems = problems_of(path)
    assert all(problem.file == shard.name for problem in problems)
    assert all("the file is truncated, corrupt" in problem.advice for problem in problems)
    assert list(load(path, [0])) == [0]
    assert {problem.subject for problem in problems} == {
        INDEXER.format(1) + leaf for leaf in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight")
    }


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_shard_that_is_no_file(tmp_path, make):
    path = write_checkpoint(tmp_path, fp8_layer())
    (path / "model-00001-of-00001.safetensors").unlink()
    make(path / "model-00001-of-00001.safetensors")
    assert {problem.found for problem in problems_of(path)} == {"an unreadable file (not a file)"}


def test_a_single_file_that_is_damaged(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert only(problems_of(tmp_path)).subject == "model.safetensors"


def test_index_names_an_absent_tensor(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer())
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][INDEXER.format(1) + "wk.weight"] = "model-00001-of-00001.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    problems = problems_of(path)
    assert problems[0].found == "no such tensor"
    assert {problem.subject for problem in problems} == {
        INDEXER.format(1) + "wk.weight",
        INDEXER.format(1) + "weights_proj.weight",
    }


def test_a_tensor_in_two_shards(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(), {GATE: fp8_layer()[GATE]})
    problem = only(problems_of(path))
    assert problem.found == "a second copy"
    assert (problem.subject, problem.file) == (GATE, "model-00002-of-00002.safetensors")


def codes(odd_one):
    """e4m3fn codes, all of them 0 but one."""
    values = torch.zeros(128, 256, dtype=torch.uint8)
    values[100, 200] = odd_one
    return values.view(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "subject", "found"),
    [
        ({SCALE: torch.ones(1, 3)}, SCALE, "F32 [1, 3]"),
        ({SCALE: torch.ones(2, 1)}, SCALE, "F32 [2, 1]"),
        ({SCALE: torch.ones(())}, SCALE, "F32 []"),
        ({SCALE: torch.ones(1, 2).bfloat16()}, SCALE, "BF16 [1, 2]"),
        ({WK: torch.zeros(128, 256, dtype=torch.float8_e5m2)}, WK, "F8_E5M2 [128, 256]"),
        ({WK: torch.zeros(128, 256, dtype=torch.float8_e4m3fnuz)}, WK, "F8_E4M3FNUZ [128, 256]"),
        ({WK: torch.zeros(128 * 256, dtype=torch.float8_e4m3fn)}, WK, "F8_E4M3 [32768]"),
        ({WK: torch.zeros(0, 256, dtype=torch.float8_e4m3fn)}, WK, "F8_E4M3 [0, 256]"),
        ({WK: torch.zeros(128, 256, dtype=torch.bool)}, WK, "BOOL [128, 256]"),
        ({WK: torch.zeros(128, 256, dtype=torch.uint16)}, WK, "U16 [128, 256]"),
        ({WK: torch.zeros(128, 256, dtype=torch.bfloat16)}, SCALE, "F32 [1, 2]"),
        ({GATE: torch.zeros(16, 128, dtype=torch.bfloat16)}, GATE, "BF16 [16, 128]"),
        ({GATE: torch.zeros(16, 256, dtype=torch.int32)}, GATE, "I32 [16, 256]"),
        ({GATE: torch.zeros(16, 256, dtype=torch.complex64)}, GATE, "C64 [16, 256]"),
        ({BIAS: torch.zeros(128)}, BIAS, "F32 [128]"),
        ({OTHER_SCALE: torch.ones(1)}, OTHER_SCALE, "F32 [1]"),
        ({FUSED: torch.ones(144, 256)}, FUSED, "F32 [144, 256]"),
        ({SCALE: torch.tensor([[1.0, torch.nan]])}, SCALE, "values beyond that"),
        ({SCALE: torch.tensor([[1.0, torch.inf]])}, SCALE, "values beyond that"),
        ({SCALE: torch.tensor([[1.0, 1e38]])}, SCALE, "values beyond that"),
        ({SCALE: torch.tensor([[1.0, 1e-40]])}, SCALE, "values beyond that"),
        ({WK: codes(0x7F)}, WK, "values beyond that"),
        ({WK: codes(0xFF)}, WK, "values beyond that"),
        ({GATE: torch.full((16, 256), torch.inf).bfloat16()}, GATE, "values beyond that"),
        ({GATE: torch.full((16, 256), 3e38).bfloat16()}, GATE, "values beyond that"),
        ({GATE: torch.zeros(300, 256).bfloat16()}, GATE, "BF16 [300, 256]"),
    ],
)  # fmt: skip
def test_what_fits_no_encoding(tmp_path, change, subject, found):
    path = write_checkpoint(tmp_path, {**fp8_layer(), **change})
    problem = only(problems_of(path))
    assert (problem.subject, problem.found, problem.file) == (subject, found, "model-00001-of-00001.safetensors")


def test_tiny_values_are_values(tmp_path):
    tensors = {**bf16_layer(), GATE: torch.full((16, 256), 1e-39).bfloat16()}
    assert same(load(write_checkpoint(tmp_path, tensors))[0].gate, DenseMatrix(tensors[GATE]))


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


def test_problems_of_one_matrix_come_together(tmp_path):
    tensors = {
        **fp8_layer(),
        WK: torch.zeros(128, 256, dtype=torch.float8_e5m2),
        BIAS: torch.zeros(128),
        GATE: torch.zeros(16, 200, dtype=torch.int8),
    }
    path = write_checkpoint(tmp_path, tensors, config={"index_head_dim": 64})
    assert [problem.subject for problem in problems_of(path)] == [WK, BIAS, GATE, GATE, WK]
    (path / "config.json").write_text("{")
    assert [problem.subject for problem in problems_of(path)] == ["config.json", WK, BIAS, GATE, GATE]


@pytest.mark.parametrize(
    ("key", "value", "tensor"), [("index_head_dim", 64, WK), ("hidden_size", 512, WK), ("index_n_heads", 32, GATE)]
)
def test_a_config_that_contradicts_the_tensors(tmp_path, key, value, tensor):
    path = write_checkpoint(tmp_path, fp8_layer(), config={"num_hidden_layers": 1, key: value})
    problem = only(problems_of(path))
    assert problem.subject == tensor
    assert f"config.json: {key}" in problem.expected


def test_a_layer_that_differs_from_the_others(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1), fp8_layer(2, k=384))
    problem = only(problems_of(path))
    assert (problem.subject, problem.found) == (INDEXER.format(2) + "wk.weight", "(128, 16, 384)")
    assert list(load(path, [0, 1])) == [0, 1]


def test_a_file_that_changes_between_header_and_data(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer())
    checkpoint = Checkpoint(path)
    save_file({"other": torch.ones(1)}, path / "model-00001-of-00001.safetensors")
    with pytest.raises(CheckpointError, match="the file whose header was read"):
        list(checkpoint.stream([WK]))


def test_a_config_may_hold_anything_else(tmp_path):
    config = {"num_hidden_layers": "many", "index_head_dim": None, "hidden_size": True, "text_config": 3}
    assert list(load(write_checkpoint(tmp_path, fp8_layer(), config=config))) == [0]


def test_mtp_layers_lie_beyond_the_hidden_layers(tmp_path):
    config = {"text_config": {"num_hidden_layers": 2}}
    path = write_checkpoint(tmp_path, fp8_layer(1), fp8_layer(2), config=config)
    assert [plan.is_mtp for plan in Plan.of(Checkpoint(path)).layers.values()] == [False, True]


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (INDEX, "{", "readable JSON"),
        (INDEX, "[]", "a JSON object"),
        (INDEX, "{}", 'a "weight_map" from tensor names to files'),
        (INDEX, '{"weight_map": {"a": "../b.safetensors"}}', "the name of a file beside the index"),
        (INDEX, '{"weight_map": {"a": 3}}', "the name of a file beside the index"),
        (INDEX, '{"weight_map": {"a": ""}}', "the name of a file beside the index"),
        (INDEX, '{"weight_map": {"a": ".."}}', "the name of a file beside the index"),
        (INDEX, '{"weight_map": {"a": "\\ud800"}}', "the name of a file beside the index"),
        (INDEX, '{"weight_map": {}}', 'a "weight_map" from tensor names to files'),
        (INDEX, '{"weight_map": {"a": "b", "a": "c"}}', "readable JSON"),
        (INDEX, "[" * 100_000, "readable JSON"),
        ("config.json", "nothing", "readable JSON"),
    ],
)
def test_unreadable_json(tmp_path, file, text, expected):
    path = write_checkpoint(tmp_path, fp8_layer())
    (path / file).write_text(text)
    assert only(problems_of(path)).expected == expected


def test_no_checkpoint_at_all(tmp_path):
    assert only(problems_of(tmp_path)).found == "a directory with neither"
    assert only(problems_of(tmp_path / "nowhere")).found == "no such file or directory"
    (tmp_path / "config.json").write_text("{}")
    assert only(problems_of(tmp_path / "config.json")).found == "another kind of file"
    assert only(problems_of(tmp_path / ("long" * 100))).expected == "the path of a checkpoint"


def test_the_index_stands_for_its_directory(tmp_path):
    assert list(load(write_checkpoint(tmp_path, fp8_layer()) / INDEX)) == [0]


def test_a_damaged_shard_of_other_tensors_is_no_problem(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(), {"model.norm.weight": torch.ones(4)})
    (path / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert Checkpoint(path).unread == ["model-00002-of-00002.safetensors"]
    assert list(load(path)) == [0]


def test_a_layer_under_two_spellings(tmp_path):
    other = {name.replace("layers.0.", "layers.00."): tensor for name, tensor in fp8_layer().items()}
    problems = problems_of(write_checkpoint(tmp_path, {**fp8_layer(), **other}))
    assert len(problems) == 3
    assert all("layers.0" in problem.expected for problem in problems)


def test_a_model_without_indexer(tmp_path):
    problem = only(problems_of(write_checkpoint(tmp_path, {"model.norm.weight": torch.ones(4)})))
    assert problem.found == "none of 1 tensors"


def test_two_prefixes_for_one_layer(tmp_path):
    other = {f"language_model.{name}": tensor for name, tensor in fp8_layer().items()}
    problems = problems_of(write_checkpoint(tmp_path, fp8_layer(), other))
    assert all(problem.expected.startswith("all of layer 0 under ") for problem in problems)
    assert len(problems) == 3
