"""The command line. Exit codes: 0 good, 1 a kernel is wrong or a benchmark failed, 2 bad input.

torch, Triton and the kernels are imported inside the commands: `--help` should not wait for them, and `verify` must
choose between GPU and interpreter before Triton is imported.
"""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from .tables import layer_cells, layer_table, measurement_cells, shape_cell

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The indexer projection of DeepSeek Sparse Attention: audit, check, compile, time and tune.",
    epilog="Exit codes: 0 all is well, 1 a kernel is wrong or a benchmark failed, 2 bad input.",
)
# Never narrower than the tables: a long line that the terminal folds is better than a number that is cut.
console = Console(width=max(144, shutil.get_terminal_size().columns), highlight=False, markup=False)

CheckpointPath = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint directory, or one .safetensors file.")]
Kind = Literal["deepseek-v3.2", "glm-5-bf16", "glm-5.2-fp8"]


def _version(is_asked: bool) -> None:
    if is_asked:
        print(f"indexproj {version('indexproj')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


@app.command()
def fixture(
    kind: Annotated[Kind, typer.Argument(metavar="KIND", help="Checkpoint: deepseek-v3.2, glm-5-bf16 or glm-5.2-fp8.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to write; must be empty.")],
    layers: Annotated[int | None, typer.Option(help="Number of indexer layers, the first ones. Default: all.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    power_of_two_scales: Annotated[
        bool, typer.Option("--power-of-two-scales", help='Round FP8 scales up to powers of two ("scale_fmt": "ue8m0").')
    ] = False,
) -> None:
    """Write a made-up checkpoint, laid out like a published one.

    compile and tune know the first kind's shape as deepseek-v3.2 too, and that of the other two as glm-5.
    """
    from .fixture import write_fixture

    try:
        files = write_fixture(kind, directory, layers, seed, power_of_two_scales)
    except (ValueError, OSError) as error:
        fail(str(error))
    size = sum((directory / file).stat().st_size for file in files)
    console.print(f"Wrote {kind} to {directory}: {len(files)} shards, {size / 1e6:.2f} MB.", soft_wrap=True)


@app.command()
def audit(
    checkpoint: CheckpointPath,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what audit.schema.json in the package describes.")
    ] = False,
) -> None:
    """Say what a checkpoint holds and whether it loads.

    Only headers are read; values are checked when they are loaded. An encoding without a note stays as it is in memory;
    "to BF16" means that it is decoded and rounded when it is loaded. A layer that does not run its indexer reuses the
    tokens that an earlier one picked.
    """
    from ...loading import CheckpointError, Problem
    from .audit import audit as run

    report = run(checkpoint)
    if as_json:
        print(json.dumps(report, indent=2))
        raise typer.Exit(0 if report["loads"] else 2)
    table = layer_table("D, H, K", "runs", "loads")
    for layer in report["layers"]:
        runs, loads = ("yes" if layer[key] else "no" for key in ("runs", "loads"))
        table.add_row(*layer_cells(layer), shape_cell(layer), runs, loads)
    if report["layers"]:
        console.print(table)
    if counts := report["counts"]:
        console.print(
            f"Layers with an indexer: {len(report['layers'])}. "
            f"Tensors of the projection: {counts['projection_tensors']}, "
            f"others of the indexers: {counts['other_indexer_tensors']}, in all: {counts['all_tensors']}.",
            soft_wrap=True,
        )
        if counts["unread_shards"]:
            console.print(
                "Shards that are missing or unreadable, and hold nothing of the projection: "
                f"{counts['unread_shards']}.",
                soft_wrap=True,
            )
    if report["problems"]:
        fail(str(CheckpointError(Problem(**problem) for problem in report["problems"])))


@app.command()
def verify(
    checkpoint: CheckpointPath,
    layer: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Layer to verify; may be repeated. Default: all.")
    ] = None,
    m: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Rows of x; may be repeated. Default: 1, 17 and 100.")
    ] = None,
) -> None:
    """Run the kernels on a checkpoint and compare with fp64.

    A result is ok if its error is at most 2e-6 of the largest output. Without a GPU the same kernels run in Triton's
    interpreter.
    """
    rows = list(dict.fromkeys(m or (1, 17, 100)))
    for count in rows:
        if not 1 <= count <= 65536:
            fail(f"verify: --m must be from 1 to 65536, got {count}")
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    from ...loading import Checkpoint, CheckpointError, Plan
    from .audit import describe
    from .verify import verify as run
    from .verify import where

    table = layer_table("M", "kernel", "error, ours", "error, upcast", "closer by", "verdict")
    all_passed = True
    try:
        census = Checkpoint(checkpoint)
        plans = Plan.of(census).select(layer)
        console.print(where(device))
        with console.status("Loading") as status:
            for measurement in run(census, plans, rows, device):
                all_passed &= measurement.passed
                status.update(f"Layer {measurement.plan.layer}, M = {measurement.m}")
                table.add_row(*layer_cells(describe(measurement.plan)), *measurement_cells(measurement))
    except CheckpointError as error:
        fail(str(error))
    console.print(table)
    console.print(
        "error, ours: fp32 outputs of the kernels against fp64 of the decoded weights, relative to the largest one.\n"
        "error, upcast: the same for weights rounded to bf16 at load, then multiplied exactly: the rounding alone.",
        soft_wrap=True,
    )
    if not all_passed:
        console.print("A kernel is wrong.")
        raise typer.Exit(1)


def fail(message: str) -> None:
    complain(message)
    raise typer.Exit(2)


def complain(message: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message, style="red")
