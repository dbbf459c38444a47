"""Reports what a checkpoint holds of the projection and whether it loads."""

import math
import os
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from ...loading import Checkpoint, CheckpointError, MatrixPlan, Plan, Problem
from ...loading.config import CONFIG
from ...loading.problems import ranges


def audit(path: Path, index_head_dim: int | None = None) -> dict[str, Any]:
    """The report that audit.schema.json describes. Its problems and headers are objects; JSON has their attributes.

    Reads headers only. index_head_dim is D, to split `wk_weights_proj`; from config.json by default.
    """
    report: dict[str, Any] = {"checkpoint": str(path), "loads": False, "layers": [], "counts": None, "warnings": []}
    try:
        checkpoint = Checkpoint(path)
    except CheckpointError as error:
        return {**report, "problems": error.problems}
    plan = Plan.of(checkpoint, index_head_dim)
    report["loads"] = not plan.problems
    for number, layer in plan.layers.items():
        loads = not layer.problems and not plan.file_problems
        flags = {"is_mtp": layer.is_mtp, "runs": plan.runs(number), "loads": loads}
        matrices = {"wk": _matrix(layer.wk), "weights_proj": _matrix(layer.gate)}
        report["layers"].append({"layer": number, **flags, **matrices})
    report["counts"] = {
        "projection_tensors": len(checkpoint.headers),
        "other_indexer_tensors": len(checkpoint.neighbours),
        "all_tensors": checkpoint.tensors,
        "unread_shards": len(checkpoint.unread),
    }
    report |= {"warnings": [*plan.warnings], "problems": plan.problems}
    if not os.path.lexists(checkpoint.path / CONFIG):
        advice = "sizes, missing layers, rotations and unusual scale formats are not checked"
        missing = Problem(CONFIG, "", "the model's config beside the tensors", "no such file", advice)
        report["warnings"].append(missing)
    return report


def _matrix(plan: MatrixPlan) -> dict[str, Any]:
    encoding, layout = plan.encoding, plan.layout
    return {
        "encoding": encoding.name if encoding else None,
        "in_memory": encoding and ("bf16" if encoding.exact else "native"),
        "shape": list(plan.shape) or None,
        "kept_bytes": layout.nbytes if layout else 0,
        "upcast_bytes": 2 * math.prod(plan.shape) if layout else 0,
        "tensors": list(plan.headers.values()),
    }


def audit_table(layers: list[dict[str, Any]]) -> Table:
    """The layers of a report; layers that follow each other and are alike share a row."""
    table = new_table("layer", "wk", "weights_proj", "MB", "MB in BF16", "D, H, K", "runs", "loads")
    rows: list[tuple[tuple[Any, ...], int]] = []
    for layer in layers:
        wk, gate = layer["wk"], layer["weights_proj"]
        names = (f"{m['encoding'] or '?'}{' to BF16' if m['in_memory'] == 'bf16' else ''}" for m in (wk, gate))
        sizes = [f"{(wk[key] + gate[key]) / 1e6:.2f}" for key in ("kept_bytes", "upcast_bytes")]
        shape = f"{wk['shape'][0]}, {gate['shape'][0]}, {wk['shape'][1]}" if wk["shape"] and gate["shape"] else "-"
        flags = ("yes" if layer[key] else "no" for key in ("runs", "loads"))
        # Equal in a run of consecutive layers: the layer less its position.
        rows.append(((layer["layer"] - len(rows), layer["is_mtp"], *names, *sizes, shape, *flags), layer["layer"]))
    for (_, is_mtp, *cells), run in groupby(rows, key=lambda row: row[0]):
        number = ranges(layer for _, layer in run) + " (MTP)" * is_mtp
        table.add_row(number, *map(str, cells))
    return table


def new_table(*columns: str) -> Table:
    """An empty table; the first three columns are left-aligned."""
    table = Table(show_edge=False, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < 3 else "right", no_wrap=True)
    return table
