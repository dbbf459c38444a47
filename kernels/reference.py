"""What the kernels are judged by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .matrix import SCALE_BLOCK, ProjectionWeights


def reference(x: Tensor, weights: ProjectionWeights, activation: str | None = None) -> tuple[Tensor, Tensor]:
    """The projection in fp64, from exactly decoded weights.

    Args:
        x: [..., K], any floating dtype.
        weights: the matrices, on the device of x.
        activation: as for `project`.

    Returns:
        k [..., D] and gate [..., H], both fp64.
    """
    wide = x.to(torch.float64)
    rounded = wide if activation is None else quantize(x, activation == "fp8_ue8m0")
    return rounded @ weights.wk.dequantize(torch.float64).T, wide @ weights.gate.dequantize(torch.float64).T


def quantize(x: Tensor, ue8m0: bool) -> Tensor:
    """[..., K] in fp64: x as its e4m3 codes and their scales, one for 128 values along K, have it."""
    *leading, k = x.shape
    padded = functional.pad(x.float(), (0, -k % SCALE_BLOCK))
    groups = padded.view(*leading, padded.shape[-1] // SCALE_BLOCK, SCALE_BLOCK)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    values = (groups / scale).to(torch.float8_e4m3fn).double() * scale.double()
    return values.flatten(-2)[..., :k]
