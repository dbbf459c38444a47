"""Values that no trained matrix has, and that would end in NaN or infinity, or be lost, in the kernels' fp32 sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.formats import spread
from ..kernels.matrix import DenseMatrix, Fp4Matrix, Fp8Matrix, Matrix

_LARGEST, _SMALLEST = 2.0**100, 2.0**-100
_LARGEST_BF16 = (100 + 127) << 7  # the bits of 2**100
_ALL_ZERO = "values other than 0", "nothing but 0, as in a hole that an unfinished download leaves"
_SCALES = "scales that are 0 or of a size from 2**-100 to 2**100"


def unusable(matrix: Matrix) -> dict[str, tuple[str, str]]:
    """role -> (which values are expected, what is there), for every tensor of a matrix that holds others."""
    found: dict[str, tuple[str, str]] = {}
    if isinstance(matrix, DenseMatrix):
        # Without their signs, bf16 values are in the order of their bits, infinity and NaN above all.
        largest = int((matrix.weight.view(torch.int16) & 0x7FFF).amax())
        if largest > _LARGEST_BF16:
            found["weight"] = "values of a size up to 2**100", _summary(matrix.weight)
        elif largest == 0:
            found["weight"] = _ALL_ZERO
        return found
    assert isinstance(matrix, Fp8Matrix | Fp4Matrix)
    if isinstance(matrix, Fp8Matrix) and _has_nan(matrix.codes):
        found["weight"] = "finite values", _summary(matrix.codes)
    if not _scales_fit(matrix):
        found["scale"] = _SCALES, _summary(matrix.scale)
    if isinstance(matrix, Fp4Matrix) and matrix.global_scale is not None and not _fits(matrix.global_scale).all():
        found["global_scale"] = _SCALES, _summary(matrix.global_scale)
    if not found:
        for role, tensor in zip(("weight", "scale", "global_scale"), matrix.tensors, strict=False):
            if not tensor.view(torch.uint8).max():
                found[role] = _ALL_ZERO
    return found


def _summary(tensor: Tensor) -> str:
    values = tensor.float()
    bad = ~values.isfinite()
    if bad.any():
        return f"{int(bad.sum())} NaN or infinite of {values.numel()}, the first at {bad.nonzero()[0].tolist()}"
    sizes = values.abs()
    return f"sizes from {sizes.min():.1e} to {sizes.max():.1e}"


def _has_nan(codes: Tensor) -> bool:
    """Among e4m3fn codes 0x7F and 0xFF, among e4m3fnuz codes 0x80: extremes of bytes, with and without a sign."""
    signed, unsigned = codes.view(torch.int8), codes.view(torch.uint8)
    if codes.dtype == torch.float8_e4m3fnuz:
        return int(signed.min()) == -0x80
    return int(signed.max()) == 0x7F or int(unsigned.max()) == 0xFF


def _fits(scale: Tensor) -> Tensor:
    size = scale.float().abs()
    return (size == 0) | (size >= _SMALLEST) & (size <= _LARGEST)  # comparisons with NaN are false


def _scales_fit(matrix: Fp8Matrix | Fp4Matrix) -> bool:
    fits = _fits(matrix.scale)
    if fits.all():
        return True
    # A group of zeros may have any small scale: quantizers give it the least one there is.
    if not (matrix.scale.float().abs() <= _LARGEST).all():
        return False
    elsewhere = spread(fits, matrix.group, matrix.shape)
    return bool((elsewhere | (matrix.dequantize() == 0)).all())
