"""The command line. Exit codes: 0 good, 1 a kernel is wrong, 2 bad input.

torch, Triton and the kernels are imported inside the commands: `--help` should not wait for them, and `verify` must
choose between GPU and interpreter before Triton is imported.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from ..loading import LayerPlan
    from .verify import Measurement

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="The indexer projection of DeepSeek Sparse Attention: look at a checkpoint, check the kernels on it.",
)
# Piped output is for files and logs, which have no 80 columns.
console = Console(width=None if sys.stdout.isatty() else 140, highlight=False, markup=False)

CheckpointPath = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint directory, or one .safetensors file.")]


@app.command()
def fixture(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="deepseek-v3.2, glm-5-bf16 or glm-5.2-fp8.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; must be empty.")],
    layers: Annotated[int | None, typer.Option(help="Number of indexer layers, the first ones. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    power_of_two_scales: Annotated[
        bool, typer.Option("--power-of-two-scales", help='Round FP8 scales up to powers of two ("scale_fmt": "ue8m0").')
    ] = False,
) -> None:
    """Write a made-up checkpoint, laid out like a published one."""
    from .fixture import write_fixture

    try:
        files = write_fixture(kind, directory, layers, seed, power_of_two_scales)
    except ValueError as error:
        _fail(str(error))
    size = sum((directory / file).stat().st_size for file in files)
    console.print(f"Wrote {kind} to {directory}: {len(files)} shards, {_megabytes(size)}.")


@app.command()
def audit(checkpoint: CheckpointPath) -> None:
    """Say what a checkpoint holds and whether it loads."""
    from ..loading import Checkpoint, CheckpointError, Plan

    try:
        census = Checkpoint(checkpoint)
    except CheckpointError as error:
        _fail(str(error))
    plan = Plan.of(census)
    table = Table("layer", "wk", "weights_proj")
    for column in ("bytes kept", "if upcast", "D, H, K", "loads"):
        table.add_column(column, justify="right")
    for layer in plan.layers.values():
        shape, loads = ("-", "no") if layer.problems else (", ".join(map(str, layer.shape)), "as stored")
        table.add_row(*_layer_cells(layer), shape, loads)
    if plan.layers:
        console.print(table)
    console.print(
        f"{len(plan.layers)} layers with an indexer; {len(census.headers)} tensors of the projection, "
        f"{census.indexer_tensors} more of the indexers, {census.tensors} in all."
    )
    if census.absent:
        console.print(f"{len(census.absent)} shards are not here; the index puts nothing of the projection there.")
    if plan.problems:
        _fail(str(CheckpointError(plan.problems)))


@app.command()
def verify(
    checkpoint: CheckpointPath,
    layer: Annotated[list[int] | None, typer.Option(help="Layer to verify; may be repeated. Default: all.")] = None,
    m: Annotated[list[int] | None, typer.Option(help="Rows of x; may be repeated. Default: 1, 17 and 100.")] = None,
) -> None:
    """Run the kernels on a checkpoint and compare with fp64.

    Without a GPU the same kernels run in Triton's interpreter.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    from ..loading import Checkpoint, CheckpointError, Plan
    from .verify import MAX_ERROR, where
    from .verify import verify as run

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = m or [1, 17, 100]
    if min(rows) < 1:
        _fail(f"verify: --m must be at least 1, got {min(rows)}")
    table = Table("layer", "wk", "weights_proj", title="Relative error against fp64 of the decoded weights")
    for column in (
        "bytes kept",
        "if upcast",
        "M",
        "kernel",
        "error, ours",
        "error, upcast",
        "ours is closer",
        "verdict",
    ):
        table.add_column(column, justify="right")
    measured = []
    try:
        plans = Plan.of(Checkpoint(checkpoint)).select(layer)
        console.print(where(device))
        with console.status("Loading") as status:
            for measurement in run(checkpoint, plans, rows, device):
                measured.append(measurement)
                status.update(f"Layer {measurement.plan.layer}, M = {measurement.m}")
                table.add_row(*_layer_cells(measurement.plan), *_measurement_cells(measurement))
    except CheckpointError as error:
        _fail(str(error))
    console.print(table)
    console.print(
        "Ours: fp32 outputs of the kernels, weights kept as stored. Upcast: FP8 weights rounded to bf16 at load, then"
        " multiplied exactly, so that nothing but that rounding is seen.",
        soft_wrap=True,
    )
    if not all(measurement.passed for measurement in measured):
        console.print(f"A kernel is wrong: its error is above {MAX_ERROR:.0e}.")
        raise typer.Exit(1)


def _layer_cells(plan: LayerPlan) -> tuple[str, ...]:
    name = f"{plan.layer} (MTP)" if plan.is_mtp else f"{plan.layer}"
    encodings = (matrix.encoding.name if matrix.encoding else "?" for matrix in (plan.wk, plan.gate))
    kept, upcast = (
        "-" if plan.problems else _megabytes(size)
        for size in (plan.wk.kept_bytes + plan.gate.kept_bytes, plan.wk.upcast_bytes + plan.gate.upcast_bytes)
    )
    return (name, *encodings, kept, upcast)


def _measurement_cells(measurement: Measurement) -> tuple[str, ...]:
    ours, upcast = measurement.error, measurement.upcast_error
    closer = f"{upcast / ours:,.0f} times" if upcast > ours > 0 else "-"
    verdict = "ok" if measurement.passed else "WRONG"
    return f"{measurement.m}", measurement.regime, f"{ours:.1e}", f"{upcast:.1e}", closer, verdict


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB"


def _fail(message: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(message, style="red", markup=False)
    raise typer.Exit(2)


def main() -> None:
    """The `indexproj` command."""
    app()
