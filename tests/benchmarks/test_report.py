"""`indexproj report`: tables and plots of results that nobody measured."""

import json
from itertools import product

import pytest
from matplotlib.figure import Figure

from indexproj.benchmarks import report
from support import invoke

HEAD = {"suite": "projection", "shape": "glm-5", "pair": "FP8 128x128, BF16", "how": "device"}
US_PER_ROW = {"indexproj": 2, "torch mm, fp32": 4, "torch linear": 3, "torch _scaled_mm": 1}


@pytest.fixture
def folder(tmp_path):
    machine = {"machine": {"GPU": "made-up GPU", "clocks.sm": "1980 MHz"}, "versions": {"torch": "2.13.0"}}
    copy = {"suite": "ceilings", "contender": "copy", "how": "device", "us": [2.0], "bytes": 6000}
    found = [machine | {"date": "today"}, copy]
    for m, (name, us) in product((16, 1, 64), US_PER_ROW.items()):
        times = [factor * us * m for factor in (0.9, 1, 1, 1.1, 1)]
        found.append(HEAD | {"m": m, "contender": name, "us": times, "bytes": 3000 * m})
    found.append(HEAD | {"m": 64, "contender": "indexproj, bf16", "error": "not supported", "wrong": False})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    return tmp_path


def cells(text, start):
    """Of the rows that start with this."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith(start)]


def test_tables_and_plots(folder):
    invoke("report", folder, code=0)
    text = (folder / "report.md").read_text()
    assert "- GPU made-up GPU, clocks.sm 1980 MHz, torch 2.13.0, date today" in text
    rows = cells(text, "| 1 ")
    assert rows[0] == ["1", "indexproj", "2 (2-2)", "0.667 (0.667-0.667)", "1.5", "50%"]
    assert [row[3] for row in rows[1:]] == ["1.33 (1.33-1.33)", "1 (1-1)", "0.333 (0.333-0.333)"]
    assert "not supported" in text
    assert text.index("| 1 ") < text.index("| 16 ") < text.index("| 64 ")
    assert (folder / "projection-glm-5-fp8-128x128-bf16.png").read_bytes().startswith(b"\x89PNG")
    (group,) = list(report.groups(report.read(folder)).values())[1:]
    axes = Figure().subplots()
    report.draw(axes, {key: how["device"] for key, how in group.items() if "us" in how["device"]}, rate=3000.0)
    lines = {line.get_label().split(":")[0]: [*zip(*line.get_data(), strict=True)] for line in axes.lines}
    assert lines["memory floor"] == [(1, 1.0), (16, 16.0), (64, 64.0)]
    assert lines["torch linear"] == [(1, 3), (16, 48), (64, 192)]
    assert len(axes.collections) == 4  # quartiles


@pytest.mark.parametrize(
    ("runs", "ratios"),
    [
        # The fastest of torch, but not that in FP8, which computes something else.
        ([{"torch linear": 2, "torch mm, fp32": 4, "indexproj": 1, "torch _scaled_mm": 0.5}], "1, 2, 0.5, 0.25"),
        ([{"torch linear": 4, "torch mm, fp32": 2, "indexproj": 1, "torch _scaled_mm": 0.5}], "2, 1, 0.5, 0.25"),
        # A later result replaces an earlier one, and is not compared with those of another run.
        ([{"torch linear": 4, "indexproj": 2}, {"indexproj": 1}], "1, "),
        # Side B of the second run stands in the table before its A. A side without its rival has no ratio.
        ([{"A: old": 4, "B: new": 2}, {"A: config": 8, "B: new": 2}], "1, 0.25, 1"),
        ([{"A: old": 4, "B: new": 2}, {"B: new": 2}], "1, "),
    ],
)
def test_baseline(runs, ratios):
    results = []
    for run in runs:
        results.append({"machine": {}, "versions": {}, "date": "today"})
        results += [HEAD | {"m": 1, "contender": name, "us": [us]} for name, us in run.items()]
    assert ", ".join(row[3].partition(" ")[0] for row in cells(report.markdown(results), "| 1 ")) == ratios


NO_RESULT = "results.jsonl, line 16: expected a result of `indexproj bench`"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("3", NO_RESULT),
        ('{"suite": "projection"}', NO_RESULT),
        ('{"suite": "host", "contender": "a", "how": "cpu", "us": ["b"]}', NO_RESULT),
        ('{"machine": {"GPU": "another GPU"}, "versions": {}, "date": "today"}',
         "expected results of one GPU, found another GPU, made-up GPU; use a folder each"),
    ],
)  # fmt: skip
def test_bad_results(folder, line, message):
    with (folder / "results.jsonl").open("a") as file:
        file.write(line)
    assert message in invoke("report", folder, code=2).stderr
    (folder / "results.jsonl").unlink()
    assert "found none" in invoke("report", folder, code=2).stderr
