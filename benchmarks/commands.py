"""The commands compile, tune, bench and report."""

import json
import os
import signal
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
_SHAPE_HELP = f"Shape of a published model; repeatable. {_SHAPES}."
_PAIR_HELP = f"Formats of the matrices, quoted; repeatable. Default: {'; '.join(PAIRS)}."
_GPU_HELP = "sm_80, sm_90, sm_100, sm_120, gfx942 or gfx950; repeatable."
_SM_HELP = "SMs or compute units. Default: those of the largest such GPU."
_AB_HELP = "One side of a comparison: a KernelConfig in JSON, or a command that starts a Python. Give it twice."
_CONTENDER_HELP = "indexproj, torch linear or another name in the results; repeatable. Default: all."
_ACTIVATION_HELP = f"Activation for wk in {W8A8_WK} (W8A8); needs --pair. Default: none (W8A16)."
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

    Prints one row per kernel that dispatch selects. Exits with 1 if a check fails. Without --shape and --pair, compiles
    all pairs for one shape, which determine registers, and a few for the others.
    --cache also compiles for the bf16 output that vLLM uses. A server with the same GPU and versions, and with DIR at
    the same path, then compiles none of these kernels. The number of SMs differs between GPUs of one architecture and
    affects dispatch. Set --sm-count to the server's torch.cuda.get_device_properties(0).multi_processor_count.
    """
    from ..kernels import TARGETS
    from ..kernels.dispatch import OUTS
    from .compiled import CASES, Case, rows

    if bool(target) == all_targets:
        fail("compile: expected either --target or --all")
    targets = [TARGETS[name] for name in _chosen("--target", target, TARGETS)]
    if sm_count and len(targets) > 1:
        fail(f"compile: --sm-count needs exactly one --target, got {', '.join(target or TARGETS)}")
    targets = [replace(each, sm_count=sm_count or each.sm_count) for each in targets]
    published = _published(shape, pair)
    if activation and not all(text.startswith(W8A8_WK) for _, text in published):
        fail(f"compile: --activation needs wk in {W8A8_WK}; choose such a --pair")
    cases = [Case(*case, activation) for case in published] if shape or pair else CASES
    found = []
    with _failures("compile"), Console(stderr=True).status("Compiling") as status:
        if cache:
            cache.mkdir(parents=True, exist_ok=True)
            os.environ["TRITON_CACHE_DIR"] = str(cache.resolve())
        for row in rows(targets, cases, OUTS if cache else ("fp32",), batch_invariant):
            found.append(row)
            status.update(f"{_title(row)}, {row['kernel']}")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print_compiled(found)
    faulty = [row for row in found if row["faults"]]
    for row in faulty:
        complain(f"{_title(row)}, {row['kernel']}, M = {row['m']}: {'; '.join(row['faults'])}")
    if faulty:
        raise typer.Exit(1)
    if cache and not as_json:
        console.print(f"Start servers with TRITON_CACHE_DIR={cache.resolve()}, at the same path.", soft_wrap=True)


def _title(row: dict[str, Any]) -> str:
    activation = f", activation {row['activation']}" if row["activation"] else ""
    return f"{row['target']}, {row['shape']}, {row['pair']}{activation}, gate in {row['gate']}"


def _print_compiled(found: list[dict[str, Any]]) -> None:
    names = ["kernel", "M", "regs", "shared", "step", "trips", "MB", "KB", "~us", "check"]
    for title, group in groupby(found, _title):
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        for name in names:
            table.add_column(name, justify="left" if name == "kernel" else "right", no_wrap=True)
        for row in group:
            keys = "kernel", "m", "registers", "shared_memory", "step", "load_groups"
            read = f"{row['bytes'] / 1e6:.0f}", f"{row['reduced_bytes'] / 1e3:.0f}"
            check = "failed" if row["faults"] else "ok"
            table.add_row(*(str(row[key]) for key in keys), *read, str(row["estimate_us"]), check)
        console.print(table)
    console.print(
        "M: the largest with this kernel. regs: per thread. shared: bytes of shared memory. step:\n"
        "instructions of a step of K, 0 without a loop. trips: groups of loads (NVIDIA). MB: weights and x\n"
        "that all programs read. KB: partial sums that the last program of a tile reads. ~us: an estimate.",
        soft_wrap=True,
    )


@app.command()
def tune(
    shape: Shapes = None,
    pair: Pairs = None,
    seconds: Annotated[int, typer.Option(min=1, max=10**6, help="Time limit; less means fewer candidates.")] = 440,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: in the user's config folder.")] = None,
) -> None:
    """Measure which kernels are fastest on this GPU.

    Keeps a table for 1 to 16384 rows, which dispatch reads. Processes with the same GPU and the same versions of
    indexproj, torch and Triton then run the fastest kernels. For a pair in BF16 that can be torch.mm; its results
    are cuBLAS's. Entries for other shapes and pairs stay in the table. To use a table written with --output, set
    INDEXPROJ_TUNED=FILE. Exits with 1 if a kernel is wrong.
    """
    from ..kernels import KernelConfig
    from ..kernels.dispatch import table_path
    from ..kernels.formats import parse_pair
    from . import tune as module
    from .gpu import current_gpu, description

    published = _published(shape, pair)
    with _failures("tune"):
        device, gpu = current_gpu(), description()["GPU"]
        path = output or table_path(gpu)
        path.parent.mkdir(parents=True, exist_ok=True)
        entries, is_own = module.read_tuned(path, gpu)
        known = {case: KernelConfig(**entry["config"]) for case, entry in entries.items()}
        if not is_own:
            complain(f"tune: {path} is of other versions: tries its configs first and replaces it", style="yellow")
            entries = {}
        cases = [(m, SHAPES[name], parse_pair(text)) for name, text in published for m in module.MS]
        with Console(stderr=True).status("Compiling") as status:
            for done, entry in module.tune(cases, device, seconds, known):
                status.update(done)
                if entry:
                    entries[module.case_of(entry)] = entry
                    module.write_tuned(path, gpu, entries)
                    console.print(module.summary(entry), soft_wrap=True)
    console.print(f"Kept in {path}.", soft_wrap=True)


@app.command()
def bench(
    shape: Shapes = None,
    pair: Pairs = None,
    m: Annotated[list[int] | None, typer.Option(min=1, max=65536, metavar="N", help="Rows of x; repeatable.")] = None,
    contender: Annotated[list[str] | None, typer.Option(metavar="NAME", help=_CONTENDER_HELP)] = None,
    ab: Annotated[list[str] | None, typer.Option(metavar="SIDE", help=_AB_HELP)] = None,
    minutes: Annotated[int, typer.Option(min=0, max=10**4, help="Time limit; most informative cases first.")] = 60,
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

    cases = [module.Case(*case, rows) for rows, case in product(m or module.MS, _published(shape, pair))]
    contenders = _chosen("--contender", contender, module.CONTENDERS)
    if len(ab or ()) not in (0, 2):
        fail("bench: --ab needs two sides")
    found = []
    with _failures("bench"):
        current_gpu()
        output.mkdir(parents=True, exist_ok=True)
        with (output / "results.jsonl").open("a", encoding="utf-8") as file:
            print(file=file)  # ends a line that a killed run has cut short
            for result in module.run(cases, contenders, ab or (), 60 * minutes, counters):
                found.append(result)
                print(json.dumps(result), file=file, flush=True)
    typer.echo(markdown(found))
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
    """One line for what went wrong, and its exit code. SIGTERM counts as an interrupt, which ends processes."""
    from triton.errors import TritonError

    from .gpu import WrongError

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except (OSError, RuntimeError, ValueError, TritonError, KeyboardInterrupt) as error:
        complain(f"{command}: {str(error).strip().partition(chr(10))[0] or 'interrupted'}")
        raise typer.Exit(1 if isinstance(error, WrongError) else 2) from error


def _published(shapes: list[str] | None, pairs: list[str] | None) -> list[tuple[str, str]]:
    """Shapes and pairs that were asked for, by default those of published models, and that fit each other."""
    from ..kernels import Format

    labels = [label for pair in pairs or () for label in pair.split(", ")]
    _chosen(f"each format in a --pair such as {PAIRS[0]!r}", labels, [*map(str, Format)])
    chosen = product(_chosen("--shape", shapes, SHAPES), dict.fromkeys(pairs or PAIRS))
    found = [case for case in chosen if fits(*case)]
    if not found:
        fail("no --pair has as many formats as a --shape has matrices")
    return found


def _chosen(option: str, chosen: list[str] | None, known: Iterable[str]) -> list[str]:
    """Each name once, all by default."""
    if unknown := [name for name in chosen or () if name not in known]:
        fail(f"{option} must be one of {'; '.join(known)}; got {'; '.join(unknown)}")
    return list(dict.fromkeys(chosen or known))
