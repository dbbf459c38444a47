"""Runs the suites of benchmarks/, and shows what they find as tables and plots."""

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

Groups = dict[str, list[dict[str, Any]]]
_SCALES = {"us": 1e6, "ms": 1e3}


def run(quick: bool) -> dict[str, Any]:
    """What pytest-benchmark writes of all suites that this machine can run; their own output goes to stderr.

    "failed" names the suites in which something failed; all that was measured is kept.

    Raises:
        RuntimeError: pytest-benchmark is not installed, or there is no result.
    """
    suites = find_spec("indexproj.benchmarks")
    if suites is None or suites.origin is None or find_spec("pytest_benchmark") is None:
        raise RuntimeError("the suites need pytest-benchmark; install indexproj with its extra `bench`")
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "pytest", "-q", "-rs", "-c", "/dev/null", "-p", "no:cacheprovider"]
        command += ["--import-mode=importlib", "--no-header", "--continue-on-collection-errors"]
        command += ["--benchmark-disable-gc", "--benchmark-quiet", f"--benchmark-json={found}"]
        command += [*["--quick"] * quick, str(Path(suites.origin).parent)]
        # Not in the current folder: `python -m` would look there for modules first.
        code = subprocess.run(command, cwd=folder, stdout=sys.stderr, check=False).returncode
        # 1 with a file: some failed. Without one all did, or pytest-benchmark is switched off.
        if code not in (0, 1) or not found.exists():
            raise RuntimeError(f"the suites ended with {code}, without a result; their output is above")
        result: dict[str, Any] = json.loads(found.read_text())
    return result


def groups(found: dict[str, Any]) -> Groups:
    """Benchmarks by the title of their group, in the order in which they ran."""
    result: Groups = {}
    for benchmark in found["benchmarks"]:
        result.setdefault(benchmark["group"], []).append(benchmark)
    return result


def tables(found: dict[str, Any]) -> Iterator[Table]:
    """One for each group: medians, and of groups with few columns quartiles and the ratio to the first row."""
    for title, benchmarks in groups(found).items():
        unit = benchmarks[0]["extra_info"]["unit"]
        rows, columns = (list(dict.fromkeys(b["extra_info"][key] for b in benchmarks)) for key in ("row", "column"))
        cells = {(b["extra_info"]["row"], b["extra_info"]["column"]): b for b in benchmarks}
        extras = [key for key in benchmarks[0]["extra_info"] if key.startswith("MB ")]
        table = Table(title=f"{title}; {unit}", title_justify="left")
        table.add_column("M" if isinstance(columns[0], int) else "", no_wrap=True)
        for column in (*columns, *extras):
            table.add_column(str(column), justify="right", no_wrap=True)
        for row in rows:
            line = [_cell(cells.get((row, c)), cells.get((rows[0], c)), unit, len(columns) <= 3) for c in columns]
            line += [f"{cells[row, columns[0]]['extra_info'][key]:.1f}" for key in extras]
            table.add_row(str(row), *line)
        yield table


def _cell(benchmark: dict[str, Any] | None, first: dict[str, Any] | None, unit: str, has_room: bool) -> str:
    if benchmark is None:
        return "-"
    low, median, high = (benchmark["stats"][key] * _SCALES[unit] for key in ("q1", "median", "q3"))
    if not has_room:
        return _number(median)
    ratio = ""
    if first is not None and first is not benchmark:
        ratio = f", {benchmark['stats']['median'] / first['stats']['median']:.3g} x"
    return f"{_number(median)} ({_number(low)} to {_number(high)}){ratio}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def check_plotting(folder: Path) -> None:
    """Makes the folder for plots.

    Raises:
        RuntimeError: matplotlib is not installed, or the folder cannot be made.
    """
    if find_spec("matplotlib") is None:
        raise RuntimeError("--plot needs matplotlib; install indexproj with its extra `bench`")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"--plot: {error}") from error


def plot(found: dict[str, Any], folder: Path) -> list[Path]:
    """A PNG for each group of several: time against M with floors where there are many M, otherwise bars.

    Args:
        folder: that `check_plotting` has made.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    paths = []
    for title, benchmarks in groups(found).items():
        if len(benchmarks) == 1:
            continue
        figure, axes = pyplot.subplots(figsize=(12, 6), layout="constrained")
        columns = {b["extra_info"]["column"] for b in benchmarks}
        if len(columns) > 3:
            _plot_lines(axes, benchmarks)
        else:
            _plot_bars(axes, benchmarks)
        machine = found["machine_info"]
        name = machine.get("gpu", {}).get("name") or machine["cpu"].get("brand_raw", machine["machine"])
        axes.set_title(f"{title}\n{name}", loc="left")
        versions = ", ".join(f"{package} {version}" for package, version in machine.get("versions", {}).items())
        axes.set_title(f"{found['datetime'][:10]}\n{versions}", loc="right", fontsize="small")
        paths.append(folder / f"{'-'.join(re.findall(r'[a-z0-9.]+', title.lower()))}.png")
        figure.savefig(paths[-1], dpi=120)
        pyplot.close(figure)
    return paths


def _plot_lines(axes: Any, benchmarks: list[dict[str, Any]]) -> None:
    from matplotlib import colormaps

    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    floors: dict[str, dict[int, list[tuple[float, str]]]] = {}
    for benchmark in benchmarks:
        info, stats = benchmark["extra_info"], benchmark["stats"]
        point = (info["column"], *(1e6 * stats[key] for key in ("median", "q1", "q3")))
        lines.setdefault(info["row"], []).append(point)
        pair = info["row"].partition(": ")[2] or "BF16, BF16"  # which is what the others read
        for floor in ("memory floor", "compute floor"):
            if floor in info:
                floors.setdefault(floor, {}).setdefault(info["column"], []).append((info[floor], pair))
    axes.set_prop_cycle(color=[colormaps["tab20"](shade) for shade in range(20)])
    for name, points in lines.items():
        m, median, low, high = zip(*sorted(points), strict=True)
        ours = name.startswith("indexproj")
        (line,) = axes.plot(m, median, label=name, marker="o", markersize=3, linestyle="-" if ours else "--")
        axes.fill_between(m, low, high, color=line.get_color(), alpha=0.2)
    bottom = 1.0
    for (name, by_m), style in zip(floors.items(), (":", "-."), strict=False):
        columns = sorted(by_m)
        ends = [[of(by_m[column]) for column in columns] for of in (min, max)]
        lowest, highest = ([us for us, _ in end] for end in ends)
        axes.plot(columns, lowest, label=f"{name}, by the data sheet", color="black", linestyle=style)
        if name == "memory floor":  # the compute floor of few rows would take half of the figure
            bottom = min(lowest)
        if lowest != highest:
            label = " to ".join(pair for (_, pair), *_ in ends)
            axes.fill_between(columns, lowest, highest, label=label, color="black", alpha=0.15)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({m for points in lines.values() for m, *_ in points})
    axes.set_xticks(ticks, map(str, ticks))
    axes.set_ylim(bottom=bottom / 2)
    axes.set(xlabel="M, rows of x", ylabel="us per projection, median and quartiles")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))


def _plot_bars(axes: Any, benchmarks: list[dict[str, Any]]) -> None:
    unit = benchmarks[0]["extra_info"]["unit"]
    labels = []
    for place, benchmark in enumerate(benchmarks):
        info, stats = benchmark["extra_info"], benchmark["stats"]
        low, median, high = (stats[key] * _SCALES[unit] for key in ("q1", "median", "q3"))
        column = f"M = {info['column']}" if isinstance(info["column"], int) else info["column"]
        labels.append(f"{info['row']}, {column}")
        axes.barh(place, median, xerr=[[median - low], [high - median]], color="tab:blue", capsize=4)
        axes.annotate(_number(median), (high, place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    medians = [benchmark["stats"]["median"] for benchmark in benchmarks]
    if max(medians) > 50 * min(medians):
        axes.set_xscale("log")
    axes.set_xlabel(f"{unit}, median and quartiles; less is better")
