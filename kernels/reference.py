"""The fp64 reference that the kernels are compared with."""

import torch
from torch import Tensor
from torch.nn import functional

from .formats import ACTIVATIONS, SCALE_BLOCK, Activation
from .weights import ProjectionWeights


def reference(x: Tensor, weights: ProjectionWeights, activation: Activation | None = None) -> tuple[Tensor, Tensor]:
    """k [..., D] and gate [..., H] in fp64, from exactly decoded weights and x [..., K] in any floating dtype."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"reference: expected activation None, 'fp8' or 'fp8_ue8m0', got {activation!r}")
    wide = x.double()
    rounded = wide if activation is None else quantize(x, activation == "fp8_ue8m0")
    return rounded @ weights.wk.dequantize(torch.float64).T, wide @ weights.gate.dequantize(torch.float64).T


def quantize(x: Tensor, ue8m0: bool) -> Tensor:
    """[..., K] in fp64: x rounded to e4m3, with one scale per 128 values along K."""
    *leading, k = x.shape
    padded = functional.pad(x.float(), (0, -k % SCALE_BLOCK))
    groups = padded.view(*leading, padded.shape[-1] // SCALE_BLOCK, SCALE_BLOCK)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
    if ue8m0:
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    values = (groups / scale).to(torch.float8_e4m3fn).double() * scale.double()
    return values.flatten(-2)[..., :k]
