"""`indexproj bench`: what it shows of made-up measurements on a GPU, and of real ones on the CPU."""

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

from indexproj.benchmarks import report as bench
from indexproj.benchmarks import test_projection as suite
from indexproj.benchmarks.contenders import OTHERS, OURS, UnavailableError
from indexproj.benchmarks.gates import PAIRS, SHAPES
from indexproj.benchmarks.gpu import floors
from indexproj.kernels import reference
from support import GLM, weights
from support import PAIRS as MAKERS

MS = suite.MS
ROOT = Path(__file__).parents[2]
# pytest-benchmark measures nothing where it believes itself to be one of xdist's workers.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


ENVIRONMENT["PATH"] = f"{Path(sys.executable).parent}:{ENVIRONMENT['PATH']}"
PAGE = (ROOT / "docs/benchmarks.md").read_text()
COMMANDS = [
    line for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in block.splitlines()
]


def run(command, folder):
    options = {"cwd": folder, "env": ENVIRONMENT, "capture_output": True, "text": True, "timeout": 600}
    return subprocess.run(command, shell=True, **options)


def command(*words):
    """The lines of the page that begin so."""
    return [line for line in COMMANDS if line.split()[: len(words)] == [*words]]


def test_commands_of_the_page_are_all_run():
    """Here, and by tests/compile_only/test_command.py."""
    assert [line.split()[:2] for line in COMMANDS] == [
        ["pip", "install"], ["indexproj", "bench"], *[["pytest", "benchmarks/test_host.py"]] * 2,
        ["indexproj", "tune"], ["indexproj", "compile"],
    ]  # fmt: skip


@pytest.fixture
def measured():
    """As a run on an H100 would write it, with times that nobody measured."""
    benchmarks = []
    for shape in SHAPES:
        contenders = [(f"indexproj: {pair}", pair) for pair in PAIRS] + [(name, "BF16, BF16") for name in OTHERS]
        for place, (name, pair) in enumerate(contenders):
            for m in MS:
                if name == "vLLM skinny" and m > 16:
                    continue
                us = (2 + 0.3 * place) * (1 + m / 256)
                info = {"row": name, "column": m, "unit": "us"}
                info |= floors("NVIDIA H100 80GB HBM3", shape, pair, m, us / 1e6)
                stats = {"q1": us * 0.98e-6, "median": us * 1e-6, "q3": us * 1.05e-6}
                benchmarks.append({"group": f"{shape}, device", "extra_info": info, "stats": stats})
    machine = {"gpu": {"name": "a GPU that is made up"}, "versions": {"torch": "2.13.0", "triton": "3.9.0"}}
    return {"machine_info": machine, "datetime": "2026-11-24T12:00:00", "benchmarks": benchmarks, "failed": []}


def text_of(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_one_table_for_each_shape(measured):
    first, second = map(text_of, bench.tables(measured))
    assert "deepseek-v3.2, device; us" in first
    assert "glm-5, device; us" in second
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in first.splitlines() if "│" in line]
    lines = {name: cells for name, *cells in rows}
    assert list(lines) == [f"indexproj: {pair}" for pair in PAIRS] + list(OTHERS)
    assert lines["indexproj: BF16, BF16"][:3] == ["2.01", "2.02", "2.03"]
    assert lines["indexproj: BF16, BF16"][-1] == "130"
    assert [cell == "-" for cell in lines["vLLM skinny"]] == [m > 16 for m in MS]
    assert all(len(cells) == len(MS) for cells in lines.values())


def test_a_line_for_each_contender_and_the_floors(measured, tmp_path):
    bench.check_plotting(tmp_path / "plots")
    paths = bench.plot(measured, tmp_path / "plots")
    assert [path.name for path in paths] == ["deepseek-v3.2-device.png", "glm-5-device.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    _, axes = pyplot.subplots()
    bench._plot_lines(axes, bench.groups(measured)["glm-5, device"])
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert len(lines) == len(PAIRS) + len(OTHERS) + 2
    assert list(lines["torch linear"].get_xdata()) == list(MS)
    memory = lines["memory floor, by the data sheet"].get_ydata()
    least = (128 + 32) * 6144 * (1 / 2 + 1 / 32)  # MXFP4
    assert memory[0] == pytest.approx((least + 2 * 6144 + 2 * 128 + 4 * 32) / 3.35e6)
    assert lines["compute floor, by the data sheet"].get_ydata()[-1] == pytest.approx(2 * 16384 * 6144 * 160 / 989e6)
    # The weights of other pairs are up to four times as many bytes.
    (band,) = (found for found in axes.collections if found.get_label() == "MXFP4, MXFP4 to BF16, BF16")
    most = (2 * (128 + 32) * 6144 + 2 * 6144 + 2 * 128 + 4 * 32) / 3.35e6
    assert max(y for x, y in band.get_paths()[0].vertices if x == 1) == pytest.approx(most)
    pyplot.close("all")


def test_floors_of_a_gpu_that_is_not_known_are_left_out():
    assert list(floors("NVIDIA GeForce RTX 5090", "glm-5", "BF16, BF16", 1, 1e-6)) == ["TB/s"]
    known = floors("NVIDIA H200", "deepseek-v3.2", "FP8 128x128, BF16", 1, 2e-6)
    moved = 128 * 7168 + 56 * 4 + 2 * 64 * 7168 + 2 * 7168 + 2 * 128 + 4 * 64
    assert known["TB/s"] == pytest.approx(moved / 2e-6 / 1e12)
    assert known["memory floor"] == pytest.approx(moved / 4.8e6)
    assert known["share of the roofline"] == pytest.approx(moved / 4.8e6 / 2)


@pytest.mark.parametrize("name", [name for name in OTHERS if name.startswith("torch")])
@pytest.mark.parametrize("pair", MAKERS)
def test_torch_contenders_compute_the_projection(name, pair, mm_to_fp32):
    w, x = weights(pair, (128, 32, 512)), torch.randn(5, 512).bfloat16()
    for output, exact in zip(OTHERS[name](x, w)(), reference(x, w), strict=True):
        assert output.shape == exact.shape
        assert (output.double() - exact).abs().max() <= 2**-6 * exact.abs().max()


@pytest.mark.parametrize("name", [name for name in OTHERS if not name.startswith("torch")])
def test_what_is_not_installed_says_so(name):
    w, x = weights("fp8-dense", (128, 32, 512)), torch.randn(5, 512).bfloat16()
    with pytest.raises(UnavailableError, match="not installed"):
        OTHERS[name](x, w)
    if name != "vLLM skinny":
        with pytest.raises(UnavailableError, match="takes wk in FP8"):
            OTHERS[name](x, weights("dense-dense", (128, 32, 512)))


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
def test_the_suite_for_gpus_times_what_it_has_checked(monkeypatch, mm_to_fp32, how):
    """All of it but the GPU: graphs are lists of calls."""
    calls, w = [], weights("fp8-dense", GLM)
    copies = [w, w.map(torch.clone), w.map(torch.clone)]
    monkeypatch.setattr(suite, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(suite, "Replay", lambda given: functools.partial(suite.run_all, given * 22))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")

    def contender(x, one):
        assert x.shape == (5, GLM[2])
        call = OTHERS["torch linear"](x, one)
        return lambda: calls.append(one) or call()

    def measure(contender, name="torch linear"):
        benchmark = Benchmark()
        suite.test_projection(benchmark, lambda *_: copies, "glm-5", name, contender, suite.FP8, 5, how, True)
        return benchmark

    benchmark = measure(contender)
    assert len(calls) == 1 + 7 * 66  # checked, then 7 rounds of 64 calls at least
    assert [calls[1:].count(one) for one in copies] == [7 * 22] * 3
    assert (suite.CLOCK.calls, benchmark.rounds, benchmark.group) == (66, 5, f"glm-5, {how}")
    assert benchmark.extra_info["row"] == "torch linear"
    moved = 2 * 160 * 6144 + 5 * (2 * 6144 + 2 * 128 + 4 * 32)
    assert benchmark.extra_info["memory floor"] == pytest.approx(moved / 4.8e6)
    with pytest.raises(AssertionError):
        measure(lambda x, one: lambda: tuple(2 * output for output in contender(x, one)()))
    with pytest.raises(AssertionError):  # ours round less, and are held to it
        measure(lambda x, one: lambda: tuple(1.01 * output for output in contender(x, one)()), next(iter(OURS)))
    with pytest.raises(pytest.skip.Exception, match="vLLM skinny: not installed"):
        measure(OTHERS["vLLM skinny"], "vLLM skinny")


def test_every_pair_and_contender_is_in_the_suite():
    assert {pair for name, _, pair in suite.CASES if name == "indexproj"} == set(PAIRS)
    assert {name for name, _, _ in suite.CASES} == {*OURS, *OTHERS}
    assert MS == (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192, 16384)
    assert set(suite.QUICK_MS) <= set(MS)


def test_the_suites_run_without_a_gpu_and_say_what_they_leave_out(tmp_path):
    (line,) = command("indexproj", "bench")
    result = run(line, tmp_path)
    assert result.returncode == 0, result.stderr
    for text in (
        "Host, CPU time", "JITFunction", "streaming and upcasting", "MB beyond weights", "First launch", " x │",
        "No GPU here: the projection was not measured", "split_k 16x16x512",
    ):  # fmt: skip
        assert text in result.stdout
    assert "…" not in result.stdout  # nothing is cut off
    assert "there is none here" in result.stderr  # why the suite on a GPU is skipped
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert {"host-cpu-time-of-a-projection.png", "first-launch-of-a-kernel-for-an-h100-on-this-host.png"} <= plots
    assert [path.name for path in tmp_path.iterdir()] == ["plots"]


def test_two_runs_can_be_compared(tmp_path):
    for line in command("pytest"):
        result = run(f"{line} --quick --benchmark-storage={tmp_path}", ROOT)
        assert result.returncode == 0, result.stdout
    assert "(NOW)" in result.stdout
    assert "(0001" in result.stdout
    (saved, _) = sorted(tmp_path.rglob("*.json"))
    content = json.loads(saved.read_text())
    assert content["machine_info"]["versions"].keys() == {"indexproj", "kernels", "torch", "triton"}


def test_tuning_without_a_gpu_ends_with_its_reason(tmp_path):
    (line,) = command("indexproj", "tune")
    result = run(line, tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert "there is none here" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (["--plot", __file__], {}, "bench: --plot: "),
        ([], {"TRITON_INTERPRET": "1"}, "unset TRITON_INTERPRET"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(tmp_path, arguments, environment, message):
    command = [sys.executable, "-c", "from indexproj.__main__ import app; app()", "bench", *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_suite_that_fails_is_named_and_the_rest_is_shown(tmp_path):
    """Of a copy of the suites, in which one is broken from the start and one in a test."""
    package = tmp_path / "suites"
    package.mkdir()
    for name in ("__init__.py", "conftest.py", "test_load.py"):
        (package / name).write_text((ROOT / "benchmarks" / name).read_text())
    (package / "test_broken.py").write_text("import nothing_of_that_name\n")
    (package / "test_wrong.py").write_text("def test_wrong():\n    assert False\n")
    script = f"""
import sys
from importlib.machinery import ModuleSpec
from indexproj.__main__ import app
from indexproj.benchmarks import commands
from indexproj.benchmarks import report as bench
found = bench.find_spec
suites = ModuleSpec("indexproj.benchmarks", None, origin={str(package / "__init__.py")!r})
bench.find_spec = lambda name: suites if name == "indexproj.benchmarks" else found(name)
commands._print_static = lambda quick: None
sys.argv = ["indexproj", "bench", "--quick"]
app()
"""
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 1, result.stderr
    assert result.stderr.endswith("bench: failed, see above: test_broken.py, test_wrong.py\n")
    assert "streaming and upcasting" in result.stdout
    (package / "test_load.py").unlink()
    result = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert (result.returncode, result.stdout) == (2, "")
    assert "the suites ended with 1, without a result" in result.stderr


def test_suites_that_do_not_run_are_no_result(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1))
    with pytest.raises(RuntimeError, match="the suites ended with 1"):
        bench.run(quick=True)
