"""The commands compile, tune and bench."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from ..indexer.cli.commands import app, complain, console, fail
from ..indexer.models import PAIRS, SHAPES

if TYPE_CHECKING:
    from .gates import Row
    from .tune import Entry

W8A8_WK = "FP8 128x128"  # the format of wk that `activation` is defined for
_SHAPES = "; ".join(f"{name} (D={d}, H={h}, K={k})" for name, (d, h, k) in SHAPES.items())
_SHAPE_HELP = f"Shape of a published model; repeatable. Default: all. {_SHAPES}."
_PAIR_HELP = f"Formats of wk and weights_proj, quoted; repeatable. Default: all. {'; '.join(PAIRS)}."
_GPU_HELP = "sm_80, sm_90, sm_100, sm_120, gfx942 or gfx950; repeatable."
_ACTIVATION_HELP = f"Activation for wk in {W8A8_WK} (W8A8). Default: none (W8A16), or all without --shape and --pair."
Shapes = Annotated[list[str] | None, typer.Option("--shape", metavar="SHAPE", help=_SHAPE_HELP)]
Pairs = Annotated[list[str] | None, typer.Option("--pair", metavar="PAIR", help=_PAIR_HELP)]


@app.command("compile")
def compile_(
    target: Annotated[list[str] | None, typer.Option(metavar="GPU", help=_GPU_HELP)] = None,
    all_targets: Annotated[bool, typer.Option("--all", help="All of these GPUs.")] = False,
    sm_count: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="SMs or compute units. Default: those of the largest such GPU."),
    ] = None,
    shape: Shapes = None,
    pair: Pairs = None,
    activation: Annotated[Literal["fp8", "fp8_ue8m0"] | None, typer.Option(help=_ACTIVATION_HELP)] = None,
    cache: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the binaries for servers with TRITON_CACHE_DIR=DIR.")
    ] = None,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="For servers with VLLM_BATCH_INVARIANT=1.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compile the kernels for any GPU and check the binaries.

    Prints one row per kernel that dispatch selects for published shapes and formats. Exits with 1 if a check fails.
    --cache also compiles for the bf16 output that vLLM uses. A server with the same GPU and versions, and with DIR at
    the same path, then compiles none of these kernels. The number of SMs differs between GPUs of one architecture and
    affects dispatch. Set --sm-count to the server's torch.cuda.get_device_properties(0).multi_processor_count.
    """
    from ..kernels import TARGETS
    from ..kernels.dispatch import OUTS
    from ..kernels.target import INTERPRETED
    from .gates import CASES, Case, rows

    if INTERPRETED:
        fail("compile: TRITON_INTERPRET=1 disables compilation; unset it")
    names = list(TARGETS) if all_targets else list(dict.fromkeys(target or ()))
    unknown = [name for name in names if name not in TARGETS]
    if unknown or not names:
        fail(f"compile: --target must be one of {', '.join(TARGETS)}, or --all; got {', '.join(unknown) or 'none'}")
    if all_targets and target:
        fail("compile: --all and --target exclude each other")
    if sm_count and len(names) > 1:
        fail(f"compile: --sm-count needs exactly one --target, got {', '.join(names)}")
    targets = [replace(TARGETS[name], sm_count=sm_count or TARGETS[name].sm_count) for name in names]
    _check_names("compile", shape, pair)
    cases = CASES
    if shape or pair or activation:
        pairs = pair or [name for name in PAIRS if not activation or name.startswith(W8A8_WK)]
        if activation and not all(name.startswith(W8A8_WK) for name in pairs):
            fail(f"compile: --activation needs wk in {W8A8_WK}, got --pair {'; '.join(pairs)}")
        cases = [Case(*case, activation) for case in product(shape or SHAPES, pairs)]
    if cache:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"compile: --cache: {error}")
        os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
    found = []
    with Console(stderr=True).status("Compiling") as status:
        for row in rows(targets, cases, OUTS if cache else ("fp32",), batch_invariant):
            found.append(row)
            status.update(f"{_title(row)}, {row['kernel']}")
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_compiled(found)
    faulty = [row for row in found if row["faults"]]
    for row in faulty:
        complain(f"{_title(row)}, {row['kernel']}, M = {row['m']}: {'; '.join(row['faults'])}")
    if faulty:
        raise typer.Exit(1)
    if cache and not as_json:
        text = (
            f"Kept in {cache}. Start servers with TRITON_CACHE_DIR={cache.resolve()}; the path must be the same there."
        )
        console.print(text, soft_wrap=True)


def _title(row: Row) -> str:
    activation = f", activation {row['activation']}" if row["activation"] else ""
    return f"{row['target']}, {row['shape']}, {row['pair']}{activation}, gate in {row['gate']}"


def _print_compiled(found: list[Row]) -> None:
    keys = "m", "programs", "per_sm", "registers", "shared_memory", "mma", "step", "load_groups"
    for title, group in groupby(found, _title):
        headers = (
            "kernel",
            "M",
            "programs",
            "per SM",
            "regs",
            "shared",
            "MMA",
            "step",
            "trips",
            "MB",
            "KB",
            "~us",
            "check",
        )
        table = _table(title, *headers)
        for row in group:
            sizes = f"{row['bytes'] / 1e6:.1f}", f"{row['reduced_bytes'] / 1e3:.0f}"
            check = "failed" if row["faults"] else "ok"
            table.add_row(row["kernel"], *(str(row[key]) for key in keys), *sizes, str(row["estimate_us"]), check)
        console.print(table)
    console.print(
        "M: the largest with this kernel. programs: of a launch with M rows. per SM: programs that fit on\n"
        "one SM. regs: per thread. shared: bytes of shared memory. MMA: matrix instructions. step: instructions\n"
        "per step of K. trips: groups of loads. MB: weights and x that all programs read. KB: partial sums that\n"
        "the last program of a tile reads. ~us: an estimate, nothing measured."
    )


@app.command()
def tune(
    shape: Shapes = None,
    pair: Pairs = None,
    seconds: Annotated[
        float, typer.Option(min=1, max=86400, help="Time limit per shape; less time means fewer candidates.")
    ] = 110,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Table to write. Default: in the user's config folder.")
    ] = None,
) -> None:
    """Measure which kernels are fastest on this GPU.

    Keeps a table for 1 to 16384 rows, which dispatch reads. Processes with the same GPU and the same versions of
    indexproj, torch and Triton then run the fastest kernels. For BF16 weights that can be torch.mm. Entries for
    other shapes and pairs stay in the table, and so do entries for which more candidates were tried. To use a table
    written with --output, set INDEXPROJ_TUNED=FILE. Exits with 1 if a kernel is wrong.
    """
    import torch
    from rich.progress import Progress

    from ..kernels.dispatch import table_path
    from ..kernels.formats import parse_pair
    from ..kernels.target import INTERPRETED
    from . import tune as module

    _check_names("tune", shape, pair)
    if INTERPRETED or not torch.cuda.is_available():
        fail(f"tune: needs a GPU, but {'TRITON_INTERPRET=1 is set' if INTERPRETED else 'there is none'}")
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    entries: list[Entry] = []
    try:
        path = output or table_path(gpu)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries = module.read_entries(path, gpu)
    except ValueError as error:
        complain(f"tune: starting a new table: {error}")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        fail(f"tune: {error}")
    for name in dict.fromkeys(shape or SHAPES):
        formats = [parse_pair(text) for text in dict.fromkeys(pair or PAIRS)]
        cases = [module.Case(m, SHAPES[name], each) for each, m in product(formats, module.MS)]
        measured: list[Entry] = []
        try:
            with Progress(console=Console(stderr=True), transient=True) as progress:
                bar = progress.add_task(name)
                for step, done, total, entry in module.tune(cases, device, seconds):
                    progress.update(bar, description=f"{name}, {step}", completed=done, total=total)
                    measured += [entry] if entry else []
        except (module.WrongError, RuntimeError) as error:
            complain(f"tune: {error}")
            raise typer.Exit(1 if isinstance(error, module.WrongError) else 2) from error
        finally:  # keeps what was measured before an error or an interrupt
            entries = module.merged(entries, measured)
            try:
                if measured:
                    module.write_table(path, gpu, entries)
            except OSError as error:
                fail(f"tune: {error}")
        _print_tuned(name, measured)
    console.print(f"Kept in {path}.", soft_wrap=True)


def _print_tuned(shape: str, entries: list[Entry]) -> None:
    for formats, group in groupby(entries, lambda entry: ", ".join(entry["formats"])):
        table = _table(f"{shape}, {formats}; us", "fastest", "M", "us", "default", "torch fp32", "torch bf16", "tried")
        for entry in group:
            times = [f"{us:.2f}" for us in (entry["us"], entry["default_us"])]
            for outs in ("fp32", "bf16"):
                mark = "*" if outs in entry["torch_for"] else ""
                times.append(f"{entry['torch_us'][outs]:.2f}{mark}" if outs in entry["torch_us"] else "-")
            table.add_row(entry["kernel"], str(entry["m"]), *times, f"{entry['tried']} of {entry['candidates']}")
        console.print(table)
    console.print("default: the kernel without a table. torch: with an fp32 or a bf16 gate.")
    console.print("*: dispatches to torch.mm; results are cuBLAS's.")


@app.command()
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print pytest-benchmark's JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write a PNG per table.")] = None,
) -> None:
    """Benchmark the projection, loading and host overhead.

    Skips the projection if there is no GPU. If a suite fails, prints the results of the others and exits with 1.
    """
    from ..kernels.target import INTERPRETED
    from . import report

    if INTERPRETED:
        fail("bench: does not time Triton's interpreter; unset TRITON_INTERPRET")
    try:
        if plot:
            report.check_plotting(plot)
        results = report.run(quick)
        if as_json:
            print(json.dumps(results, indent=2))
        else:
            for table in report.tables(results):
                console.print(table)
            console.print("Medians; with up to three columns also quartiles and ratios to the first row.")
        if plot:
            paths = report.plot(results, plot)
            Console(stderr=True, soft_wrap=True).print(f"Plots: {', '.join(map(str, paths))}")
    except (RuntimeError, OSError) as error:
        fail(f"bench: {error}")
    if results["failed"]:
        complain(f"bench: these suites failed, see above: {', '.join(results['failed'])}")
        raise typer.Exit(1)


def _table(title: str, kernel: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(kernel, no_wrap=True)
    for number in numbers:
        table.add_column(number, justify="right", no_wrap=True)
    return table


def _check_names(command: str, shape: list[str] | None, pair: list[str] | None) -> None:
    for option, chosen, known in (("--shape", shape, SHAPES), ("--pair", pair, PAIRS)):
        if unknown := [name for name in chosen or () if name not in known]:
            fail(f"{command}: {option} must be one of {'; '.join(known)}; got {'; '.join(unknown)}")
