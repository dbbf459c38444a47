"""Files that are missing, damaged, no files, or that say different things."""

import json
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from indexproj.indexer.cli.audit import audit
from indexproj.kernels import DenseMatrix, Fp8Matrix
from indexproj.loading import Checkpoint, CheckpointError, load
from indexproj.loading.checkpoint import INDEX
from support import GATE, INDEXER, SCALE, WK, fp8_layer, invoke, only, problems_of, same, write_checkpoint

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
ONE_OF_ONE = "model-00001-of-00001.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1"
LEAVES = "wk.weight", "wk.weight_scale_inv", "weights_proj.weight"


def test_missing_shard(tmp_path):
    tensors = fp8_layer()
    path = write_checkpoint(tmp_path, {WK: tensors[WK], SCALE: tensors.pop(SCALE)}, {GATE: tensors[GATE]})
    (path / FIRST).unlink()
    problems = problems_of(path)
    assert {problem.subject for problem in problems} == {WK, SCALE}
    assert {(problem.file, problem.found, problem.advice) for problem in problems} == {
        (FIRST, "no such file", "fetch the rest of the checkpoint")
    }


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text(POINTER)])
def test_shard_of_other_tensors(tmp_path, damage):
    path = write_checkpoint(tmp_path, fp8_layer(), {"model.norm.weight": torch.ones(4)})
    damage(path / SECOND)
    assert Checkpoint(path).unread == [SECOND]
    assert list(load(path)) == [0]


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_file(tmp_path, keep):
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1))
    size = (path / SECOND).stat().st_size
    os.truncate(path / SECOND, int(keep * size) if isinstance(keep, float) else keep % size)
    problems = problems_of(path)
    assert all(problem.file == SECOND for problem in problems)
    assert all("the file is truncated, corrupt" in problem.advice for problem in problems)
    assert list(load(path, [0])) == [0]
    assert {problem.subject for problem in problems} == {INDEXER.format(1) + leaf for leaf in LEAVES}


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: path.symlink_to("gone"), "o such file"), (lambda path: path.symlink_to(path.name), ""),
        (os.mkfifo, "not a file"), (os.mkdir, "not a file"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("file", [INDEX, "config.json", ONE_OF_ONE, "model.safetensors"])
def test_file_that_is_no_file(tmp_path, file, make, found):
    """A pipe does not block, and a dangling link is not an absent file."""
    path = write_checkpoint(tmp_path, fp8_layer(), config={})
    if file == "model.safetensors":
        (path / INDEX).unlink()
    (path / file).unlink(missing_ok=True)
    make(path / file)
    problems = problems_of(path)
    assert all(found in problem.found for problem in problems)
    if file != ONE_OF_ONE:
        expected = "readable JSON" if file.endswith(".json") else "a readable safetensors file"
        assert (only(problems).subject, problems[0].expected) == (file, expected)


@pytest.mark.parametrize(
    ("directory", "content", "advice"),
    [
        ("a", POINTER.encode(), "the file is truncated, corrupt or a Git LFS pointer: fetch it again"),
        ("a", save(fp8_layer()).replace(b'"BF16"', b'"QF16"'), "the installed safetensors does not know that dtype: "),
        (os.fsdecode(b"caf\xe9"), save(fp8_layer()), "safetensors opens UTF-8 paths only: rename the file or its "),
    ],
)
def test_single_file_that_safetensors_does_not_read(tmp_path, directory, content, advice):
    (tmp_path / directory).mkdir()
    (tmp_path / directory / "model.safetensors").write_bytes(content)
    problem = only(problems_of(tmp_path / directory))
    assert problem.subject == "model.safetensors"
    assert problem.advice.startswith(advice)


def test_index_names_absent_tensor(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer())
    index = json.loads((path / INDEX).read_text())
    index["weight_map"][INDEXER.format(1) + "wk.weight"] = ONE_OF_ONE
    (path / INDEX).write_text(json.dumps(index))
    problems = problems_of(path)
    assert problems[0].found == "no such tensor"
    assert problems[0].advice == "index and file are of different exports: fetch both again"
    assert [problem.subject for problem in problems] == [INDEXER.format(1) + leaf for leaf in LEAVES[::2]]


def test_tensor_in_two_shards(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(), {GATE: fp8_layer()[GATE]})
    problem = only(problems_of(path))
    assert (problem.subject, problem.file, problem.found) == (GATE, SECOND, "a second copy")


def test_file_replaced_between_header_and_data(tmp_path):
    """The data match the header that was read."""
    tensors = fp8_layer()
    path = write_checkpoint(tmp_path, tensors)
    checkpoint = Checkpoint(path)
    save_file({WK: torch.ones(1)}, tmp_path / "new")
    (tmp_path / "new").replace(path / ONE_OF_ONE)
    assert torch.equal(checkpoint.read(WK).view(torch.uint8), tensors[WK].view(torch.uint8))


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        (INDEX, "{", "readable JSON"),
        (INDEX, "[" * 100_000, "readable JSON"),
        (INDEX, "[]", "a JSON object"),
        (INDEX, "{}", 'a "weight_map" from tensor names to files'),
        (INDEX, '{"weight_map": {}}', 'a "weight_map" from tensor names to files'),
        (INDEX, '{"weight_map": ["a"]}', 'a "weight_map" from tensor names to files'),
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
    (tmp_path / "config.json").write_text("{}")
    for path, found in (
        (tmp_path, "no .safetensors file in it"), (tmp_path / "nowhere", "no such file or directory"),
        (tmp_path / "config.json", "another file"),
    ):  # fmt: skip
        assert only(problems_of(path)).found == found
    assert only(problems_of(tmp_path / ("long" * 100))).expected == "the path of a checkpoint"
    save_file(fp8_layer(), tmp_path / FIRST)
    problem = only(problems_of(tmp_path))
    assert (problem.found, problem.advice) == ("other .safetensors files", "fetch the index, or give one file")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_header_loads_right_or_not_at_all(tmp_path, data):
    """One byte of the header is another one, or the file is cut."""
    torch.manual_seed(0)
    tensors = {**fp8_layer(0), **fp8_layer(1)}
    intact = save(tensors)
    header = 8 + int.from_bytes(intact[:8], "little")
    position, byte = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
    damaged = intact[:position] + bytes([byte]) + intact[position + 1 :]
    end = data.draw(st.sampled_from([len(intact), len(intact), position]))
    (tmp_path / "model.safetensors").write_bytes(damaged[:end])
    try:
        weights = load(tmp_path)
    except CheckpointError:
        return
    for layer in (0, 1):
        codes, scale, gate = (tensors[INDEXER.format(layer) + leaf] for leaf in LEAVES)
        assert same(weights[layer].wk, Fp8Matrix(codes, scale))
        assert same(weights[layer].gate, DenseMatrix(gate))


def test_many_made_up_layers(tmp_path):
    """A header of 10,000 layers is audited in seconds: nothing is quadratic."""
    entry = {"dtype": "BF16", "shape": [0, 4], "data_offsets": [0, 0]}
    header = {f"{INDEXER.format(n)}{matrix}.weight": entry for n in range(10_000) for matrix in ("wk", "weights_proj")}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    start = time.process_time()
    result = invoke("audit", tmp_path)
    assert time.process_time() - start < 10
    assert len(result.output.splitlines()) < 10
    assert "layers.{0-9999}.self_attn.indexer.wk.weight" in result.stderr
    assert len(audit(tmp_path)["problems"]) == 20_000
