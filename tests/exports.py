"""One random matrix in each encoding: its tensors as a checkpoint holds them, and its values in fp64.

The values are worked out element by element from the definition of the format, not by the layouts under test.
"""

from dataclasses import dataclass

import torch

from indexproj.indexer.cli.synthetic import random_e4m3, random_e8m0

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@dataclass
class Export:
    """A matrix [N, K].

    Attributes:
        tensors: last part of the name -> tensor.
        values: [N, K] fp64.
        encoding: as the audit names it.
        is_native: False if loading rounds to bf16.
    """

    tensors: dict[str, torch.Tensor]
    values: torch.Tensor
    encoding: str
    is_native: bool = True

    @property
    def loaded(self):
        """What loading should make of the values."""
        return self.values if self.is_native else self.values.bfloat16().double()


def each(scale, rows, columns, shape):
    """The scale of every element, by its indices."""
    i, j = torch.meshgrid(*map(torch.arange, shape), indexing="ij")
    return scale.double()[i // rows, j // columns]


def floats(n, k, dtype, encoding, is_native):
    values = (torch.randn(n, k) * torch.exp2(4 * torch.rand(n, 1))).to(dtype)
    return Export({"weight": values}, values.double(), encoding, is_native)


def spread_scales(n, k, dtype=torch.float32):
    """Factors that differ by up to 2**6, so that one taken for another is a gross error."""
    return (torch.exp2(6 * torch.rand(n, k)) / 448).to(dtype)


def bf16(n, k):
    return floats(n, k, torch.bfloat16, "BF16", True)


def f16(n, k):
    return floats(n, k, torch.float16, "F16", False)


def f32(n, k):
    return floats(n, k, torch.float32, "F32", False)


def e4m3(n, k, scale, rows, columns, encoding, stored=None, leaf="weight_scale", fnuz=False):
    weight = random_e4m3(n, k)
    if fnuz:
        bits = torch.randint(0, 256, (n, k), dtype=torch.uint8)
        weight = bits.masked_fill(bits == 0x80, 0).view(torch.float8_e4m3fnuz)
    values = weight.double() * each(scale, rows, columns, (n, k))
    return Export({"weight": weight, leaf: scale if stored is None else stored}, values, encoding)


def fp8_block(n, k, dtype=torch.float32, fnuz=False):
    scale = spread_scales(-(-n // 128), -(-k // 128), dtype)
    return e4m3(n, k, scale, 128, 128, "FP8 128x128", leaf="weight_scale_inv", fnuz=fnuz)


def fp8_block_bf16(n, k):
    return fp8_block(n, k, torch.bfloat16)


def fp8_block_fnuz(n, k):
    return fp8_block(n, k, fnuz=True)


def fp8_block_e8m0(n, k):
    scale = random_e8m0(-(-n // 128), -(-k // 128))
    return e4m3(n, k, scale.float(), 128, 128, "FP8 128x128", scale, "weight_scale_inv")


def fp8_block_u8(n, k):
    scale = random_e8m0(-(-n // 128), -(-k // 128))
    return e4m3(n, k, scale.float(), 128, 128, "FP8 128x128", scale.view(torch.uint8), "scale")


def fp8_row(n, k):
    return e4m3(n, k, spread_scales(n, 1), 1, k, "FP8 per row")


def fp8_row_flat(n, k):
    scale = spread_scales(n, 1, torch.bfloat16)
    return e4m3(n, k, scale, 1, k, "FP8 per row", scale.flatten())


def fp8_torchao(n, k):
    scale = spread_scales(n, 1)
    export = e4m3(n, k, scale, 1, k, "FP8 per row (torchao)", leaf="_weight_scale")
    export.tensors["_weight_qdata"] = export.tensors.pop("weight")
    return export


def fp8_tensor(n, k):
    scale = spread_scales(1, 1)
    return e4m3(n, k, scale, n, k, "FP8 per tensor", scale.view(()))


def fp8_tensor_flat(n, k):
    scale = spread_scales(1, 1, torch.bfloat16)
    return e4m3(n, k, scale, n, k, "FP8 per tensor", scale.view(1))


def mxfp8(n, k):
    scale = random_e8m0(n, -(-k // 32))
    return e4m3(n, k, scale.float(), 1, 32, "MXFP8", scale)


def mxfp8_u8(n, k):
    scale = random_e8m0(n, -(-k // 32))
    return e4m3(n, k, scale.float(), 1, 32, "MXFP8", scale.view(torch.uint8), "weight_scale_inv")


def fp8_packed(n, k):
    """Exponents packed by arithmetic; those beyond K are set to what would be NaN."""
    scale = random_e8m0(n, -(-k // 128))
    exponents = torch.full((n, 4 * -(-k // 512)), 255, dtype=torch.int64)
    exponents[:, : scale.shape[1]] = scale.view(torch.uint8)
    words = (exponents.view(n, -1, 4) * torch.tensor([1, 1 << 8, 1 << 16, 1 << 24])).sum(-1)
    stored = torch.where(words < 1 << 31, words, words - (1 << 32)).int()
    return e4m3(n, k, scale.float(), 1, 128, "FP8 packed UE8M0", stored, "weight_scale_inv")


def e2m1(n, k):
    """Bytes and values of random codes; the even column is in the low half."""
    numbers = torch.randint(0, 16, (n, k))
    return (numbers[:, ::2] + 16 * numbers[:, 1::2]).to(torch.uint8), E2M1[numbers]


def nvfp4(n, k):
    packed, values = e2m1(n, k)
    scale = torch.exp2(6 * torch.rand(n, -(-k // 16))).to(torch.float8_e4m3fn)
    factor = torch.rand(()) / 448
    tensors = {"weight": packed, "weight_scale": scale, "weight_scale_2": factor}
    return Export(tensors, values * each(scale, 1, 16, (n, k)) * factor.double(), "NVFP4")


def nvfp4_divisor(n, k):
    packed, values = e2m1(n, k)
    scale = torch.exp2(6 * torch.rand(n, -(-k // 16))).to(torch.float8_e4m3fn)
    divisor = 448 * torch.rand(1) + 1
    tensors = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": divisor}
    factor = (1 / divisor).double()  # rounded to fp32, as the format's own library does
    return Export(tensors, values * each(scale, 1, 16, (n, k)) * factor, "NVFP4 (divisor)")


def mxfp4(n, k):
    packed, values = e2m1(n, k)
    scale = random_e8m0(n, -(-k // 32))
    values = values * each(scale.float(), 1, 32, (n, k))
    return Export({"weight_packed": packed, "weight_scale": scale.view(torch.uint8)}, values, "MXFP4")


def mxfp4_e8m0(n, k):
    export = mxfp4(n, k)
    packed, scale = export.tensors.values()
    export.tensors = {"weight": packed, "weight_scale": scale.view(torch.float8_e8m0fnu)}
    return export


def pack_int4(numbers, dim):
    """Numbers from -8 to 7, eight to an int32 along dim; the last word is filled up with nonsense."""
    numbers = (numbers + 8).movedim(dim, -1)
    padded = torch.full((*numbers.shape[:-1], -(-numbers.shape[-1] // 8) * 8), 13)
    padded[..., : numbers.shape[-1]] = numbers
    words = (padded.unflatten(-1, (-1, 8)) * 16 ** torch.arange(8)).sum(-1)
    return torch.where(words < 1 << 31, words, words - (1 << 32)).int().movedim(-1, dim).contiguous()


def int4(n, k, groups=None, zero_point=False, g_idx=False):
    groups = groups or k // 32
    numbers = torch.randint(-8, 8, (n, k))
    scale = spread_scales(n, groups, torch.bfloat16)
    tensors = {"weight_packed": pack_int4(numbers, 1), "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    group = torch.arange(k) // (k // groups)
    if g_idx:
        group = group[torch.randperm(k)]
        tensors["weight_g_idx"] = group.int()
    zeros = torch.zeros(n, groups, dtype=torch.int64)
    if zero_point:
        zeros = torch.randint(-8, 8, (n, groups))
        tensors["weight_zero_point"] = pack_int4(zeros, 0)
    values = (numbers - zeros[:, group]).double() * scale.double()[:, group]
    return Export(tensors, values, "INT4", is_native=False)


def int4_row(n, k):
    return int4(n, k, groups=1)


def int4_zero_point(n, k):
    return int4(n, k, zero_point=True)


def int4_g_idx(n, k, groups=None):
    return int4(n, k, groups, zero_point=True, g_idx=True)


EXPORTS = {
    make.__name__: make
    for make in (
        bf16, f16, f32,
        fp8_block, fp8_block_bf16, fp8_block_e8m0, fp8_block_u8, fp8_block_fnuz,
        fp8_row, fp8_row_flat, fp8_torchao, fp8_tensor, fp8_tensor_flat, mxfp8, mxfp8_u8, fp8_packed,
        nvfp4, nvfp4_divisor, mxfp4, mxfp4_e8m0,
        int4, int4_row, int4_zero_point, int4_g_idx,
    )
}  # fmt: skip


def named(stem, matrix, export):
    """The tensors by their names in a checkpoint."""
    return {f"{stem}{matrix}.{leaf}": tensor for leaf, tensor in export.tensors.items()}
