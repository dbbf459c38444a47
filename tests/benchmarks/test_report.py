"""`indexproj report`: tables and plots of results that nobody measured."""

import json

import pytest
from matplotlib.figure import Figure

from indexproj.benchmarks import report
from support import invoke


@pytest.fixture
def folder(tmp_path):
    """Ours take 2 us per row, torch 3."""
    machine = {"machine": {"GPU": "made-up GPU", "clocks.sm": "1980 MHz"}, "versions": {"torch": "2.13.0"}}
    found = [machine | {"date": "today"}]
    found += [{"suite": "ceilings", "contender": "copy", "how": "device", "us": [2.0], "bytes": 6000}]
    head = {"suite": "projection", "shape": "glm-5", "pair": "FP8 128x128, BF16", "how": "device"}
    for m in (16, 1, 64):
        torch_us = {"torch mm, fp32": 4 * m, "torch linear": 3 * m, "torch _scaled_mm": m}
        for contender, us in {"indexproj": 2 * m, **torch_us}.items():
            times = {"us": [0.9 * us, us, us, 1.1 * us, us]} | ({"bytes": 3000 * m} if us == 2 * m else {})
            found.append(head | {"m": m, "contender": contender} | times)
    found.append(head | {"m": 64, "contender": "indexproj, bf16", "error": "not supported", "wrong": False})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    return tmp_path


def test_tables_and_plots(folder):
    invoke("report", folder, code=0)
    text = (folder / "report.md").read_text()
    assert "- GPU made-up GPU, clocks.sm 1980 MHz, torch 2.13.0, date today" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 1 ")]
    assert rows[0] == ["1", "indexproj", "2 (2-2)", "0.667 (0.667-0.667)", "1.5", "50%"]
    assert rows[2][:4] == ["1", "torch linear", "3 (3-3)", "1 (1-1)"]
    assert rows[3][3] == "0.333 (0.333-0.333)"
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


def test_results_of_a_second_run_of_one_contender(folder):
    """They replace those of the first run, and are not compared with them."""
    results = report.read(folder)
    newer = next(result for result in results if result.get("contender") == "indexproj") | {"us": [1.0, 1.0]}
    text = report.markdown([*results, results[0], newer])
    (row,) = [line for line in text.splitlines() if line.startswith("| 16 | indexproj ")]
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["1 (1-1)", ""]


@pytest.mark.parametrize("fastest", ["torch linear", "torch mm, fp32"])
def test_fastest_of_torch_is_the_baseline(folder, fastest):
    """Not that in FP8, which computes something else."""
    machine, _, *results = report.read(folder)
    us = {"indexproj": 1.0, "torch linear": 4.0, "torch mm, fp32": 4.0, "torch _scaled_mm": 0.5} | {fastest: 2.0}
    text = report.markdown([machine, *(each | {"us": [us[each["contender"]]]} for each in results if "us" in each)])
    ratios = [line.split("|")[4].strip()[:4] for line in text.splitlines() if line.startswith("| 16 | indexproj ")]
    assert ratios == ["0.5 "]


def test_side_a_is_the_baseline_of_every_ab(folder):
    """Side B of the second run has a place in the table before its A. A side without its rival has no ratio."""
    machine, *_ = report.read(folder)
    head = {"suite": "A/B", "shape": "glm-5", "pair": "FP8 128x128, BF16", "m": 1, "how": "device"}
    runs = [{"A: old": 4.0, "B: new": 2.0}, {"A: config": 8.0, "B: new": 2.0}]
    results = []
    for run in runs:
        results += [machine, *(head | {"contender": name, "us": [us]} for name, us in run.items())]
    text = report.markdown(results)
    rows = [[cell.strip() for cell in line.split("|")[2:5]] for line in text.splitlines() if line.startswith("| 1 ")]
    assert rows == [["A: old", "4 (4-4)", "1 (1-1)"], ["B: new", "2 (2-2)", "0.25 (0.25-0.25)"],
                    ["A: config", "8 (8-8)", "1 (1-1)"]]  # fmt: skip


NO_NUMBERS = '{"suite": "host", "contender": "a", "how": "cpu", "us": ["b"]}'
OTHER_GPU = '{"machine": {"GPU": "another GPU"}, "versions": {}, "date": "today"}'


@pytest.mark.parametrize("line", ["3", "null", "[]", '{"suite": "projection"}', NO_NUMBERS, OTHER_GPU])
def test_bad_results(folder, line):
    with (folder / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    result = invoke("report", folder, code=2)
    expected = "results.jsonl, line 16: expected a result of `indexproj bench`"
    if line == OTHER_GPU:
        expected = "expected results of one GPU, found another GPU, made-up GPU; use a folder each"
    assert expected in result.stderr
    (folder / "results.jsonl").unlink()
    assert "found none" in invoke("report", folder).stderr
