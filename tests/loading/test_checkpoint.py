"""Files that are missing, damaged or say different things."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from indexproj.kernels import DenseMatrix, Fp8Matrix
from indexproj.loading import Checkpoint, CheckpointError, load
from indexproj.loading.checkpoint import INDEX
from support import GATE, INDEXER, SCALE, WK, fp8_layer, only, problems_of, same, write_checkpoint


def test_missing_shard(tmp_path):
    tensors = fp8_layer()
    path = write_checkpoint(tmp_path, {WK: tensors[WK], SCALE: tensors.pop(SCALE)}, {GATE: tensors[GATE]})
    (path / "model-00001-of-00002.safetensors").unlink()
    problems = problems_of(path)
    assert {problem.subject for problem in problems} == {WK, SCALE}
    assert {(problem.file, problem.found, problem.advice) for problem in problems} == {
        ("model-00001-of-00002.safetensors", "no such file", "fetch the rest of the checkpoint")
    }


def test_missing_shard_of_other_tensors(tmp_path):
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
def test_shard_that_is_not_a_file(tmp_path, make):
    path = write_checkpoint(tmp_path, fp8_layer())
    (path / "model-00001-of-00001.safetensors").unlink()
    make(path / "model-00001-of-00001.safetensors")
    assert {problem.found for problem in problems_of(path)} == {"an unreadable file (not a file)"}


@pytest.mark.parametrize("file", [INDEX, "config.json"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("gone")])
def test_index_or_config_that_is_not_a_file(tmp_path, file, make):
    """A pipe does not block, and a dangling link is not an absent file."""
    path = write_checkpoint(tmp_path, fp8_layer(), config={})
    (path / file).unlink()
    make(path / file)
    problem = only(problems_of(path))
    assert (problem.subject, problem.expected) == (file, "readable JSON")


def test_damaged_single_file(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert only(problems_of(tmp_path)).subject == "model.safetensors"


def test_index_names_absent_tensor(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer())
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][INDEXER.format(1) + "wk.weight"] = "model-00001-of-00001.safetensors"
    (path / INDEX).write_text(json.dumps(index))
    problems = problems_of(path)
    assert problems[0].found == "no such tensor"
    assert problems[0].advice == "index and file are of different exports: fetch both again"
    assert [problem.subject for problem in problems] == [
        INDEXER.format(1) + leaf for leaf in ("wk.weight", "weights_proj.weight")
    ]


def test_tensor_in_two_shards(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(), {GATE: fp8_layer()[GATE]})
    problem = only(problems_of(path))
    assert problem.found == "a second copy"
    assert (problem.subject, problem.file) == (GATE, "model-00002-of-00002.safetensors")


def test_file_replaced_between_header_and_data(tmp_path):
    """The data match the header that was read."""
    tensors = fp8_layer()
    path = write_checkpoint(tmp_path, tensors)
    checkpoint = Checkpoint(path)
    save_file({WK: torch.ones(1)}, tmp_path / "new")
    (tmp_path / "new").replace(path / "model-00001-of-00001.safetensors")
    assert torch.equal(checkpoint.read(WK).view(torch.uint8), tensors[WK].view(torch.uint8))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (INDEX, "{", "readable JSON"),
        (INDEX, "[" * 100_000, "readable JSON"),
        (INDEX, "[]", "a JSON object"),
        *(
            (INDEX, text, 'a "weight_map" from tensor names to files')
            for text in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": "b", "a": "c"}}')
        ),
        *(
            (INDEX, f'{{"weight_map": {{"a": {file}}}}}', "the name of a file beside the index")
            for file in ('"../b.safetensors"', "3", '""', '"."', '".."', '"\\ud800"')
        ),
        ("config.json", "nothing", "readable JSON"),
    ],
)
def test_unreadable_json(tmp_path, file, text, expected):
    path = write_checkpoint(tmp_path, fp8_layer())
    (path / file).write_text(text)
    assert only(problems_of(path)).expected == expected


def test_no_checkpoint(tmp_path):
    assert only(problems_of(tmp_path)).found == "no .safetensors file in it"
    assert only(problems_of(tmp_path / "nowhere")).found == "no such file or directory"
    (tmp_path / "config.json").write_text("{}")
    assert only(problems_of(tmp_path / "config.json")).found == "another file"
    assert only(problems_of(tmp_path / ("long" * 100))).expected == "the path of a checkpoint"


def test_damaged_shard_of_other_tensors(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(), {"model.norm.weight": torch.ones(4)})
    (path / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    assert Checkpoint(path).unread == ["model-00002-of-00002.safetensors"]
    assert list(load(path)) == [0]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_header_loads_right_or_not_at_all(tmp_path, data):
    """One byte of the header is another one, or the file is cut."""
    torch.manual_seed(0)
    tensors = {**fp8_layer(0), **fp8_layer(1)}
    file = tmp_path / "model.safetensors"
    intact = save(tensors)
    header = 8 + int.from_bytes(intact[:8], "little")
    position, byte = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
    damaged = bytearray(intact)
    damaged[position] = byte
    file.write_bytes(damaged[: data.draw(st.sampled_from([len(intact), len(intact), position]))])
    try:
        weights = load(tmp_path)
    except CheckpointError:
        return
    for layer in (0, 1):
        stem = INDEXER.format(layer)
        assert same(weights[layer].wk, Fp8Matrix(tensors[f"{stem}wk.weight"], tensors[f"{stem}wk.weight_scale_inv"]))
        assert same(weights[layer].gate, DenseMatrix(tensors[f"{stem}weights_proj.weight"]))
