"""Helpers for tests in several folders: random weights, small checkpoints, the command line."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from indexproj.__main__ import app
from indexproj.indexer.cli import synthetic
from indexproj.indexer.models import PAIRS, SHAPES, fits
from indexproj.kernels import Format, ProjectionWeights
from indexproj.kernels.formats import parse_pair
from indexproj.loading import CheckpointError, load
from indexproj.loading.checkpoint import INDEX
from indexproj.loading.layer import BAD_VALUES

DEEPSEEK, GLM, *_ = SHAPES.values()

INDEXER = "model.layers.{}.self_attn.indexer."
WK, SCALE, GATE = (INDEXER.format(0) + leaf for leaf in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight"))


def random_matrix(format, n, k):
    """The same numbers on every device."""
    with torch.device("cpu"):
        matrix = synthetic.random_matrix(format, n, k)
    return matrix.map(lambda tensor: tensor.to(torch.get_default_device()))


dense = functools.partial(random_matrix, Format.BF16)
# Pairs in published checkpoints, and FP8 per row, which requantized checkpoints have.
ALL_PAIRS = (*(pair for pair in PAIRS if fits("glm-5", pair)), "FP8 per row, BF16")


def weights(pair, shape):
    """Weights with distinct scales; pair as in models.PAIRS, shape (D, H, K)."""
    *ns, k = shape
    return ProjectionWeights.pack(*(random_matrix(f, n, k) for f, n in zip(parse_pair(pair), ns, strict=True)))


def fp8_layer(layer=0, d=128, h=16, k=256):
    """The tensors of one layer under DeepSeek-V3.2's names, other indexer tensors included."""
    wk = random_matrix(Format.FP8_BLOCK, d, k)
    tensors = {"k_norm.weight": torch.ones(d), "weights_proj.weight": dense(h, k).values, "wk.weight": wk.values}
    tensors |= {"wk.weight_scale_inv": wk.scale, "wq_b.weight": torch.zeros(h * d, 64).to(wk.values.dtype)}
    return {INDEXER.format(layer) + leaf: tensor for leaf, tensor in tensors.items()}


def bf16_layer(layer=0, d=128, h=16, k=256):
    stem = INDEXER.format(layer)
    return {f"{stem}weights_proj.weight": dense(h, k).values, f"{stem}wk.weight": dense(d, k).values}


def write_checkpoint(directory: Path, *shards: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """Writes a sharded checkpoint with an index; one dict of tensors per shard."""
    directory.mkdir(exist_ok=True)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, directory / file)
        weight_map |= dict.fromkeys(tensors, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def same(a, b):
    """True if two matrices hold the same bits."""
    pairs = zip(a.tensors, b.tensors, strict=True)
    return a.format == b.format and all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in pairs)


def invoke(*arguments, code=None):
    """Runs a command in this process; it must exit with that code, if one is given."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    assert code in (None, result.exit_code), result.output
    return result


def table_rows(result):
    """The cells of every table that a command printed, without headers."""
    return [[cell.strip() for cell in line.split("│")] for line in result.stdout.splitlines() if "│" in line]


def problems_of(path, layers=None):
    """The problems of a load. The audit reports the same, as far as headers show them."""
    with pytest.raises(CheckpointError) as caught:
        load(path, layers)
    problems = caught.value.problems
    result = invoke("audit", path)
    expected = [p for p in problems if p.advice != BAD_VALUES and p.found != "no indexer in it"]
    assert result.exit_code == (2 if expected else 0), result.output
    assert layers or not expected or str(CheckpointError(expected)) in result.stderr
    return problems


def only(problems):
    (problem,) = problems
    return problem
