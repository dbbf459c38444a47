"""`indexproj bench` with made-up GPU results and real CPU results; the commands in docs/benchmarks.md."""

import functools
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot
from rich.console import Console
from typer.testing import CliRunner

from indexproj.__main__ import app
from indexproj.benchmarks import gpu, report
from indexproj.benchmarks import test_projection as suite
from indexproj.benchmarks.contenders import OTHERS, OURS, UnavailableError
from indexproj.benchmarks.gpu import floors
from indexproj.indexer.models import PAIRS, SHAPES
from indexproj.kernels import reference
from support import ALL_PAIRS, GLM, weights

ROOT = Path(__file__).parents[2]
FP8 = "FP8 128x128, BF16"
# pytest-benchmark measures nothing if it believes to be one of xdist's workers.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
BLOCKS = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/benchmarks.md").read_text(), re.MULTILINE | re.DOTALL)
INSTALL, BENCH, SAVE, COMPARE, TUNE, COMPILE = [line for block in BLOCKS for line in block.splitlines()]


def run(command, folder):
    options = {"cwd": folder, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 600}
    result = subprocess.run(command, shell=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def bench(*arguments, code=0):
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_docs_commands_are_covered():
    """BENCH, SAVE and COMPARE run here, COMPILE in tests/compile_only/test_command.py."""
    assert INSTALL == "pip install '.[bench]'"
    assert COMPILE.startswith("indexproj compile ")
    arguments = TUNE.replace('"', "").removeprefix("indexproj tune --shape ").split(" --pair ")
    assert arguments[0] in SHAPES
    assert arguments[1] in PAIRS


@pytest.fixture
def results():
    """What the suites would write on an H100, with made-up times."""
    benchmarks = []
    for shape in SHAPES:
        contenders = [(f"indexproj: {pair}", pair) for pair in PAIRS] + [(name, "BF16, BF16") for name in OTHERS]
        for place, (name, pair) in enumerate(contenders):
            for m in suite.MS:
                if name == "vLLM skinny" and m > 16:
                    continue
                us = (2 + 0.3 * place) * (1 + m / 256)
                info = {"row": name, "column": m, "unit": "us"} | floors("NVIDIA H100 80GB HBM3", shape, pair, m)
                stats = {"q1": us * 0.98e-6, "median": us * 1e-6, "q3": us * 1.05e-6}
                benchmarks.append({"group": f"{shape}, device", "extra_info": info, "stats": stats})
    machine = {"gpu": {"name": "a made-up GPU"}, "versions": {"torch": "2.13.0", "triton": "3.9.0"}}
    return {"machine_info": machine, "datetime": "2026-11-24T12:00:00", "benchmarks": benchmarks, "failed": []}


def text_of(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_tables_of_gpu_results(results):
    texts = [text_of(table) for table in report.tables(results)]
    titles = [text.splitlines()[0].rstrip() for text in texts]
    assert titles == [title for title in ("deepseek-v3.2, device; us", "glm-5, device; us") for _ in range(2)]
    assert all(len(line) <= 100 for text in texts for line in text.splitlines())
    lines = {}
    for row in [line for text in texts[:2] for line in text.splitlines() if "│" in line]:
        name, *cells = (cell.strip() for cell in row.split("│")[1:-1])
        lines.setdefault(name, []).extend(cells)
    assert list(lines) == [f"indexproj: {pair}" for pair in PAIRS] + list(OTHERS)
    assert lines["indexproj: BF16, BF16"][:3] == ["2.01", "2.02", "2.03"]
    assert lines["indexproj: BF16, BF16"][-1] == "130"
    assert [cell == "-" for cell in lines["vLLM skinny"]] == [m > 16 for m in suite.MS]
    assert all(len(cells) == len(suite.MS) for cells in lines.values())


def test_plots_of_gpu_results(results, tmp_path):
    report.check_plotting(tmp_path / "plots")
    paths = report.plot(results, tmp_path / "plots")
    assert [path.name for path in paths] == ["deepseek-v3.2-device.png", "glm-5-device.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    _, axes = pyplot.subplots()
    report.draw(axes, report.groups(results)["glm-5, device"])
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    assert len(handles) == len(PAIRS) + len(OTHERS) + 2
    line = handles["torch linear"].lines[0]
    assert list(line.get_xdata()) == list(suite.MS)
    assert line.get_ydata()[0] == pytest.approx((2 + 0.3 * len(PAIRS)) * (1 + 1 / 256))
    memory = handles["memory floor, by the data sheet"].get_ydata()
    least = (128 + 32) * 6144 * (1 / 2 + 1 / 32)  # MXFP4
    assert memory[0] == pytest.approx((least + 2 * 6144 + 2 * 128 + 4 * 32) / 3.35e6)
    compute = handles["compute floor, by the data sheet"].get_ydata()
    assert compute[-1] == pytest.approx(2 * 16384 * 6144 * 160 / 989e6)
    # The weights of other pairs have up to four times as many bytes.
    most = (2 * (128 + 32) * 6144 + 2 * 6144 + 2 * 128 + 4 * 32) / 3.35e6
    bands = [vertices for band in axes.collections for path in band.get_paths() for vertices in path.vertices]
    assert any(x == 1 and y == pytest.approx(most) for x, y in bands)
    pyplot.close("all")


def test_floors():
    assert floors("NVIDIA GeForce RTX 5090", "glm-5", "BF16, BF16", 1) == {}
    moved = 128 * 7168 + 56 * 4 + 2 * 64 * 7168 + 2 * 7168 + 2 * 128 + 4 * 64
    assert floors("NVIDIA H200", "deepseek-v3.2", FP8, 1)["memory floor"] == pytest.approx(moved / 4.8e6)


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("torch")])
@pytest.mark.parametrize("pair", ALL_PAIRS)
def test_torch_contenders(name, pair, mm_to_fp32):
    w, x = weights(pair, (128, 32, 512)), torch.randn(5, 512).bfloat16()
    for output, exact in zip(OTHERS[name](x, w)(), reference(x, w), strict=True):
        assert output.shape == exact.shape
        assert (output.double() - exact).abs().max() <= 2**-6 * exact.abs().max()


@pytest.mark.parametrize("name", [name for name in OTHERS if not name.startswith("torch")])
def test_contenders_that_are_not_installed(name):
    w, x = weights(FP8, (128, 32, 512)), torch.randn(5, 512).bfloat16()
    with pytest.raises(UnavailableError, match="not installed"):
        OTHERS[name](x, w)
    if name != "vLLM skinny":
        for pair in ("BF16, BF16", "FP8 per row, BF16"):
            with pytest.raises(UnavailableError, match="takes wk in FP8"):
                OTHERS[name](x, weights(pair, (128, 32, 512)))


class Benchmark:
    """In place of pytest-benchmark's fixture."""

    def __init__(self):
        self.extra_info, self.rounds = {}, 0
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=2e-6))

    def pedantic(self, run, rounds, warmup_rounds):
        for _ in range(rounds + warmup_rounds):
            run()
        self.rounds = rounds


@pytest.mark.parametrize("how", ["device", "eager"])
def test_projection_suite(monkeypatch, mm_to_fp32, how):
    """All of it but the GPU: graphs are lists of calls."""
    calls, w = [], weights(FP8, GLM)
    copies = [w, w.map(torch.clone), w.map(torch.clone)]
    monkeypatch.setattr(suite, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(suite, "weight_copies", lambda *_: copies)
    monkeypatch.setattr(suite, "Replay", lambda given: functools.partial(suite.run_all, given * 3))
    monkeypatch.setattr(gpu, "CALLS", 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")

    def contender(x, one):
        assert x.shape == (2, GLM[2])
        call = OTHERS["torch linear"](x, one)
        return lambda: calls.append(one) or call()

    def measure(contender, name="torch linear"):
        benchmark = Benchmark()
        suite.test_projection(benchmark, "glm-5", name, contender, FP8, 2, how, True)
        return benchmark

    benchmark = measure(contender)
    assert len(calls) == 1 + 7 * 9  # the check, then 7 rounds of at least 8 calls
    assert [calls[1:].count(one) for one in copies] == [7 * 3] * 3
    assert (suite.CLOCK.calls, benchmark.rounds, benchmark.group) == (9, 5, f"glm-5, {how}")
    assert benchmark.extra_info["row"] == "torch linear"
    moved = 2 * 160 * 6144 + 2 * (2 * 6144 + 2 * 128 + 4 * 32)
    assert benchmark.extra_info["memory floor"] == pytest.approx(moved / 4.8e6)
    with pytest.raises(AssertionError):
        measure(lambda x, one: lambda: tuple(2 * output for output in contender(x, one)()))
    with pytest.raises(AssertionError):  # ours round less, and have a tighter tolerance
        measure(lambda x, one: lambda: tuple(1.01 * output for output in contender(x, one)()), next(iter(OURS)))
    with pytest.raises(pytest.skip.Exception, match="vLLM skinny: not installed"):
        measure(OTHERS["vLLM skinny"], "vLLM skinny")


def test_projection_suite_has_every_pair_and_contender():
    assert {pair for name, _, pair in suite.CASES if name == "indexproj"} == set(PAIRS)
    assert {name for name, _, _ in suite.CASES} == {*OURS, *OTHERS}
    assert suite.MS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192, 16384)
    assert set(suite.QUICK_MS) <= set(suite.MS)


def test_bench_without_gpu(tmp_path):
    result = run(BENCH, tmp_path)
    for text in ("CPU time", "JITFunction", "streaming and upcasting", "MB beyond weights", "x │"):
        assert text in result.stdout
    assert "…" not in result.stdout  # nothing is cut off
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 100
    assert "needs a GPU" in result.stderr  # why the projection is skipped
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"host-cpu-time-of-a-projection.png", "loading-the-projection-of-8-layers.png"} <= plots
    assert [path.name for path in tmp_path.iterdir()] == ["plots"]


@pytest.fixture
def suites(tmp_path):
    """A folder with the conftest of benchmarks/ and a suite that measures nothing."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    for name in ("__init__.py", "conftest.py"):
        (folder / name).write_text((ROOT / "benchmarks" / name).read_text())
    (folder / "test_host.py").write_text(
        "MS = QUICK_MS = (1, 16)\n\n"
        "def test_fine(benchmark, m):\n"
        "    benchmark.group, benchmark.extra_info = 'fine', {'row': 'ours', 'column': m, 'unit': 'us'}\n"
        "    benchmark.pedantic(len, ('',), rounds=3)\n"
    )
    return folder


@pytest.mark.full
def test_saved_runs_can_be_compared(suites, tmp_path):
    outputs = [run(f"{line} --import-mode=importlib", tmp_path).stdout for line in (SAVE, COMPARE)]
    assert "(NOW)" in outputs[1]
    assert "(0001" in outputs[1]
    saved, _ = sorted(tmp_path.rglob("000*.json"))
    assert json.loads(saved.read_text())["machine_info"]["versions"].keys() == {"indexproj", "torch", "triton"}


@pytest.mark.full
def test_run_names_failing_suites(suites, monkeypatch):
    (suites / "test_broken.py").write_text("import nothing_of_that_name\n")
    (suites / "test_wrong.py").write_text("def test_wrong():\n    assert False\n")
    monkeypatch.setattr(report, "SUITES", suites)
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)
    results = report.run(quick=True)
    assert results["failed"] == ["test_broken.py", "test_wrong.py"]
    assert [benchmark["group"] for benchmark in results["benchmarks"]] == ["fine", "fine"]


def test_bench_exits_with_1_for_failing_suites(results, monkeypatch):
    results["failed"] = ["test_broken.py", "test_wrong.py"]
    monkeypatch.setattr(report, "run", lambda quick: results)
    result = bench(code=1)
    assert result.stderr.endswith("bench: these suites failed, see above: test_broken.py, test_wrong.py\n")
    assert "glm-5, device; us" in result.stdout
    assert json.loads(bench("--json", code=1).stdout) == results


def test_bench_without_results_exits_with_2(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    result = bench(code=2)
    assert "bench: the suites exited with 1 and no results" in result.stderr
    assert result.stdout == ""


def test_bench_refuses_a_bad_folder_before_measuring(monkeypatch):
    monkeypatch.setattr(report, "run", None)
    assert "bench: " in bench("--plot", __file__, code=2).stderr
