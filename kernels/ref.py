"""What the kernels are judged by."""

from __future__ import annotations

import torch
from torch import Tensor

from .matrix import ProjectionWeights


def reference(x: Tensor, weights: ProjectionWeights) -> tuple[Tensor, Tensor]:
    """The projection in fp64, from exactly decoded weights.

    Args:
        x: [..., K], any floating dtype.
        weights: the matrices, on the device of x.

    Returns:
        k [..., D] and gate [..., H], both fp64.
    """
    wide = x.to(torch.float64)
    return wide @ weights.wk.dequantize(torch.float64).T, wide @ weights.gate.dequantize(torch.float64).T
