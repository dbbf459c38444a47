"""Files that are missing, damaged, no files, or that say different things."""

import json
import os
import time

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from exports import renamed
from indexproj.kernels import Format, Matrix
from indexproj.loading import Checkpoint, CheckpointError, load
from indexproj.loading.checkpoint import INDEX
from support import GATE, INDEXER, WK, fp8_layer, invoke, only, problems_of, same, write_checkpoint

SECOND, THIRD = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"
ONE_OF_ONE = "model-00001-of-00001.safetensors"
LEAVES = "wk.weight", "wk.weight_scale_inv", "weights_proj.weight"


def put(make):
    return lambda path: (path.unlink(), make(path))


def cut(size):
    """Cuts a file at a number of bytes, or at a part of its size."""
    return lambda path: os.truncate(path, size if isinstance(size, int) else int(path.stat().st_size * size))


NO_FILES = {
    "dangling link": (put(lambda path: path.symlink_to("gone")), "a link that leads nowhere"),
    "link to itself": (put(lambda path: path.symlink_to(path.name)), "a link that leads nowhere"),
    "pipe": (put(os.mkfifo), "not a file"),  # it would block
    "directory": (put(os.mkdir), "not a file"),
}
AGAIN = "the file is truncated, corrupt or a Git LFS pointer: fetch it again"
DAMAGE = {
    **{name: (make, f"an unreadable file ({found})", "") for name, (make, found) in NO_FILES.items()},
    "missing": (os.unlink, "no such file", "fetch the rest of the checkpoint"),
    "Git LFS pointer": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "an unread", AGAIN),
    **{f"cut at {size}": (cut(size), "an unreadable file (", AGAIN) for size in (0, 4, 100, 0.5, 0.9999)},
    "unknown dtype": (
        lambda path: path.write_bytes(path.read_bytes().replace(b'"BF16"', b'"QF16"')), "an unreadable file (",
        "the installed safetensors does not know that dtype: install a newer one",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "found", "advice"), DAMAGE.values(), ids=DAMAGE)
def test_damaged_file(tmp_path, damage, found, advice):
    """A shard without the projection, one with layer 1, and a single file."""
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1), {"model.norm.weight": torch.ones(999).bfloat16()})
    damage(path / THIRD)
    assert Checkpoint(path).unread == [THIRD]
    assert list(load(path)) == [0, 1]
    damage(path / SECOND)
    problems = problems_of(path)
    assert {problem.subject for problem in problems} == {INDEXER.format(1) + leaf for leaf in LEAVES}
    assert {(problem.file, problem.advice) for problem in problems} == {(SECOND, advice)}
    assert all(problem.found.startswith(found) for problem in problems)
    assert list(load(path, [0])) == [0]
    (path / INDEX).unlink()
    save_file(fp8_layer(), path / "model.safetensors")
    damage(path / "model.safetensors")
    if damage is not os.unlink:
        problem = only(problems_of(path))
        assert (problem.subject, problem.advice) == ("model.safetensors", advice)


def test_index_names_absent_tensors(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer())
    index = json.loads((path / INDEX).read_text())
    absent = [INDEXER.format(1) + "wk.weight", INDEXER.format(2) + "wk_weights_proj.weight"]
    index["weight_map"] |= dict.fromkeys(absent, ONE_OF_ONE)
    (path / INDEX).write_text(json.dumps(index))
    first, gate, last = problems_of(path)
    assert [first.subject, last.subject, gate.subject] == [*absent, INDEXER.format(1) + "weights_proj.weight"]
    for problem in (first, last):
        assert problem.found == "no such tensor"
        assert problem.advice == "index and file are of different exports: fetch both again"


def test_tensor_in_two_shards(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(), {GATE: fp8_layer()[GATE]})
    problem = only(problems_of(path))
    assert (problem.subject, problem.file, problem.found) == (GATE, "model-00002-of-00002.safetensors", "a second copy")


def test_file_replaced_between_header_and_data(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer())
    checkpoint, expected = Checkpoint(path), load(path)[0]
    save_file({WK: torch.ones(1)}, tmp_path / "new")
    (tmp_path / "new").replace(path / ONE_OF_ONE)
    assert same(load(checkpoint)[0].wk, expected.wk)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        *((text, "readable JSON") for text in ("{", "[" * 100_000, *(replace for replace, _ in NO_FILES.values()))),
        ("[]", "a JSON object"),
        *((text, 'a "weight_map" from tensor') for text in ("{}", '{"weight_map": {}}', '{"weight_map": ["a"]}')),
        *(
            (json.dumps({"weight_map": {"a": file}}), "the name of a file beside the index")
            for file in ("../b.safetensors", 3, "", ".", "..", "\ud800")
        ),
    ],
)
def test_unreadable_json(tmp_path, content, expected):
    for file in (INDEX, "config.json")[: 2 if expected == "readable JSON" else 1]:
        path = write_checkpoint(tmp_path / file[:6], fp8_layer(), config={})
        content(path / file) if callable(content) else (path / file).write_text(content)
        assert only(problems_of(path)).expected.startswith(expected)


def test_no_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for path, found in (
        (tmp_path, "no .safetensors file in it"), (tmp_path / "nowhere", "no such file or directory"),
        (tmp_path / "config.json", "another file"), (tmp_path / ("long" * 100), "[Errno 36] File name too long: "),
    ):  # fmt: skip
        assert only(problems_of(path)).found.startswith(found)
    save_file(renamed(fp8_layer(), "self_attn", "mlp"), tmp_path / SECOND)
    problem = only(problems_of(tmp_path))
    assert (problem.found, problem.advice) == ("other .safetensors files", "fetch the index, or give one file")
    assert only(problems_of(tmp_path / SECOND)).found == "none of 5 tensors"  # of an indexer
    for problem in problems_of(write_checkpoint(tmp_path / os.fsdecode(b"caf\xe9"), fp8_layer())):
        assert "safetensors opens UTF-8 paths only: rename the file" in problem.advice


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
        assert same(weights[layer].wk, Matrix(Format.FP8_BLOCK, codes, scale))
        assert same(weights[layer].gate, Matrix(Format.BF16, gate))


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
