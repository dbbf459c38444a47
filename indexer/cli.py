"""The command line. Exit codes: 0 good, 1 a kernel is wrong or a benchmark failed, 2 bad input.

torch, Triton and the kernels are imported inside the commands: `--help` should not wait for them, and `verify` must
choose between GPU and interpreter before Triton is imported.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from .tables import compiled_tables, layer_cells, layer_table, measurement_cells, shape_cell, tuned_tables

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
if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from ..kernels.gates import Row

Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="SHAPE",
        help="Sizes of the matrices, whatever the checkpoint: deepseek-v3.2 (D=128, H=64, K=7168) or glm-5 (D=128, "
        "H=32, K=6144); may be repeated. Default: both.",
    ),
]
# As in kernels.gates, which is not imported for a help.
_PAIRS = (
    '"BF16, BF16", "FP8 128x128, BF16", "FP8 128x128, FP8 128x128", "MXFP8, MXFP8", "NVFP4, BF16", "NVFP4, NVFP4", '
    '"MXFP4, BF16", "MXFP4, MXFP4"'
)
_PAIR = f"Encodings of wk and weights_proj, in quotes; may be repeated. Default: all. {_PAIRS}"
Pairs = Annotated[list[str] | None, typer.Option("--pair", metavar="PAIR", help=f"{_PAIR}.")]
CompiledPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--pair",
        metavar="PAIR",
        help=f'{_PAIR}; for activation="fp8" or "fp8_ue8m0": "W8A8, BF16", "W8A8 ue8m0, BF16".',
    ),
]
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
        _fail(str(error))
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
    from ..loading import CheckpointError, Problem
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
        _fail(str(CheckpointError(Problem(**problem) for problem in report["problems"])))


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
            _fail(f"verify: --m must be from 1 to 65536, got {count}")
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    from ..loading import Checkpoint, CheckpointError, Plan
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
        _fail(str(error))
    console.print(table)
    console.print(
        "error, ours: fp32 outputs of the kernels against fp64 of the decoded weights, relative to the largest one.\n"
        "error, upcast: the same for weights rounded to bf16 at load, then multiplied exactly: the rounding alone.",
        soft_wrap=True,
    )
    if not all_passed:
        console.print("A kernel is wrong.")
        raise typer.Exit(1)


@app.command("compile")
def compile_(
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="GPU", help="sm_80, sm_90, sm_100, sm_120, gfx942 or gfx950; may be repeated."),
    ] = None,
    all_targets: Annotated[bool, typer.Option("--all", help="All GPUs that there are gates for.")] = False,
    sm_count: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="SMs (compute units) of the GPU. Default: of the largest such GPU."),
    ] = None,
    shape: Shapes = None,
    pair: CompiledPairs = None,
    cache: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Keep the binaries, for servers that run with TRITON_CACHE_DIR=DIR."),
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="For servers with VLLM_BATCH_INVARIANT=1.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile the kernels for GPUs that need not be here, and check the binaries.

    One row for each kernel that dispatch picks, for the shapes and encodings of published models. Ends with 1 if
    anything is wrong with one. With --cache also for the outputs that vLLM asks for; a server with the same GPU and
    versions, and DIR at the same path, then compiles nothing of these. GPUs of one architecture differ in SMs, and
    kernels with them: --sm-count takes what torch.cuda.get_device_properties(0).multi_processor_count is on the server.
    """
    from dataclasses import asdict, replace

    from ..kernels import TARGETS
    from ..kernels.gates import CASES, COMPILED, SHAPES, rows
    from ..kernels.target import INTERPRETED
    from ..kernels.tuned import OUTS

    if INTERPRETED:
        _fail("compile: nothing is compiled under TRITON_INTERPRET=1; unset it")
    names = list(TARGETS) if all_targets else list(dict.fromkeys(target or ()))
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        _fail(f"compile: --target is one of {', '.join(TARGETS)}, or --all; got {', '.join(unknown) or 'none'}")
    if all_targets and target:
        _fail("compile: --all goes without --target")
    targets = [TARGETS[name] for name in names]
    if sm_count:
        if len(targets) != 1:
            _fail(f"compile: --sm-count goes with one --target, got {', '.join(names)}")
        targets = [replace(targets[0], sm_count=sm_count)]
    _check_names("compile", shape, pair, COMPILED)
    cases = list(product(shape or SHAPES, pair or COMPILED)) if shape or pair else CASES
    if cache:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _fail(f"compile: --cache {error}")
        os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    found = []
    with Console(stderr=True).status("Compiling") as status:
        for row in rows(targets, cases, OUTS if cache else ("fp32",), batch_invariant):
            found.append(row)
            status.update(f"{row.target}, {row.pair}, {row.kernel}")
        for name in names:
            if TARGETS[name].is_cuda(89):  # older ones have no FP8
                found += _vllms_gemm("compile", name)
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=2))
    else:
        _print_compiled(found)
    faulty = [row for row in found if row.faults]
    for row in faulty:
        _complain(f"{row.target}, {row.pair}, {row.kernel}, M = {row.m}: {'; '.join(row.faults)}")
    if faulty:
        raise typer.Exit(1)
    if cache and not as_json:
        console.print(
            f"Kept in {cache}. Start servers with TRITON_CACHE_DIR={cache.resolve()}; the path must be the same there.",
            soft_wrap=True,
        )


@app.command()
def tune(
    shape: Shapes = None,
    pair: Pairs = None,
    seconds: Annotated[
        float, typer.Option(min=1, max=86400, help="For each shape; where they run out, less is tried.")
    ] = 110,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to keep it. Default: the user's config folder.")
    ] = None,
) -> None:
    """Measure which kernel is fastest on this GPU, for 1 to 16384 rows, and keep a table of it.

    From then on processes on such a GPU, with the same versions of indexproj, torch and Triton, run what was fastest;
    where weights are BF16, that may be torch's GEMM. Entries for other shapes and pairs stay, and so do those for which
    more kernels were tried then. What --output names is used with INDEXPROJ_TUNED=FILE. Ends with 1 if a kernel is
    wrong.
    """
    import torch
    from rich.progress import Progress

    from ..kernels.gates import PAIRS, SHAPES
    from ..kernels.target import INTERPRETED, target_of
    from ..kernels.tuned import Case, Entry, Table, default_path, versions
    from . import tune as module

    _check_names("tune", shape, pair, PAIRS)
    if INTERPRETED or not torch.cuda.is_available():
        _fail(f"tune: measures on a GPU, and {'TRITON_INTERPRET=1 is set' if INTERPRETED else 'there is none here'}")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    entries: dict[Case, Entry] = {}
    try:
        path = output or default_path(gpu)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            entries |= Table.read(path, gpu, target_of(device)).by_case
    except ValueError as error:
        _complain(f"tune: replaces what is there: {error}")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        _fail(f"tune: {error}")
    for name in dict.fromkeys(shape or SHAPES):
        tasks = [module.Task(SHAPES[name], PAIRS[kinds]) for kinds in dict.fromkeys(pair or PAIRS)]
        found = []
        with Progress(console=Console(stderr=True), transient=True) as progress:
            report = partial(_update, progress, progress.add_task(name), name)
            try:
                for entry in module.tune(tasks, device, seconds, report=report):
                    found.append(entry)
            except module.WrongError as error:
                _complain(f"tune: {error}")
                raise typer.Exit(1) from error
            except RuntimeError as error:
                _fail(f"tune: {error}")
            finally:  # what was measured is kept, but not in place of what was measured at more length
                for entry in found:
                    if entry.case not in entries or entries[entry.case].tried <= entry.tried:
                        entries[entry.case] = entry
                try:
                    if found:
                        Table(gpu, date.today().isoformat(), versions(), tuple(entries.values())).write(path)
                except OSError as error:
                    _fail(f"tune: {error}")
        for table in tuned_tables(name, found):
            console.print(table)
    console.print(f"Kept in {path}.", soft_wrap=True)


def _update(progress: Progress, bar: TaskID, name: str, doing: str, done: int, of: int) -> None:
    progress.update(bar, description=f"{name}, {doing}", completed=done, total=of)


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what pytest-benchmark writes.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a PNG of each table there.")] = None,
) -> None:
    """Run the benchmarks: the projection against what else computes it, loading, the host, compilation.

    Without a GPU, the projection is not measured; instead, what the compiler made of the kernels for an H100 is shown
    beside vLLM's GEMM, where vLLM is installed. Where something fails, the rest is shown all the same, and the command
    ends with 1.
    """
    import torch

    from ..kernels.target import INTERPRETED
    from . import bench as module

    if INTERPRETED:
        _fail("bench: nothing is timed in Triton's interpreter; unset TRITON_INTERPRET")
    try:
        if plot:
            module.check_plotting(plot)
        found = module.run(quick)
    except RuntimeError as error:
        _fail(f"bench: {error}")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for table in module.tables(found):
            console.print(table)
        console.print("Medians; in parentheses quartiles, and behind them times the first row.")
        if not torch.cuda.is_available():
            _print_static(quick)
    if plot:
        try:
            paths = module.plot(found, plot)
        except OSError as error:
            _fail(f"bench: --plot: {error}")
        Console(stderr=True, soft_wrap=True).print(f"Plots: {', '.join(map(str, paths))}")
    if found["failed"]:
        _complain(f"bench: failed, see above: {', '.join(found['failed'])}")
        raise typer.Exit(1)


def _print_static(quick: bool) -> None:
    """What compiled kernels show, in place of times on a GPU."""
    from ..kernels import TARGETS
    from ..kernels.gates import CASES, rows

    console.print("No GPU here: the projection was not measured. What the compiler made of the kernels for an H100:")
    cases = [("deepseek-v3.2", "FP8 128x128, BF16")] if quick else CASES
    _print_compiled([*rows([TARGETS["sm_90"]], cases), *_vllms_gemm("bench", "sm_90")])


def _vllms_gemm(command: str, target: str) -> list[Row]:
    from .rival import block_scaled_gemm

    try:
        return block_scaled_gemm(target, (1, 64, 65536))
    except RuntimeError as error:
        _complain(f"{command}: {error}")
        return []


def _print_compiled(found: list[Row]) -> None:
    for table in compiled_tables(found):
        console.print(table)
    console.print(
        "M: the largest one with this kernel. Per SM: programs that fit. Shared: bytes. MMA: matrix instructions.\n"
        "W and x: how often the programs of a launch ask for each byte; caches answer most. KB each: of a program.\n"
        "Loads: instructions x bytes per thread. vLLM's GEMM multiplies wk alone.",
        soft_wrap=True,
    )


def _check_names(command: str, shape: list[str] | None, pair: list[str] | None, pairs: Iterable[str]) -> None:
    from ..kernels.gates import SHAPES

    for option, chosen, known in (("--shape", shape, SHAPES), ("--pair", pair, pairs)):
        if strange := [name for name in chosen or () if name not in known]:
            _fail(f"{command}: {option} is one of {'; '.join(known)}; got {'; '.join(strange)}")


def _fail(message: str) -> None:
    _complain(message)
    raise typer.Exit(2)


def _complain(message: str) -> None:
    Console(stderr=True, highlight=False, markup=False, soft_wrap=True).print(message, style="red")


def main() -> None:
    """The `indexproj` command."""
    app()
