"""The lab's commands: compile, tune and bench."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..indexer.cli.commands import app, complain, console, fail
from .tables import compiled_tables, tuned_tables

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from .gates import Row

Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        metavar="SHAPE",
        help="Sizes of the matrices, whatever the checkpoint: deepseek-v3.2 (D=128, H=64, K=7168) or glm-5 (D=128, "
        "H=32, K=6144); may be repeated. Default: both.",
    ),
]
# As in gates.py, which is not imported for a help.
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
    from ..kernels.target import INTERPRETED
    from ..kernels.tuned import OUTS
    from .gates import CASES, COMPILED, SHAPES, rows

    if INTERPRETED:
        fail("compile: nothing is compiled under TRITON_INTERPRET=1; unset it")
    names = list(TARGETS) if all_targets else list(dict.fromkeys(target or ()))
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        fail(f"compile: --target is one of {', '.join(TARGETS)}, or --all; got {', '.join(unknown) or 'none'}")
    if all_targets and target:
        fail("compile: --all goes without --target")
    targets = [TARGETS[name] for name in names]
    if sm_count:
        if len(targets) != 1:
            fail(f"compile: --sm-count goes with one --target, got {', '.join(names)}")
        targets = [replace(targets[0], sm_count=sm_count)]
    _check_names("compile", shape, pair, COMPILED)
    cases = list(product(shape or SHAPES, pair or COMPILED)) if shape or pair else CASES
    if cache:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"compile: --cache {error}")
        os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    found = []
    with Console(stderr=True).status("Compiling") as status:
        for row in rows(targets, cases, OUTS if cache else ("fp32",), batch_invariant):
            found.append(row)
            status.update(f"{row.target}, {row.pair}, {row.kernel}")
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=2))
    else:
        _print_compiled(found)
    faulty = [row for row in found if row.faults]
    for row in faulty:
        complain(f"{row.target}, {row.pair}, {row.kernel}, M = {row.m}: {'; '.join(row.faults)}")
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

    from ..kernels.target import INTERPRETED, target_of
    from ..kernels.tuned import Case, Entry, Table, default_path, versions
    from . import tune as module
    from .gates import PAIRS, SHAPES

    _check_names("tune", shape, pair, PAIRS)
    if INTERPRETED or not torch.cuda.is_available():
        fail(f"tune: measures on a GPU, and {'TRITON_INTERPRET=1 is set' if INTERPRETED else 'there is none here'}")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    entries: dict[Case, Entry] = {}
    try:
        path = output or default_path(gpu)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            entries |= Table.read(path, gpu, target_of(device)).by_case
    except ValueError as error:
        complain(f"tune: replaces what is there: {error}")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        fail(f"tune: {error}")
    for name in dict.fromkeys(shape or SHAPES):
        tasks = [module.Task(SHAPES[name], PAIRS[kinds]) for kinds in dict.fromkeys(pair or PAIRS)]
        found = []
        with Progress(console=Console(stderr=True), transient=True) as progress:
            report = partial(_update, progress, progress.add_task(name), name)
            try:
                for entry in module.tune(tasks, device, seconds, report=report):
                    found.append(entry)
            except module.WrongError as error:
                complain(f"tune: {error}")
                raise typer.Exit(1) from error
            except RuntimeError as error:
                fail(f"tune: {error}")
            finally:  # what was measured is kept, but not in place of what was measured at more length
                for entry in found:
                    if entry.case not in entries or entries[entry.case].tried <= entry.tried:
                        entries[entry.case] = entry
                try:
                    if found:
                        Table(gpu, date.today().isoformat(), versions(), tuple(entries.values())).write(path)
                except OSError as error:
                    fail(f"tune: {error}")
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
    from . import report as module

    if INTERPRETED:
        fail("bench: nothing is timed in Triton's interpreter; unset TRITON_INTERPRET")
    try:
        if plot:
            module.check_plotting(plot)
        found = module.run(quick)
    except RuntimeError as error:
        fail(f"bench: {error}")
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
            fail(f"bench: --plot: {error}")
        Console(stderr=True, soft_wrap=True).print(f"Plots: {', '.join(map(str, paths))}")
    if found["failed"]:
        complain(f"bench: failed, see above: {', '.join(found['failed'])}")
        raise typer.Exit(1)


def _print_static(quick: bool) -> None:
    """What compiled kernels show, in place of times on a GPU."""
    from ..kernels import TARGETS
    from .gates import CASES, rows

    console.print("No GPU here: the projection was not measured. What the compiler made of the kernels for an H100:")
    cases = [("deepseek-v3.2", "FP8 128x128, BF16")] if quick else CASES
    _print_compiled(list(rows([TARGETS["sm_90"]], cases)))


def _print_compiled(found: list[Row]) -> None:
    for table in compiled_tables(found):
        console.print(table)
    console.print(
        "M: the largest one with this kernel. Per SM: programs that fit. Shared: bytes. MMA: matrix instructions.\n"
        "W and x: how often the programs of a launch ask for each byte; caches answer most. KB each: of a program.\n"
        "Loads: instructions x bytes per thread.",
        soft_wrap=True,
    )


def _check_names(command: str, shape: list[str] | None, pair: list[str] | None, pairs: Iterable[str]) -> None:
    from .gates import SHAPES

    for option, chosen, known in (("--shape", shape, SHAPES), ("--pair", pair, pairs)):
        if strange := [name for name in chosen or () if name not in known]:
            fail(f"{command}: {option} is one of {'; '.join(known)}; got {'; '.join(strange)}")
