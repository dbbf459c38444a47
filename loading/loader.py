"""From a path to weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from ..kernels.weights import ProjectionWeights
from .assembly import Assembly
from .checkpoint import Checkpoint
from .plan import DEFAULT_HEAD_DIM, Plan


def load(
    checkpoint: str | Path | Checkpoint,
    layers: Iterable[int] | None = None,
    device: str | torch.device = "cpu",
    *,
    progress: bool = False,
) -> dict[int, ProjectionWeights]:
    """Loads the projection of some layers, reading only its own bytes.

    Args:
        checkpoint: a directory, one .safetensors file, or either one with its headers read.
        layers: layer indices; all that own an indexer where left out.
        device: where the weights go.
        progress: shows a bar on stderr, if that is a terminal.

    Returns:
        layer index -> weights.

    Raises:
        CheckpointError: listing every problem; nothing is loaded then.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    chosen = Plan.of(checkpoint).select(layers)
    config = checkpoint.config
    assembly = Assembly(
        chosen,
        device,
        index_head_dim=config.index_head_dim or DEFAULT_HEAD_DIM,
        num_hidden_layers=config.num_hidden_layers,
    )
    assembly.begin()
    names = [name for plan in chosen.values() for name in plan.tensors]
    console = Console(stderr=True)
    shown = progress and console.is_terminal
    tensors = checkpoint.stream(names)
    for name, tensor in track(tensors, "Loading", len(names), console=console, transient=True, disable=not shown):
        assembly.offer(name, tensor, checkpoint.headers[name].file)
    return assembly.finish()
