"""Problem lists that a person can read."""

import pytest
import torch

from indexproj.loading import CheckpointError, Problem
from indexproj.loading.problems import summarize
from support import INDEXER, fp8_layer, invoke, only, problems_of, write_checkpoint


def gptq(n, k, words, zeros):
    """words: of packed codes in K. zeros: words of packed zero points in N."""
    codes = {"qweight": torch.ones(words, n).int(), "qzeros": torch.ones(k // 128, zeros).int()}
    return codes | {"scales": torch.ones(k // 128, n).half()}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("GPTQ, 4 bit", lambda n, k: gptq(n, k, k // 8, n // 8) | {"g_idx": torch.zeros(k).int()}),
        ("GPTQ, 4 bit", lambda n, k: gptq(n, k, k // 8, n // 8)),
        ("GPTQ, 8 bit", lambda n, k: gptq(n, k, k // 4, n // 4)),
        ("AWQ, 4 bit", lambda n, k: gptq(n, k, k, n // 8) | {"qweight": torch.ones(k, n // 8).int()}),
        ("GPTQ or AWQ", lambda n, k: {"qweight": torch.ones(k // 8, n).int()}),
        ("INT8", lambda n, k: {"weight": torch.zeros(n, k).char(), "weight_scale": torch.ones(n, 1)}),
        ("MLX", lambda n, k: {"weight": torch.zeros(n, k // 8, dtype=torch.uint32), "scales": torch.ones(n, k // 64)}),
    ],
)
def test_foreign_formats(tmp_path, name, make):
    """62 layers: one line per matrix, with the quantizer's name, and fewer than 25 lines in all."""
    tensors = {
        f"{INDEXER.format(layer)}{matrix}.{leaf}": tensor
        for layer in range(62)
        for matrix, n in (("wk", 128), ("weights_proj", 64))
        for leaf, tensor in make(n, 256).items()
    }
    result = invoke("audit", write_checkpoint(tmp_path, tensors, config={"num_hidden_layers": 61}))
    assert result.exit_code == 2
    assert len(result.output.splitlines()) < 25
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    assert all(f"{name} is not supported" in line and ".layers.{0-61}.self_attn." in line for line in lines[1:])
    assert all("requantize it to" in line for line in lines[1:])


def test_problems_of_layers_share_a_line():
    """Problems that differ only in layers and shards. A second copy names two shards."""
    stem, shard = "model.layers.{}.self_attn.indexer.wk", "model-{:05d}-of-00163.safetensors"
    alike = [
        Problem(f"{stem.format(n)}.bias", shard.format(n + 20), f"nothing beside {stem.format(n)}", shard.format(n))
        for n in (0, 1, 2, 10)
    ]
    one, shards = stem.format("{0-2, 10}"), "model-{{{}}}-of-00163.safetensors"
    found = f"expected nothing beside {one}, found {shards.format('00000-00002, 00010')}"
    lines = [f"{one}.bias in {shards.format('00020-00022, 00030')}: {found}", "config.json: expected a, found b"]
    problems = [*alike, Problem("config.json", "", "a", "b")]
    assert summarize(problems) == lines
    assert str(CheckpointError(problems)).splitlines() == ["5 problems:", *(f"  {line}" for line in lines)]
    assert str(CheckpointError(alike[:1])) == str(alike[0])
    for subject in ("layer {}", "mtp.{}.attn.indexer.wk.weight", "part{}.safetensors"):
        alike = [Problem(subject.format(n), "", "a", "b") for n in (4, 5)]
        assert summarize(alike) == [f"{subject.format('{4-5}')}: expected a, found b"]
    assert len(summarize([Problem("config.json", "", "a", "b"), Problem("config.json", "", "a", "c")])) == 2
    alike = [Problem(f"model.layers.{n}.self_attn.indexer.wk.weight", "f", "a", "b") for n in range(20_000)]
    assert only(summarize(alike)).startswith("model.layers.{0-19999}.")


def test_control_characters_are_escaped(tmp_path):
    name = f"{INDEXER.format(0)}wk.\x1b[2J\n\u202e"
    path = write_checkpoint(tmp_path, fp8_layer() | {name: torch.ones(1)})
    problem = only(problems_of(path))
    assert problem.subject == name
    text = invoke("audit", path).stderr
    assert "wk.\\x1b[2J\\n\\u202e in" in text
    assert text.replace("\n", "").isprintable()
