"""Problem lists that a person can read."""

import torch

from exports import EXPORTS, named
from indexproj.loading import CheckpointError, Problem
from indexproj.loading.problems import summarize
from support import INDEXER, fp8_layer, invoke, only, problems_of, write_checkpoint

I32 = torch.int32


def gptq(n, k):
    return {
        "qweight": torch.zeros(k // 8, n, dtype=I32), "qzeros": torch.zeros(k // 128, n // 8, dtype=I32),
        "scales": torch.ones(k // 128, n).half(), "g_idx": torch.zeros(k, dtype=I32),
    }  # fmt: skip


def awq(n, k):
    return {
        "qweight": torch.zeros(k, n // 8, dtype=I32), "qzeros": torch.zeros(k // 128, n // 8, dtype=I32),
        "scales": torch.ones(k // 128, n).half(),
    }  # fmt: skip


def int8(n, k):
    return {"weight": torch.zeros(n, k, dtype=torch.int8), "weight_scale": torch.ones(n, 1)}


def mlx(n, k):
    groups = {leaf: torch.ones(n, k // 64).bfloat16() for leaf in ("scales", "biases")}
    return {"weight": torch.zeros(n, k // 8, dtype=torch.uint32), **groups}


FOREIGN = {"GPTQ, 4 bit": gptq, "AWQ, 4 bit": awq, "INT8": int8, "MLX": mlx}


def test_foreign_formats(tmp_path):
    """62 layers of each: one line per matrix, with the quantizer's name, and fewer than 25 lines in all."""
    for name, make in FOREIGN.items():
        tensors = {
            f"{INDEXER.format(layer)}{matrix}.{leaf}": tensor
            for layer in range(62)
            for matrix, n in (("wk", 128), ("weights_proj", 64))
            for leaf, tensor in make(n, 256).items()
        }
        path = write_checkpoint(tmp_path / name, tensors, config={"num_hidden_layers": 61})
        result = invoke("audit", path)
        assert result.exit_code == 2
        assert len(result.output.splitlines()) < 25
        lines = result.stderr.splitlines()
        assert len(lines) == 3
        assert all(f"{name} is not supported" in line and ".layers.{0-61}.self_attn." in line for line in lines[1:])
        assert all("requantize it to" in line for line in lines[1:])


def test_problems_of_layers_share_a_line():
    stem = "model.layers.{}.self_attn.indexer.wk"
    alike = [
        Problem(f"{stem.format(n)}.bias", f"{n % 2}", f"nothing beside {stem.format(n)}", "x") for n in (0, 1, 2, 9)
    ]
    other = Problem(f"{stem.format(3)}.bias", "0", f"nothing beside {stem.format(2)}", "x")
    lines = summarize([*alike, other])
    one = stem.format("{0-2, 9}")
    assert lines == [f"{one}.bias in 2 files: expected nothing beside {one}, found x", str(other)]
    assert str(CheckpointError([*alike, other])).splitlines()[0] == "5 problems:"
    assert summarize(alike[:1]) == [str(alike[0])]
    layers = [Problem(f"layer {n}", "", "a", "b") for n in (4, 5)]
    assert summarize(layers) == ["layer {4-5}: expected a, found b"]
    mtp = [Problem(f"mtp.{n}.attn.indexer.wk.weight", "f", "a", "b") for n in (0, 1)]
    assert summarize(mtp) == ["mtp.{0-1}.attn.indexer.wk.weight in f: expected a, found b"]
    assert len(summarize([Problem("config.json", "", "a", "b"), Problem("config.json", "", "a", "c")])) == 2


def test_control_characters_are_escaped(tmp_path):
    name = f"{INDEXER.format(0)}wk.\x1b[2J\n\u202e"
    path = write_checkpoint(tmp_path, fp8_layer() | {name: torch.ones(1)})
    problem = only(problems_of(path))
    assert problem.subject == name
    text = invoke("audit", path).stderr
    assert "wk.\\x1b[2J\\n\\u202e in" in text
    assert text.replace("\n", "").isprintable()


def test_many_layers_are_summarized():
    problems = [Problem(f"model.layers.{n}.self_attn.indexer.wk.weight", "f", "a", "b") for n in range(20_000)]
    assert only(summarize(problems)).startswith("model.layers.{0-19999}.")


def test_every_encoding_without_its_scale(tmp_path):
    """The same problem in some layers: one line names them."""
    tensors = {}
    for layer in range(5):
        stem, export = INDEXER.format(layer), EXPORTS["fp8_block"](128, 256)
        if layer != 2:
            del export.tensors["weight_scale_inv"]
        tensors |= named(stem, "wk", export) | named(stem, "weights_proj", EXPORTS["bf16"](16, 256))
    path = write_checkpoint(tmp_path, tensors)
    assert len(problems_of(path)) == 4
    assert "layers.{0-1, 3-4}.self_attn.indexer.wk.weight_scale_inv" in invoke("audit", path).stderr
