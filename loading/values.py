"""Values that no trained matrix has, and that would end in NaN or infinity, or be lost, in the kernels' fp32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.matrix import DenseMatrix, Fp4Matrix, Fp8Matrix, Matrix, spread

_LARGEST, _SMALLEST = 2.0**100, 2.0**-100
_LARGEST_BF16 = (100 + 127) << 7  # the bits of 2**100
_SCALES = "scales that are 0 or of a size from 2**-100 to 2**100"


def unusable(matrix: Matrix) -> dict[str, str]:
    """role -> which values are expected, for every tensor of a matrix that holds others."""
    found = {}
    if isinstance(matrix, DenseMatrix):
        # Without their signs, bf16 values are in the order of their bits, infinity and NaN above all.
        if (matrix.weight.view(torch.int16) & 0x7FFF).max() > _LARGEST_BF16:
            found["weight"] = "values of a size up to 2**100"
    elif isinstance(matrix, Fp8Matrix):
        if _has_nan(matrix.codes):
            found["weight"] = "finite values"
        elif not _scales_fit(matrix):
            found["scale"] = _SCALES
    elif isinstance(matrix, Fp4Matrix):
        if not _scales_fit(matrix):
            found["scale"] = _SCALES
        if matrix.global_scale is not None and not _fits(matrix.global_scale).all():
            found["global_scale"] = _SCALES
    return found


def _has_nan(codes: Tensor) -> bool:
    """Among e4m3fn codes 0x7F and 0xFF, among e4m3fnuz codes 0x80: extremes of bytes, with and without a sign."""
    signed, unsigned = codes.view(torch.int8), codes.view(torch.uint8)
    if codes.dtype == torch.float8_e4m3fnuz:
        return bool(signed.min() == -0x80)
    return bool(signed.max() == 0x7F) or bool(unsigned.max() == 0xFF)


def _fits(scale: Tensor) -> Tensor:
    size = scale.float().abs()
    return (size == 0) | (size >= _SMALLEST) & (size <= _LARGEST)  # comparisons with NaN are false


def _scales_fit(matrix: Fp8Matrix | Fp4Matrix) -> bool:
    fits = _fits(matrix.scale)
    if fits.all():
        return True
    # A group of zeros may have any finite scale: quantizers give it the least one there is.
    if not matrix.scale.float().isfinite().all():
        return False
    elsewhere = spread(fits, matrix.group, matrix.shape)
    return bool((elsewhere | (matrix.dequantize() == 0)).all())
