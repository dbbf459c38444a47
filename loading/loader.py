"""Loads weights from a checkpoint on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ..kernels.weights import ProjectionWeights
from .checkpoint import Checkpoint
from .layer import own, real_device
from .plan import Plan
from .problems import CheckpointError, Problem, log


def load(
    checkpoint: str | Path | Checkpoint,
    layers: Iterable[int] | None = None,
    device: str | torch.device = "cpu",
    *,
    index_head_dim: int | None = None,
) -> dict[int, ProjectionWeights]:
    """Loads the projection of some layers, reading only its own bytes.

    Logs one warning with `Plan.warnings`, problems of layers that were not asked for, values that are odd, and values
    that were rounded.

    Args:
        checkpoint: a directory, a .safetensors file, or a Checkpoint.
        layers: layers to load; None for all that own an indexer.
        device: device of the weights.
        index_head_dim: D, to split `wk_weights_proj`; from config.json by default.

    Returns:
        layer -> weights.

    Raises:
        CheckpointError: lists every problem; nothing is loaded.
    """
    device = real_device(device)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    plan = Plan.of(checkpoint, index_head_dim)
    chosen = plan.select(layers)
    problems: list[Problem] = []
    warnings = [*plan.warnings, *plan.problems]
    loaded: dict[int, ProjectionWeights] = {}
    for layer in chosen.values():
        tensors = {name: own(checkpoint.read(name), device) for name in layer.tensors}
        if weights := layer.bind(tensors, problems, warnings):
            loaded[layer.layer] = weights
    if problems:
        raise CheckpointError(problems)
    log(warnings)
    return loaded
