"""Random matrices for tests, benchmarks and fixtures."""

import torch
from torch import Tensor

from ...kernels import Format, Matrix
from ...kernels.formats import SCALE_BLOCK, scale_group, scale_shape


def random_matrix(format: Format, n: int, k: int) -> Matrix:
    """[n, k] from torch's default generator. Scales differ by up to 2**6, so mixing them up is a gross error."""
    grid = scale_shape((n, k), *scale_group(format, k))
    if format == Format.BF16:
        return Matrix(format, random_weight(n, k, torch.default_generator).bfloat16())
    if format == Format.FP8_BLOCK:
        codes, scale = quantize_blocks(random_weight(n, k, torch.default_generator))
        return Matrix(format, codes, scale * torch.exp2(6 * torch.rand(grid)))
    if format == Format.FP8_ROW:
        return Matrix(format, random_e4m3(n, k), None, torch.exp2(6 * torch.rand(grid)) / 448)
    if format == Format.MXFP8:
        return Matrix(format, random_e4m3(n, k), random_e8m0(*grid))
    packed = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
    if format == Format.MXFP4:
        return Matrix(format, packed, random_e8m0(*grid))
    return Matrix(format, packed, torch.exp2(6 * torch.rand(grid)).to(torch.float8_e4m3fn), torch.rand(n, 1) / 448)


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes weight [N, K] fp32 with one scale per 128x128 block: amax / 448.

    Returns codes [N, K] float8_e4m3fn and scale [ceil(N/128), ceil(K/128)] fp32.
    """
    (n, k), (rows, columns) = weight.shape, scale_shape(weight.shape)
    padded = torch.zeros(rows * SCALE_BLOCK, columns * SCALE_BLOCK)
    padded[:n, :k] = weight
    blocks = padded.view(rows, SCALE_BLOCK, columns, SCALE_BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-12) / 448
    codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:n, :k].contiguous(), scale


def random_weight(n: int, k: int, generator: torch.Generator) -> Tensor:
    """[n, k] fp32 that resembles trained weights: columns differ in size, and one value in a thousand is an outlier."""
    weight = torch.randn(n, k, generator=generator) * 0.02
    weight *= torch.exp(0.4 * torch.randn(k, generator=generator))
    outliers = torch.rand(n, k, generator=generator) < 1e-3
    return torch.where(outliers, 8 * weight, weight)


def random_e4m3(*shape: int) -> Tensor:
    """Any e4m3fn codes except NaN."""
    bits = torch.randint(0, 0x7F, shape, dtype=torch.uint8) | torch.randint(0, 2, shape, dtype=torch.uint8) << 7
    return bits.view(torch.float8_e4m3fn)


def random_e8m0(*shape: int) -> Tensor:
    """Scales from 2**-13 to 2**-4."""
    return torch.randint(114, 124, shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)
