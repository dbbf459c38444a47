"""Runs the suites of benchmarks/, and shows the results as tables and plots."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

SUITES = Path(__file__).parent
COLUMNS = 7  # per table, which then fits 100 characters
# A result as pytest-benchmark writes it. Its extra_info has the row and column of a table, and the unit.
Benchmark = dict[str, Any]


def run(quick: bool) -> dict[str, Any]:
    """Runs the suites that this machine supports, with output on stderr, and returns pytest-benchmark's JSON.

    "failed" lists suites with failures; their other results and those of other suites are kept.

    Raises:
        RuntimeError: pytest-benchmark is not installed, or there are no results.
    """
    if find_spec("pytest_benchmark") is None:
        raise RuntimeError("the suites need pytest-benchmark; run `pip install '.[bench]'` in a clone")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-c", "/dev/null", "-p", "no:cacheprovider"]
        command += ["--import-mode=importlib", "--no-header", "--continue-on-collection-errors"]
        command += ["--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={path}"]
        command += [*["--quick"] * quick, str(SUITES)]
        # Not in the current folder, where `python -m` would look for modules first.
        code = subprocess.run(command, cwd=folder, stdout=sys.stderr, check=False).returncode
        # 1 with results: some tests failed. Without: all failed, or pytest-benchmark is disabled.
        if code not in (0, 1) or not path.exists():
            raise RuntimeError(f"the suites exited with {code} and no results; their output is above")
        results: dict[str, Any] = json.loads(path.read_text())
    return results


def groups(results: dict[str, Any]) -> dict[str, dict[str, dict[Any, Benchmark]]]:
    """Benchmarks by title, row and column of their table, each in the order in which they ran."""
    found: dict[str, dict[str, dict[Any, Benchmark]]] = {}
    for benchmark in results["benchmarks"]:
        info = benchmark["extra_info"]
        found.setdefault(benchmark["group"], {}).setdefault(info["row"], {})[info["column"]] = benchmark
    return found


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """Tables of medians. Those with up to three columns also show quartiles and the ratio to the first row."""
    for title, rows in groups(results).items():
        first = next(iter(rows.values()))
        info = next(iter(first.values()))["extra_info"]
        extras = [key for key in info if key.startswith("MB ")]
        for start in range(0, len(first), COLUMNS):
            columns = [*first][start : start + COLUMNS]
            table = Table(title=f"{title}; {info['unit']}", title_justify="left")
            table.add_column("M" if isinstance(columns[0], int) else "", no_wrap=True)
            for column in (*columns, *extras):
                table.add_column(str(column), justify="right", no_wrap=True)
            for name, row in rows.items():
                cells = [_cell(row.get(column), first[column], len(first) <= 3) for column in columns]
                cells += [f"{row[columns[0]]['extra_info'][key]:.1f}" for key in extras]
                table.add_row(name, *cells)
            yield table


def _cell(benchmark: Benchmark | None, first: Benchmark, has_room: bool) -> str:
    if benchmark is None:
        return "-"
    low, median, high = (f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in _quartiles(benchmark))
    if not has_room:
        return median
    ratio = f", {benchmark['stats']['median'] / first['stats']['median']:.3g}x" if benchmark is not first else ""
    return f"{median} ({low}-{high}){ratio}"


def _quartiles(benchmark: Benchmark) -> list[float]:
    """First quartile, median and third quartile in the benchmark's unit."""
    scale = {"us": 1e6, "ms": 1e3}[benchmark["extra_info"]["unit"]]
    return [benchmark["stats"][key] * scale for key in ("q1", "median", "q3")]


def check_plotting(folder: Path) -> None:
    """Creates the folder for plots. Raises RuntimeError without matplotlib, OSError if there can be no folder."""
    if find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib; run `pip install '.[bench]'` in a clone")
    folder.mkdir(parents=True, exist_ok=True)


def plot(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes a PNG per table with several rows."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    paths, machine = [], results["machine_info"]
    name = machine.get("gpu", {}).get("name") or machine["cpu"].get("brand_raw", machine["machine"])
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    for title, rows in groups(results).items():
        if len(rows) > 1:
            figure, axes = pyplot.subplots(figsize=(12, 6), layout="constrained")
            draw(axes, rows)
            axes.set_title(f"{title}\n{name}", loc="left")
            axes.set_title(f"{results['datetime'][:10]}\n{versions}", loc="right", fontsize="small")
            paths.append(folder / f"{'-'.join(re.findall(r'[a-z0-9.]+', title.lower()))}.png")
            figure.savefig(paths[-1], dpi=120)
            pyplot.close(figure)
    return paths


def draw(axes: Any, rows: dict[str, dict[Any, Benchmark]]) -> None:
    """Medians and quartiles against M or another column, one line per row, and the floors if the GPU is known."""
    from matplotlib import colormaps

    first = next(iter(rows.values()))
    columns = [*first]
    axes.set_yscale("log")
    axes.set_ylabel(f"{first[columns[0]]['extra_info']['unit']}, median and quartiles")
    axes.set_prop_cycle(color=[colormaps["tab20"](shade) for shade in range(20)])
    for name, row in rows.items():
        low, median, high = zip(*map(_quartiles, row.values()), strict=True)
        errors = [[m - q for m, q in zip(median, low, strict=True)], [q - m for m, q in zip(median, high, strict=True)]]
        style = "-" if name.startswith("indexproj") else "--"
        axes.errorbar([*row], median, yerr=errors, label=name, marker="o", markersize=3, capsize=3, linestyle=style)
    for floor, style in (("memory floor", ":"), ("compute floor", "-.")):
        infos = [[row[column]["extra_info"] for row in rows.values() if column in row] for column in columns]
        values = [[info[floor] for info in column if floor in info] for column in infos]
        if all(values):  # a band, because the bytes of the weights depend on their formats
            lowest = [min(us) for us in values]
            axes.plot(columns, lowest, label=f"{floor}, by the data sheet", color="black", linestyle=style)
            axes.fill_between(columns, lowest, [max(us) for us in values], color="black", alpha=0.15)
            if floor == "memory floor":  # the compute floor of few rows would take half of the figure
                axes.set_ylim(bottom=min(lowest) / 2)
    if isinstance(columns[0], int):
        axes.set_xscale("log", base=2)
        axes.set_xticks(columns, map(str, columns))
        axes.set_xlabel("M, rows of x")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
