"""What a checkpoint holds of the projection and whether it loads, as plain data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...loading import Checkpoint, CheckpointError, LayerPlan, MatrixPlan, Plan


def audit(path: Path) -> dict[str, Any]:
    """Reads headers only; what is wrong with them is part of the result.

    Returns:
        What audit.schema.json describes.
    """
    report: dict[str, Any] = {"checkpoint": str(path), "loads": False, "layers": [], "counts": None}
    try:
        checkpoint = Checkpoint(path)
    except CheckpointError as error:
        return {**report, "problems": [dataclasses.asdict(problem) for problem in error.problems]}
    plan = Plan.of(checkpoint)
    return {
        **report,
        "loads": not plan.problems,
        "layers": [
            {
                **describe(layer),
                "runs": plan.runs(layer.layer),
                "loads": not layer.problems and not plan.file_problems,
            }
            for layer in plan.layers.values()
        ],
        "counts": {
            "projection_tensors": len(checkpoint.headers),
            "other_indexer_tensors": len(checkpoint.neighbours),
            "all_tensors": checkpoint.tensors,
            "unread_shards": len(checkpoint.unread),
        },
        "problems": [dataclasses.asdict(problem) for problem in plan.problems],
    }


def describe(plan: LayerPlan) -> dict[str, Any]:
    """One layer of the report."""
    return {
        "layer": plan.layer,
        "is_mtp": plan.is_mtp,
        "loads": not plan.problems,
        "wk": _matrix(plan.wk),
        "weights_proj": _matrix(plan.gate),
    }


def _matrix(plan: MatrixPlan) -> dict[str, Any]:
    encoding = plan.encoding
    return {
        "encoding": encoding.name if encoding else None,
        "in_memory": None if encoding is None else "native" if encoding.is_native else "bf16",
        "shape": list(plan.shape) if plan.layout else None,
        "kept_bytes": plan.kept_bytes,
        "upcast_bytes": plan.upcast_bytes,
        "tensors": [dataclasses.asdict(header) for header in plan.headers.values()],
    }
