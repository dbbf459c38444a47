"""Loads weights from a checkpoint on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from ..kernels.weights import ProjectionWeights
from .checkpoint import Checkpoint
from .layer import own
from .plan import Plan
from .problems import CheckpointError, Problem

LOGGER = logging.getLogger("indexproj")


def load(
    checkpoint: str | Path | Checkpoint,
    layers: Iterable[int] | None = None,
    device: str | torch.device = "cpu",
    *,
    progress: bool = False,
) -> dict[int, ProjectionWeights]:
    """Loads the projection of some layers, reading only its own bytes. Logs `Plan.warnings`.

    Args:
        checkpoint: a directory, a .safetensors file, or a Checkpoint.
        layers: layers to load; None for all that own an indexer.
        device: device of the weights.
        progress: show a progress bar on stderr if that is a terminal.

    Returns:
        layer -> weights.

    Raises:
        CheckpointError: lists every problem; nothing is loaded.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    plan = Plan.of(checkpoint)
    chosen = plan.select(layers)
    for warning in plan.warnings:
        LOGGER.warning("%s", warning)
    console = Console(stderr=True)
    is_shown = progress and console.is_terminal
    loaded: dict[int, ProjectionWeights] = {}
    problems: list[Problem] = []
    for layer in track(chosen.values(), "Loading", console=console, transient=True, disable=not is_shown):
        tensors = {name: own(checkpoint.read(name), torch.device(device)) for name in layer.tensors}
        if weights := layer.bind(tensors, problems):
            loaded[layer.layer] = weights
    if problems:
        raise CheckpointError(problems)
    return loaded
