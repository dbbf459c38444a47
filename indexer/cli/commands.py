"""The commands fixture, audit and verify.

Commands import torch, Triton and the kernels when they run: `--help` does not wait for them, and `verify` must choose
between GPU and interpreter before Triton is imported.
"""

import json
import logging
import os
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from ..models import MODELS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 success, 1 a kernel is wrong or fails a check, 2 bad input or something that could not run.",
)
# Tables need up to 100 columns. A narrower terminal wraps lines, which is better than truncated numbers.
console = Console(width=max(100, shutil.get_terminal_size().columns), highlight=False, markup=False)

CheckpointPath = Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint directory or .safetensors file.")]
HeadDim = Annotated[
    int | None, typer.Option(metavar="D", help="Rows of wk in wk_weights_proj. Default: that of config.json.")
]
DEFAULT_MS = [1, 17, 100]


@app.callback(invoke_without_command=True)
def _options(show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Audit, verify, compile, tune and benchmark the indexer projection of DeepSeek Sparse Attention."""
    if show:
        typer.echo(f"indexproj {version('indexproj')}")
        raise typer.Exit


@app.command()
def fixture(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=f"One of {', '.join(MODELS)}.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Output directory; must be empty or new.")],
    layers: Annotated[int | None, typer.Option(help="Number of indexer layers, from the first. Default: all.")] = None,
) -> None:
    """Write a checkpoint with random values in a published layout; always the same bytes."""
    from .fixture import write_fixture

    try:
        files = write_fixture(model, directory, layers)
    except (ValueError, OSError) as error:
        fail(str(error))
    console.print(f"Wrote {model} to {directory}: {len(files)} shards.", soft_wrap=True)


@app.command()
def audit(
    checkpoint: CheckpointPath,
    index_head_dim: HeadDim = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON; audit.schema.json describes it.")] = False,
) -> None:
    """Show what a checkpoint holds and whether it loads.

    Reads headers only; values are checked at load. Encodings marked "to BF16" are decoded and rounded at load, all
    others keep their codes in memory. "runs" is "no" for a layer that reuses the tokens selected by an earlier one.
    """
    from ...loading import CheckpointError
    from ...loading.problems import summarize
    from . import audit as module

    report = module.audit(checkpoint, index_head_dim)
    if as_json:
        typer.echo(json.dumps(report, indent=2, default=vars))
        raise typer.Exit(0 if report["loads"] else 2)
    if counts := report["counts"]:
        console.print(module.audit_table(report["layers"]))
        console.print(
            f"Layers with an indexer: {len(report['layers'])}. Tensors: {counts['all_tensors']}, of the projection "
            f"{counts['projection_tensors']}, of indexers besides {counts['other_indexer_tensors']}.",
            soft_wrap=True,
        )
        if counts["unread_shards"]:
            console.print(f"{counts['unread_shards']} shards without projection tensors are missing or unreadable.")
    for warning in summarize(report["warnings"]):
        complain(f"warning: {warning}", style="yellow")
    if report["problems"]:
        fail(str(CheckpointError(report["problems"])))


@app.command()
def verify(
    checkpoint: CheckpointPath,
    layer: Annotated[list[int] | None, typer.Option(metavar="N", help="Layer; repeatable. Default: all.")] = None,
    m: Annotated[list[int], typer.Option(metavar="N", min=1, max=65536, help="Rows of x; repeatable.")] = DEFAULT_MS,
    index_head_dim: HeadDim = None,
) -> None:
    """Run the kernels on a checkpoint and compare with fp64.

    The verdict is "ok" if the kernel's own error is at most 2e-6 of the largest output. Without a GPU, the same kernels
    run in Triton's interpreter.
    """
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    from ...kernels.target import INTERPRETED
    from ...loading import CheckpointError
    from . import verify as module

    found = []
    if logging.lastResort:  # prints warnings of loading, without saying that they are some
        logging.lastResort.setFormatter(logging.Formatter("warning: %(message)s"))
    try:
        with Console(stderr=True).status("Loading") as status:
            for measurement in module.verify(checkpoint, m, device, layer, index_head_dim):
                found.append(measurement)
                status.update(f"Layer {measurement.layer}, M = {measurement.m}")
    except (CheckpointError, RuntimeError) as error:  # RuntimeError: an unsupported GPU, or no memory left
        fail(str(error))
    where = "Triton's interpreter, with configs for an H100" if INTERPRETED else torch.cuda.get_device_name()
    console.print(f"The kernels ran on: {where}")
    console.print(module.verify_table(found))
    console.print(
        "error: fp32 outputs against fp64 with the values on disk, relative to the largest output.\n"
        "of loading: the part of it that comes from rounding at load; the verdict is on the rest.\n"
        "if BF16: the error of exact products with weights rounded to BF16."
    )
    if not all(measurement.passed for measurement in found):
        console.print("A kernel is wrong.")
        raise typer.Exit(1)


def fail(message: str) -> NoReturn:
    complain(message)
    raise typer.Exit(2)


def complain(message: str, style: str = "red") -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message, style=style)
