"""What tests of several folders need: weights with every block scale distinct, and small checkpoints."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from indexproj.indexer.fixture import quantize_blocks, random_weight
from indexproj.kernels import DenseMatrix, Fp8Matrix, ProjectionWeights
from indexproj.loading.checkpoint import INDEX

DEEPSEEK = (128, 64, 7168)
GLM = (128, 32, 6144)

INDEXER = "model.layers.{}.self_attn.indexer."


def dense(n, k):
    return DenseMatrix(random_weight(n, k, torch.default_generator).bfloat16())


def fp8(n, k):
    """Block scales that differ by up to 2**6, so that one taken for another is a gross error."""
    codes, scale = quantize_blocks(random_weight(n, k, torch.default_generator))
    return Fp8Matrix(codes, scale * torch.exp2(6 * torch.rand(scale.shape)))


PAIRS = {"dense-dense": (dense, dense), "fp8-dense": (fp8, dense), "fp8-fp8": (fp8, fp8)}


def weights(pair, shape):
    d, h, k = shape
    wk, gate = PAIRS[pair]
    return ProjectionWeights.pack(wk(d, k), gate(h, k))


def fp8_layer(layer=0, d=128, h=16, k=256):
    """The tensors of one layer as DeepSeek-V3.2 names them, neighbours included."""
    stem = INDEXER.format(layer)
    wk = fp8(d, k)
    return {
        f"{stem}k_norm.weight": torch.ones(d),
        f"{stem}weights_proj.weight": dense(h, k).weight,
        f"{stem}wk.weight": wk.codes,
        f"{stem}wk.weight_scale_inv": wk.scale,
        f"{stem}wq_b.weight": torch.zeros(h * d, 64, dtype=torch.float8_e4m3fn),
    }


def bf16_layer(layer=0, d=128, h=16, k=256):
    stem = INDEXER.format(layer)
    return {f"{stem}weights_proj.weight": dense(h, k).weight, f"{stem}wk.weight": dense(d, k).weight}


def write_checkpoint(directory: Path, *shards: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    """A sharded checkpoint with an index; one dict of tensors per shard."""
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
    return type(a) is type(b) and all(
        torch.equal(x.view(torch.uint8), y.view(torch.uint8))
        for x, y in zip(a.operands, b.operands, strict=True)
        if x is not None
    )
