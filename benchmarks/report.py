"""Turns results of `indexproj bench` into Markdown tables and plots."""

import json
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from math import isnan, nan
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from .bench import Result

Row = dict[str, str]
# Results of one suite, shape and pair by M and contender, and then by how they were measured.
Group = dict[tuple[int, str], dict[str, Result]]


def read(folder: Path) -> list[Result]:
    """All lines of a folder's *.jsonl, without those that killed runs have cut short.

    Raises ValueError if there are none, one is no result, or they are from several GPUs.
    """
    results = []
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                result = json.loads(line)
                markdown([result])
            except json.JSONDecodeError:
                continue
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
                raise ValueError(f"{path}, line {number}: expected a result of `indexproj bench`") from error
            results.append(result)
    if not any("suite" in result for result in results):
        raise ValueError(f"{folder}: expected results of `indexproj bench` in *.jsonl, found none")
    names = {result["machine"].get("GPU", "none") for result in results if "machine" in result}
    if len(names) > 1:
        raise ValueError(f"{folder}: expected results of one GPU, found {', '.join(sorted(names))}; use a folder each")
    return results


def groups(results: Iterable[Result]) -> dict[str, Group]:
    """By title. A later result replaces an earlier one; "run" numbers what lies between two lines of the machine."""
    found: dict[str, Group] = {}
    run = 0
    for result in results:
        if "machine" in result:
            run += 1
            continue
        title = ", ".join(filter(None, (result["suite"], result.get("shape"), result.get("pair"))))
        key = int(result.get("m", 0)), result["contender"]
        found.setdefault(title, {}).setdefault(key, {})[result["how"]] = result | {"run": run}
    return {title: dict(sorted(group.items(), key=lambda item: item[0][0])) for title, group in found.items()}


def markdown(results: list[Result]) -> str:
    """Machine and versions, and a table per suite, shape and pair."""
    lines = []
    for result in results:
        if "machine" in result:
            facts = {"GPU": "none", **result["machine"], **result["versions"], "date": result["date"]}
            facts |= {key: value for key, value in result.items() if key.startswith("versions of")}
            lines.append("- " + ", ".join(f"{name} {value}" for name, value in facts.items()))
    found = groups(results)
    rate = _copy_rate(found)
    for title, group in found.items():
        rows = list(_counted(group) if title.startswith("counters") else _timed(group, rate))
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [names, *([row.get(name, "") for name in names] for row in rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        cells.insert(1, ["-" * width for width in widths])
        table = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        lines += ["", f"## {title}", "", *(f"| {row} |" for row in table)]
    return "\n".join(lines) + "\n"


def _copy_rate(found: dict[str, Group]) -> float:
    """Bytes per microsecond of the copy among the ceilings; NaN without one."""
    copy = found.get("ceilings", {}).get((0, "copy"), {}).get("device", {"bytes": nan, "us": [1.0]})
    return float(copy["bytes"] / median(copy["us"]))


def _timed(group: Group, rate: float) -> Iterator[Row]:
    for (m, contender), by_how in group.items():
        row = ({"M": str(m)} if m else {}) | {"us": contender}
        for how, result in by_how.items():
            row[how] = spread(result["us"]) if "us" in result else result["error"]
            if result["suite"] != "ceilings":
                baseline = _baseline(group, m, how, result["run"])
                pairs = zip(result.get("us", ()), baseline, strict=False)
                row[f"{how}, ratio"] = spread([own / other for own, other in pairs])
        device = by_how.get("device", {})
        if device.get("bytes") and "us" in device:
            achieved = device["bytes"] / median(device["us"])
            row |= {"GB/s": f"{achieved / 1e3:.3g}", "of copy": "" if isnan(rate) else f"{achieved / rate:.0%}"}
        yield row


def _counted(group: Group) -> Iterator[Row]:
    """One that ncu could not count has a row with its error."""
    results = {m: by_how["device"] for (m, _), by_how in group.items()}
    counted = {m: each["counters"] if "counters" in each else {"error": each["error"]} for m, each in results.items()}
    for name in dict.fromkeys(name for counters in counted.values() for name in counters):
        yield {"counter": name} | {f"M = {m}": counters.get(name, "") for m, counters in counted.items()}


def _baseline(group: Group, m: int, how: str, run: int) -> list[float]:
    """With the same M in the same run: side A, else the fastest of torch, else the first of several contenders."""
    rivals = [by_how.get(how, {}) for (own, _), by_how in group.items() if own == m]
    rivals = [result for result in rivals if "us" in result and result["run"] == run]
    torch = [result for result in rivals if result["contender"] in ("torch linear", "torch mm, fp32")]
    side_a = [result for result in rivals if result["contender"].startswith("A: ")]
    best = side_a or sorted(torch, key=lambda result: median(result["us"])) or (rivals if len(rivals) > 1 else [])
    return best[0]["us"] if best else []


def quartiles(values: list[float]) -> list[float]:
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def spread(values: list[float]) -> str:
    """Median and quartiles, or nothing."""
    texts = [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in quartiles(values)]
    return "{1} ({0}-{2})".format(*texts) if texts else ""


def plot(results: list[Result], folder: Path) -> list[Path]:
    """Writes a PNG of device times per group with several M. Nothing without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure

    paths, found = [], groups(results)
    for title, group in found.items():
        timed = {key: by_how["device"] for key, by_how in group.items() if "us" in by_how.get("device", {})}
        if len({m for m, _ in timed}) > 1:
            figure = Figure(figsize=(12, 6), layout="constrained")
            draw(figure.subplots(), timed, _copy_rate(found))
            figure.suptitle(title)
            paths.append(folder / f"{'-'.join(re.findall(r'[a-z0-9.]+', title.lower()))}.png")
            figure.savefig(paths[-1], dpi=120)
    return paths


def draw(axes: Any, timed: dict[tuple[int, str], Result], rate: float) -> None:
    """Medians and quartiles against M, one line per contender, and the time of a copy of as many bytes."""
    ticks = sorted({m for m, _ in timed})
    for name in dict.fromkeys(contender for _, contender in timed):
        points = [(m, *quartiles(timed[m, name]["us"])) for m in ticks if (m, name) in timed]
        ms, low, middle, high = zip(*points, strict=True)
        axes.plot(ms, middle, "--" if name.startswith("torch") else "-", marker=".", label=name)
        axes.fill_between(ms, low, high, alpha=0.3)
    floor = {m: result["bytes"] / rate for (m, _), result in timed.items() if "bytes" in result}
    axes.plot(floor.keys(), floor.values(), "k:", label="memory floor: a copy of as many bytes")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
    axes.set(yscale="log", xlabel="M, rows of x", ylabel="us, median and quartiles")
    axes.grid(alpha=0.3)
    axes.legend()
