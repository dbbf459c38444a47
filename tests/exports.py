"""One random matrix in each encoding: its tensors as a checkpoint holds them, and its values in fp64.

The values are worked out element by element from the definition of the format, not by the layouts under test.
"""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch.nn.functional import pad

from indexproj.indexer.cli.synthetic import random_e4m3, random_e8m0
from indexproj.loading import Assembly, CheckpointError
from indexproj.loading.headers import parse
from support import problems_of, write_checkpoint

E8M0, ALL = torch.float8_e8m0fnu, 1 << 30
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@dataclass
class Export:
    """A matrix [N, K]."""

    tensors: dict[str, torch.Tensor]  # by the last part of the name
    values: torch.Tensor  # [N, K] fp64
    encoding: str  # as the audit names it
    is_native: bool = True  # False if loading rounds to bf16
    has_input_scale: bool = False  # beside them; nobody reads it

    @property
    def loaded(self):
        """What loading should make of the values."""
        return self.values if self.is_native else self.values.bfloat16().double()


def each(scale, rows, columns, shape):
    """The scale of every element, by its indices."""
    i, j = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    return scale.double()[i // rows, j // columns]


as_bytes = partial(torch.Tensor.view, dtype=torch.uint8)


def packed(numbers, count, filler):
    """So many numbers along K per int32, the first in the low bits; the last word is filled up with nonsense."""
    words = pad(numbers.long(), (0, -numbers.shape[1] % count), value=filler).unflatten(1, (-1, count))
    return (words << 32 // count * torch.arange(count)).sum(-1).int()


def floats(n, k, dtype, encoding):
    values = (torch.randn(n, k) * torch.exp2(4 * torch.rand(n, 1))).to(dtype)
    return Export({"weight": values}, values.double(), encoding, encoding == "BF16")


def e4m3(
    encoding, rows, columns, dtype=torch.float32, stored=torch.clone, leaf="weight_scale", fnuz=False, weight="weight"
):
    """Makes exports with a scale for so many rows and columns; stored maps it to what the file has."""

    def export(n, k):
        codes = random_e4m3(n, k)
        if fnuz:  # all codes but 0x80
            codes = (torch.randint(1, 256, (n, k)) ^ 0x80).to(torch.uint8).view(torch.float8_e4m3fnuz)
        grid = -(-n // rows), -(-k // columns)
        # They differ by up to 2**6, so that one taken for another is a gross error.
        scale = random_e8m0(*grid) if dtype == E8M0 else (torch.exp2(6 * torch.rand(grid)) / 448).to(dtype)
        values = codes.double() * each(scale.float(), rows, columns, (n, k))
        return Export({weight: codes, leaf: stored(scale)}, values, encoding)

    return export


block = partial(e4m3, "FP8 128x128", 128, 128, leaf="weight_scale_inv")
row = partial(e4m3, "FP8 per row", 1, ALL)
per_tensor = partial(e4m3, "FP8 per tensor", ALL, ALL)
mxfp8 = partial(e4m3, "MXFP8", 1, 32, E8M0)


def e2m1(scale, group, k):
    """Bytes of random codes, the even column in the low half, and their values times the scales of groups."""
    numbers = torch.randint(0, 16, (len(scale), k))
    codes = (numbers[:, ::2] + 16 * numbers[:, 1::2]).to(torch.uint8)
    return codes, E2M1[numbers] * each(scale.float(), 1, group, numbers.shape)


def nvfp4(n, k, is_divisor=False):
    scale, number = torch.exp2(6 * torch.rand(n, -(-k // 16))).to(torch.float8_e4m3fn), 448 * torch.rand(1) + 1
    codes, values = e2m1(scale, 16, k)
    factor = 1 / number  # rounded to fp32, as the format's own library does
    values = values * factor.double()
    if is_divisor:
        tensors = {"weight_packed": codes, "weight_scale": scale, "weight_global_scale": number}
        return Export(tensors, values, "NVFP4 (divisor)")
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": factor[0]}
    return Export(tensors, values, "NVFP4", has_input_scale=True)


def mxfp4(n, k, weight="weight_packed", stored=as_bytes):
    scale = random_e8m0(n, -(-k // 32))
    codes, values = e2m1(scale, 32, k)
    return Export({weight: codes, "weight_scale": stored(scale)}, values, "MXFP4")


def int4(n, k, groups=None, zero_point=False, g_idx=False):
    groups = groups or k // 32
    numbers, zeros = torch.randint(-8, 8, (n, k)), torch.randint(-8, 8, (n, groups)) * zero_point
    scale = (torch.exp2(6 * torch.rand(n, groups)) / 448).bfloat16()
    words = packed(numbers + 8, 8, 13)
    tensors = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    group = torch.arange(k) // (k // groups)
    if g_idx:
        group = group[torch.randperm(k)]
        tensors["weight_g_idx"] = group.int()
    if zero_point:
        tensors["weight_zero_point"] = packed(zeros.T + 8, 8, 13).T.contiguous()
    values = (numbers - zeros[:, group]).double() * scale.double()[:, group]
    return Export(tensors, values, "INT4", is_native=False)


EXPORTS = {
    "bf16": partial(floats, dtype=torch.bfloat16, encoding="BF16"),
    "f16": partial(floats, dtype=torch.float16, encoding="F16"),
    "f32": partial(floats, dtype=torch.float32, encoding="F32"),
    "fp8_block": block(),
    "fp8_block_bf16": block(torch.bfloat16),
    "fp8_block_e8m0": block(E8M0),
    "fp8_block_u8": e4m3("FP8 128x128", 128, 128, E8M0, as_bytes, "scale"),
    "fp8_block_fnuz": block(fnuz=True),
    "fp8_row": row(),
    "fp8_row_flat": row(torch.float16, torch.flatten),
    "fp8_torchao": e4m3("FP8 per row (torchao)", 1, ALL, weight="_weight_qdata", leaf="_weight_scale"),
    "fp8_tensor": lambda n, k: replace(per_tensor(stored=torch.squeeze)(n, k), has_input_scale=True),
    "fp8_tensor_flat": per_tensor(torch.bfloat16, torch.flatten),
    "mxfp8": mxfp8(),
    "mxfp8_u8": mxfp8(as_bytes, "weight_scale_inv"),
    "fp8_packed": e4m3("FP8 packed UE8M0", 1, 128, E8M0, lambda s: packed(as_bytes(s), 4, 255), "weight_scale_inv"),
    "nvfp4": nvfp4,
    "nvfp4_divisor": partial(nvfp4, is_divisor=True),
    "mxfp4": mxfp4,
    "mxfp4_e8m0": partial(mxfp4, weight="weight", stored=torch.clone),
    "int4": int4,
    "int4_row": partial(int4, groups=1),
    "int4_zero_point": partial(int4, zero_point=True),
    "int4_g_idx": partial(int4, zero_point=True, g_idx=True),
}
bf16, fp8_block = EXPORTS["bf16"], EXPORTS["fp8_block"]


def named(stem, matrix, export):
    """The tensors by their names in a checkpoint."""
    unread = {"input_scale": torch.tensor(0.5)} if export.has_input_scale else {}
    return {f"{stem}{matrix}.{leaf}": tensor for leaf, tensor in (export.tensors | unread).items()}


def renamed(tensors, old, new):
    return {name.replace(old, new): tensor.clone() for name, tensor in tensors.items()}


def layer_of(wk, gate="bf16", layer=0, n=(128, 16), k=256):
    """The tensors of a layer from two exports, or names of EXPORTS."""
    stem = f"model.layers.{layer}.self_attn.indexer."
    wk, gate = (EXPORTS[made](n[i], k) if isinstance(made, str) else made for i, made in enumerate((wk, gate)))
    return named(stem, "wk", wk) | named(stem, "weights_proj", gate)


def stream(offers, layers=(0,), config={}, assembly=None):  # noqa: B006
    """The weights that an Assembly makes of a dict or of pairs (name, tensor)."""
    assembly = assembly or Assembly(layers, config=config)
    assembly.begin()
    for name, tensor in offers.items() if isinstance(offers, dict) else offers:
        assembly.offer(name, tensor)
    return assembly.finish()


def stream_problems(*args, **keywords):
    with pytest.raises(CheckpointError) as caught:
        stream(*args, **keywords)
    return caught.value.problems


def refused(path, tensors, config=None):
    """The problems of a load from files, after checking that a stream of the same tensors has the same ones."""
    problems = problems_of(write_checkpoint(path, tensors, config=config))
    layers = {parsed.number for parsed in map(parse, tensors) if parsed.matrix}
    streamed = stream_problems(dict(sorted(tensors.items())), layers, config or {})
    assert sorted(map(str, streamed)) == sorted(str(replace(problem, file="")) for problem in problems)
    return problems
