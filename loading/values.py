"""Rejects values that no trained matrix has: they would overflow in the kernels' fp32 sums, become NaN, or vanish."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.formats import spread
from ..kernels.matrix import DenseMatrix, Fp4Matrix, Fp8Matrix, Matrix

_LARGEST, _SMALLEST = 2.0**100, 2.0**-100
_LARGEST_BF16 = (100 + 127) << 7  # the bits of 2**100
_ALL_ZERO = "values other than 0", "nothing but 0, as in a hole that an unfinished download leaves"
_SCALES = "scales that are 0 or have a magnitude from 2**-100 to 2**100"

Faults = dict[str, tuple[str, str]]  # role -> (expected values, found values)


def nan_codes(codes: Tensor) -> Faults:
    """Finds NaN in FP8 codes as stored, which kernels decode to numbers: 0x7F, 0xFF in e4m3fn, 0x80 in e4m3fnuz."""
    if codes.dtype == torch.float8_e4m3fn:
        has_nan = int(codes.view(torch.int8).max()) == 0x7F or int(codes.view(torch.uint8).max()) == 0xFF
    else:
        has_nan = codes.dtype == torch.float8_e4m3fnuz and int(codes.view(torch.int8).min()) == -0x80
    return {"weight": ("finite values", _summary(codes))} if has_nan else {}


def unusable(matrix: Matrix) -> Faults:
    """Finds tensors of a matrix with other bad values; NaN among FP8 codes is up to `nan_codes`."""
    if isinstance(matrix, DenseMatrix):
        # Ignoring the sign, bf16 values sort like their bits, with infinity and NaN above all others.
        largest = int((matrix.weight.view(torch.int16) & 0x7FFF).amax())
        if largest > _LARGEST_BF16:
            return {"weight": ("magnitudes up to 2**100", _summary(matrix.weight))}
        return {} if largest else {"weight": _ALL_ZERO}
    assert isinstance(matrix, Fp8Matrix | Fp4Matrix)
    tensors = dict(zip(("weight", "scale", "global_scale"), matrix.tensors, strict=False))
    found = {} if _scales_fit(matrix) else {"scale": (_SCALES, _summary(matrix.scale))}
    if "global_scale" in tensors and not _fits(tensors["global_scale"]).all():
        found["global_scale"] = _SCALES, _summary(tensors["global_scale"])
    return found or {role: _ALL_ZERO for role, tensor in tensors.items() if not tensor.view(torch.uint8).max()}


def _summary(tensor: Tensor) -> str:
    values = tensor.float()
    bad = ~values.isfinite()
    if bad.any():
        return f"{int(bad.sum())} NaN or infinite of {values.numel()}, the first at {bad.nonzero()[0].tolist()}"
    sizes = values.abs()
    return f"magnitudes from {sizes.min():.1e} to {sizes.max():.1e}"


def _fits(scale: Tensor) -> Tensor:
    size = scale.float().abs()
    return (size == 0) | (size >= _SMALLEST) & (size <= _LARGEST)  # False for NaN


def _scales_fit(matrix: Fp8Matrix | Fp4Matrix) -> bool:
    fits = _fits(matrix.scale)
    if fits.all():
        return True
    # Quantizers give a group of zeros the smallest scale there is.
    if not (matrix.scale.float().abs() <= _LARGEST).all():
        return False
    elsewhere = spread(fits, matrix.group, matrix.shape)
    return bool((elsewhere | (matrix.dequantize() == 0)).all())
