"""From a path to weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..kernels.matrix import ProjectionWeights
from .assembly import Assembly
from .checkpoint import Checkpoint
from .plan import Plan


def load(
    path: str | Path, layers: Iterable[int] | None = None, device: str | torch.device = "cpu"
) -> dict[int, ProjectionWeights]:
    """Loads the projection of some layers, reading only its own bytes.

    Args:
        path: checkpoint directory, or one .safetensors file.
        layers: layer indices; all that own an indexer where left out.
        device: where the weights go.

    Returns:
        layer index -> weights.

    Raises:
        CheckpointError: listing every problem; nothing is loaded then.
    """
    checkpoint = Checkpoint(path)
    chosen = Plan.of(checkpoint).select(layers)
    assembly = Assembly(chosen, device)
    assembly.begin()
    for name, tensor in checkpoint.stream(name for plan in chosen.values() for name in plan.tensors):
        assembly.offer(name, tensor, checkpoint.headers[name].file)
    return assembly.finish()
