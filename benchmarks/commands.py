"""The commands compile, tune, bench and report."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby, product
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..indexer.cli.commands import app, complain, console, fail
from ..indexer.models import PAIRS, SHAPES, fits

W8A8_WK = "FP8 128x128"  # the format of wk that `activation` is defined for
_SHAPES = "; ".join(f"{name} (N={'+'.join(map(str, ns))}, K={k})" for name, (*ns, k) in SHAPES.items())
_SHAPE_HELP = f"Shape of a published model; repeatable. Default: all. {_SHAPES}."
_PAIR_HELP = f"Formats of the matrices, quoted; repeatable. Default: all. {'; '.join(PAIRS)}."
_GPU_HELP = "sm_80, sm_90, sm_100, sm_120, gfx942 or gfx950; repeatable."
_SM_HELP = "SMs or compute units. Default: those of the largest such GPU."
_AB_HELP = (
    "Compare two sides, in turn: a KernelConfig in JSON, or a command that starts a Python, such as "
    "`env INDEXPROJ_TUNED= python3` or `other-venv/bin/python`. Give the option twice."
)
_CONTENDER_HELP = "indexproj, torch linear or another name in the results; repeatable. Default: all."
_ACTIVATION_HELP = f"Activation for wk in {W8A8_WK} (W8A8). Default: none (W8A16), or all without --shape and --pair."
Shapes = Annotated[list[str] | None, typer.Option("--shape", metavar="SHAPE", help=_SHAPE_HELP)]
Pairs = Annotated[list[str] | None, typer.Option("--pair", metavar="PAIR", help=_PAIR_HELP)]


@app.command("compile")
def compile_(
    target: Annotated[list[str] | None, typer.Option(metavar="GPU", help=_GPU_HELP)] = None,
    all_targets: Annotated[bool, typer.Option("--all", help="All of these GPUs.")] = False,
    sm_count: Annotated[int | None, typer.Option(min=1, metavar="N", help=_SM_HELP)] = None,
    shape: Shapes = None,
    pair: Pairs = None,
    activation: Annotated[Literal["fp8", "fp8_ue8m0"] | None, typer.Option(help=_ACTIVATION_HELP)] = None,
    cache: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep binaries for TRITON_CACHE_DIR=DIR.")] = None,
    batch_invariant: Annotated[bool, typer.Option("--batch-invariant", help="For VLLM_BATCH_INVARIANT=1.")] = False,
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
    published = _published("compile", shape, pair)
    cases = CASES
    if shape or pair or activation:
        cases = [Case(*case, activation) for case in published if not activation or case[1].startswith(W8A8_WK)]
        if not cases or (pair and len(cases) < len(published)):
            fail(f"compile: --activation needs wk in {W8A8_WK}, got --pair {'; '.join(pair or PAIRS)}")
    if cache:
        with _failures("compile"):
            cache.mkdir(parents=True, exist_ok=True)
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
        where = f"TRITON_CACHE_DIR={cache.resolve()}"
        console.print(f"Kept in {cache}. Start servers with {where}; the path must be the same there.", soft_wrap=True)


def _title(row: dict[str, Any]) -> str:
    activation = f", activation {row['activation']}" if row["activation"] else ""
    return f"{row['target']}, {row['shape']}, {row['pair']}{activation}, gate in {row['gate']}"


def _print_compiled(found: list[dict[str, Any]]) -> None:
    headers = {"kernel": "kernel", "m": "M", "programs": "grid", "per_sm": "per SM", "registers": "regs",
               "shared_memory": "shared", "step": "step", "load_groups": "trips"}  # fmt: skip
    for title, group in groupby(found, _title):
        rows = [
            {name: str(row[key]) for key, name in headers.items()}
            | {"MB": f"{row['bytes'] / 1e6:.0f}", "KB": f"{row['reduced_bytes'] / 1e3:.0f}"}
            | {"~us": str(row["estimate_us"]), "check": "failed" if row["faults"] else "ok"}
            for row in group
        ]
        _print_table(title, rows)
    console.print(
        "M: the largest with this kernel. grid: programs of a launch with M rows. per SM: programs that\n"
        "fit on one SM. regs: per thread. shared: bytes of shared memory. step: instructions of a step of\n"
        "K, 0 without a loop. trips: groups of loads (NVIDIA). MB: weights and x that all programs read.\n"
        "KB: partial sums that the last program of a tile reads. ~us: an estimate, nothing measured.",
        soft_wrap=True,
    )


@app.command()
def tune(
    shape: Shapes = None,
    pair: Pairs = None,
    seconds: Annotated[float, typer.Option(min=1, help="Time limit per shape; less means fewer candidates.")] = 110,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: in the user's config folder.")] = None,
) -> None:
    """Measure which kernels are fastest on this GPU.

    Keeps a table for 1 to 16384 rows, which dispatch reads. Processes with the same GPU and the same versions of
    indexproj, torch and Triton then run the fastest kernels. For BF16 weights that can be torch.mm. Entries for
    other shapes and pairs stay in the table, and so do entries for which more candidates were tried. To use a table
    written with --output, set INDEXPROJ_TUNED=FILE. Exits with 1 if a kernel is wrong.
    """
    import torch

    from ..kernels.dispatch import table_path
    from ..kernels.formats import parse_pair
    from . import tune as module
    from .gpu import current_gpu

    published = _published("tune", shape, pair)
    with _failures("tune"):
        device = current_gpu()
        gpu = torch.cuda.get_device_name(device)
        path = output or table_path(gpu)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            entries, known = module.read_entries(path, gpu)
        except ValueError as error:
            complain(f"tune: starting a new table: {error}")
            entries, known = [], {}
        if known:
            complain(f"tune: {path} was measured with other versions; its configs are tried first", style="yellow")
        for name, group in groupby(published, lambda case: case[0]):
            formats = [parse_pair(text) for _, text in group]
            cases = [module.Case(m, SHAPES[name], each) for each, m in product(formats, module.MS)]
            measured = []
            with Console(stderr=True).status(name) as status:
                for done, entry in module.tune(cases, device, seconds, known):
                    status.update(f"{name}: {done}")
                    if entry:
                        measured.append(entry)
                        entries = module.merged(entries, [entry])
                        module.write_table(path, gpu, entries)
            _print_tuned(name, measured)
    console.print(f"Kept in {path}.", soft_wrap=True)


def _print_tuned(shape: str, entries: list[dict[str, Any]]) -> None:
    for formats, group in groupby(entries, lambda entry: ", ".join(entry["formats"])):
        rows = []
        for entry in group:
            row = {"fastest": entry["kernel"], "M": str(entry["m"]), "us": f"{entry['us']:.2f}"}
            row["default"] = f"{entry['default_us']:.2f}"
            for outs in ("fp32", "bf16"):
                mark = "*" if outs in entry["torch_for"] else ""
                row[f"torch {outs}"] = f"{entry['torch_us'][outs]:.2f}{mark}" if outs in entry["torch_us"] else "-"
            rows.append(row | {"tried": f"{entry['tried']} of {entry['candidates']}"})
        _print_table(f"{shape}, {formats}; us", rows)
    console.print("default: the kernel without a table. torch: with an fp32 or a bf16 gate.")
    console.print("*: dispatches to torch.mm; results are cuBLAS's.")


@app.command()
def bench(
    shape: Shapes = None,
    pair: Pairs = None,
    m: Annotated[list[int] | None, typer.Option(min=1, max=65536, metavar="N", help="Rows of x; repeatable.")] = None,
    contender: Annotated[list[str] | None, typer.Option(metavar="NAME", help=_CONTENDER_HELP)] = None,
    ab: Annotated[list[str] | None, typer.Option(metavar="SIDE", help=_AB_HELP)] = None,
    minutes: Annotated[float, typer.Option(min=0, help="Time limit; the most telling cases come first.")] = 60,
    counters: Annotated[bool, typer.Option("--counters", help="Add what NVIDIA's ncu counts in a launch.")] = False,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results; see `report`.")] = Path("results"),
) -> None:
    """Measure the projection against torch, or A/B two versions or configs.

    Checks results, and appends each measurement to DIR/results.jsonl at once: a run that is killed loses none. Starts
    with ceilings: an empty kernel, and bandwidths of memory and L2. Exits with 1 if a kernel is wrong.
    """
    from . import bench as module
    from .gpu import current_gpu
    from .report import markdown

    published = _published("bench", shape, pair)
    _check_names("bench", "--contender", contender, module.CONTENDERS)
    if len(ab or ()) not in (0, 2):
        fail("bench: --ab needs two sides")
    cases = [
        module.Case(name, text, rows)
        for text, rows, name in product(pair or PAIRS, m or module.MS, shape or SHAPES)
        if (name, text) in published
    ]
    found = []
    with _failures("bench"):
        current_gpu()
        output.mkdir(parents=True, exist_ok=True)
        path = output / "results.jsonl"
        with path.open("a", encoding="utf-8") as file:
            if file.tell() and not path.read_bytes().endswith(b"\n"):  # a killed run has cut the last line short
                print(file=file)
            for result in module.run(cases, contender or [*module.CONTENDERS], ab or (), 60 * minutes, counters):
                found.append(result)
                print(json.dumps(result), file=file, flush=True)
    print(markdown(found))
    errors = [result for result in found if "error" in result and not result["contender"].startswith("torch")]
    for result in errors:
        case = ", ".join(str(result[key]) for key in ("contender", "how", "shape", "pair", "m"))
        complain(f"bench: {case}: {result['error']}")
    if errors:
        raise typer.Exit(1 if any(result["wrong"] for result in errors) else 2)


@app.command("report")
def report_(folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that `bench` filled.")]) -> None:
    """Turn results of `bench` into Markdown tables and plots in the same folder."""
    from . import report

    with _failures("report"):
        results = report.read(folder)
        (folder / "report.md").write_text(report.markdown(results), encoding="utf-8")
        paths = [folder / "report.md", *report.plot(results, folder)]
    note = "; no plots without matplotlib, or of one M" if len(paths) == 1 else ""
    console.print(f"Wrote {', '.join(map(str, paths))}{note}", soft_wrap=True)


@contextmanager
def _failures(command: str) -> Iterator[None]:
    """One line for what went wrong, and its exit code."""
    from triton.errors import TritonError

    from .gpu import WrongError

    try:
        yield
    except typer.Exit:
        raise
    except (WrongError, OSError, RuntimeError, ValueError, TritonError, KeyboardInterrupt) as error:
        complain(f"{command}: {str(error).strip().partition(chr(10))[0] or 'interrupted'}")
        raise typer.Exit(1 if isinstance(error, WrongError) else 2) from error


def _print_table(title: str, rows: list[dict[str, str]]) -> None:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


def _published(command: str, shapes: list[str] | None, pairs: list[str] | None) -> list[tuple[str, str]]:
    """Shapes and pairs that were asked for, all by default, and that fit each other."""
    _check_names(command, "--shape", shapes, SHAPES)
    _check_names(command, "--pair", pairs, PAIRS)
    found = [case for case in dict.fromkeys(product(shapes or SHAPES, pairs or PAIRS)) if fits(*case)]
    if not found:
        fail(f"{command}: no --pair has as many formats as a --shape has matrices")
    return found


def _check_names(command: str, option: str, chosen: list[str] | None, known: Iterable[str]) -> None:
    if unknown := [name for name in chosen or () if name not in known]:
        fail(f"{command}: {option} must be one of {'; '.join(known)}; got {'; '.join(unknown)}")
