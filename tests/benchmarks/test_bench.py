"""`indexproj bench` and `report` on a made-up GPU: everything but the GPU and the clock is real."""

import json
import re
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import fake_gpu
from indexproj.benchmarks import bench, gpu, report
from indexproj.indexer.models import PAIRS, SHAPES, fits
from indexproj.kernels import KernelConfig
from indexproj.kernels.formats import parse_pair
from support import ALL_PAIRS, invoke, random_matrix

FP8 = "FP8 128x128, BF16"
SIDE = f"{sys.executable} {fake_gpu.__file__}"
SMALL = ("--shape", "glm-5", "--pair", FP8, "--m", 3)
DOCS = (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()


@pytest.fixture
def folder(monkeypatch, tmp_path, mm_to_fp32):
    """Where `bench` of the made-up GPU writes."""
    fake_gpu.install(monkeypatch.setattr)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


def run(*arguments, code=0):
    result = invoke("bench", *arguments)
    assert result.exit_code == code, result.output
    return result


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_contender_in_turn(folder):
    out = run(*SMALL).stdout
    start, empty, copy, *results, end = lines(folder)
    assert start["machine"] == end["machine"] == {"GPU": "made-up GPU"}
    assert start["versions"].keys() == {"indexproj", "torch", "triton"}
    assert (empty["contender"], empty["us"], copy["bytes"]) == ("empty kernel", [2.0] * bench.ROUNDS, 6000)
    assert [(r["how"], r["contender"]) for r in results] == [
        (how, name) for how in ("device", "eager") for name in bench.CONTENDERS
    ]
    weights_bytes = 128 * 256 + 2 * 4 + 2 * 32 * 256
    copies = 1 + -(-2 * 10**5 // weights_bytes)
    for result in results:
        assert (result["suite"], result["shape"], result["pair"], result["m"]) == ("projection", "glm-5", FP8, 3)
        assert result["us"] == [float(copies)] * bench.ROUNDS
    moved = weights_bytes + 3 * (2 * 256 + 2 * 128 + 4 * 32)
    assert [r.get("bytes") for r in results[:3]] == [moved, moved - 3 * 2 * 32, None]
    assert "## projection, glm-5, FP8 128x128, BF16" in out
    run("--minutes", 0)
    assert len(lines(folder)) == 14 + 4  # appended; no time for more than ceilings


def test_three_matrices(folder):
    run("--shape", "deepseek-v4-pro", "--m", 3)
    _, _, _, *results, _ = lines(folder)
    assert [(r["pair"], r["contender"]) for r in results[:5]] == [
        ("BF16, BF16, BF16", name) for name in bench.CONTENDERS
    ]
    rows, k = 192 + 64 + 32, 256
    moved = 2 * (rows + 3) * k + 3 * 4 * rows
    assert [r.get("bytes") for r in results[:3]] == [moved, moved - 3 * 2 * rows, None]


def test_contenders_take_turns():
    order, times = [], iter(range(100))
    timers = {name: lambda name=name: order.append(name) or next(times) for name in "abc"}
    assert bench.in_turn(timers) == {name: list(range(3 + i, 48, 3)) for i, name in enumerate("abc")}
    assert order == [*"abc"] * (bench.ROUNDS + 1)


def test_most_telling_cases_first_and_filters(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda suite, case, makers: asked.append((case, *makers)) or ())
    run()
    assert len(asked) == len(set(asked)) == len(bench.MS) * sum(fits(*each) for each in product(SHAPES, PAIRS))
    assert asked[0] == (("deepseek-v3.2", FP8, 1), *bench.CONTENDERS)
    assert [case[2] for case, *_ in asked[:8:2]] == [1, 16, 64, 8192]
    asked.clear()
    run("--pair", "MXFP8, MXFP8", "--m", 5, "--m", 6, "--shape", "glm-5", "--contender", "torch linear")
    assert asked == [(("glm-5", "MXFP8, MXFP8", m), "torch linear") for m in (5, 6)]


@pytest.mark.parametrize(("name", "off", "code"), [("project_all", 1.01, 1), ("linear", 1.1, 0)])
def test_wrong_results_are_not_timed(folder, monkeypatch, name, off, code):
    """Ours fail the run; others are left out of it."""
    right = getattr(bench, name)

    def wrong(*arguments, **options):
        result = right(*arguments, **options)
        return off * result if isinstance(result, torch.Tensor) else tuple(off * each for each in result)

    monkeypatch.setattr(bench, name, wrong)
    if name == "linear":
        monkeypatch.setitem(
            bench.CONTENDERS, "torch linear", (lambda x, w: bench.by_torch(wrong, x, w), {torch.bfloat16: 2**-6})
        )
    result = run(*SMALL, code=code)
    errors = [each for each in lines(folder) if "error" in each]
    assert {each["contender"] for each in errors} == (
        {"torch linear"} if not code else {"indexproj", "indexproj, bf16"}
    )
    assert all(each["wrong"] and "us" not in each and "off by" in each["error"] for each in errors)
    assert ("bench: indexproj, device, glm-5, FP8 128x128, BF16, 3: off by" in result.stderr) == bool(code)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("CUDA error: an illegal memory access\nmore")])
def test_interrupted_run_keeps_results(folder, monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(gpu, "eager", lambda calls: fail)
    result = run(*SMALL, code=2)
    assert result.stderr.strip() == f"bench: {str(error).partition(chr(10))[0] or 'interrupted'}"
    assert [each["how"] for each in lines(folder)[3:]] == ["device"] * 5


def test_killed_run_keeps_results(folder):
    """Each result is on disk before the next one is measured."""
    seen = []

    def measure(suite, case, makers):
        for number in range(3):
            seen.append(len(lines(folder)))
            yield {"suite": suite, "contender": str(number), "how": "device", "us": [1.0]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure", measure)
        run(*SMALL)
    assert seen == [3, 4, 5]
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"suite": "proj')  # the process was killed here
    assert len(report.read(folder)) == 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--shape", "glm"),
            "--shape must be one of deepseek-v3.2; glm-5; deepseek-v4-pro; deepseek-v4-flash; got",
        ),
        (("--pair", "FP8"), "--pair must be one of"),
        (("--contender", "cublas"), "--contender must be one of indexproj;"),
        (("--ab", "python3"), "--ab needs two sides"),
        (("--ab", "python3") * 3, "--ab needs two sides"),
        (("--ab", "no-such-python", "--ab", "python3"), "No such file or directory: 'no-such-python'"),
        (("--ab", "false", "--ab", SIDE), "bench: A: false: the process ended"),
        (("--ab", '{"regime": "gem"}', "--ab", SIDE), "--ab: expected the fields of a KernelConfig, got"),
        (("--output", __file__), "File exists"),
        (("--output", "full"), "No space left on device"),
        (("--counters", *SMALL), "No such file or directory: 'ncu'"),
    ],
)
def test_bad_input_exits_with_2(folder, arguments, message, monkeypatch):
    (folder.parent / "full").mkdir()
    (folder.parent / "full/results.jsonl").symlink_to("/dev/full")
    result = run(*arguments, code=2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(code=2).stderr == "bench: needs a GPU, but there is none\n"
    monkeypatch.setattr(gpu, "INTERPRETED", True)
    assert "TRITON_INTERPRET" in run(code=2).stderr
    assert not [*tmp_path.iterdir()]


def test_unsupported_gpu(monkeypatch):
    old = type("Properties", (), {"major": 7, "minor": 5, "name": "Tesla T4", "multi_processor_count": 40})
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_properties", old)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert "Tesla T4 is sm_75; the kernels need sm_80" in run(code=2).stderr


@pytest.mark.parametrize("name", [name for name in bench.CONTENDERS if name.startswith("torch")])
@pytest.mark.parametrize("pair", [*ALL_PAIRS, "BF16, BF16, BF16"])
def test_torch_contenders(name, pair, mm_to_fp32):
    matrices = tuple(random_matrix(format, n, 512) for format, n in zip(parse_pair(pair), (128, 32, 64), strict=False))
    x = torch.randn(5, 512).bfloat16()
    contender, tolerances = bench.CONTENDERS[name]
    for output, exact in zip(contender(x, matrices)(), fake_gpu.exact_outputs(x, matrices), strict=True):
        assert output.shape == exact.shape
        assert (output.double() - exact).abs().max() <= tolerances[output.dtype] * exact.abs().max()


def test_ab_of_two_processes(folder):
    """The second one has another clock."""
    slower = folder.parent / "slower.py"
    slower.write_text(Path(fake_gpu.__file__).read_text().replace("float(len(calls))", "3.0 * len(calls)"))
    run(*SMALL, "--ab", SIDE, "--ab", f"{sys.executable} {slower}")
    start, *_, a, b, c, d, _ = lines(folder)
    assert start[f"versions of A: {SIDE}"] == start["versions"]
    for one, other in ((a, b), (c, d)):
        assert (one["suite"], one["contender"][:2], other["contender"][:2]) == ("A/B", "A:", "B:")
        assert [own / base for own, base in zip(other["us"], one["us"], strict=True)] == [3.0] * bench.ROUNDS
    assert "3 (3-3)" in report.markdown(report.read(folder))


def test_ab_side_with_a_config(folder, monkeypatch):
    """In this process, as the other one would take the real GPU."""
    config, configs = KernelConfig("gemv", block_m=4, block_k=128, slices=8), []

    def launch(*arguments, config, **options):
        configs.append(config)
        fake_gpu.launch(*arguments, config=config, **options)

    monkeypatch.setattr(gpu, "launch", launch)
    text = json.dumps({"regime": "gemv", "block_m": 4, "block_k": 128, "slices": 8})
    requests = [None, [text, ["glm-5", FP8, 3], "device"], ["indexproj", ["glm-5", FP8, 3], "eager"]]
    monkeypatch.setattr(sys, "stdin", map(json.dumps, requests))
    printed = []
    monkeypatch.setattr("builtins.print", lambda text, flush: printed.append(json.loads(text)))
    bench.serve()
    assert printed == [{"answer": bench.versions()}, {"answer": 6.0}, {"answer": 6.0}]
    assert set(configs) == {config}


@pytest.fixture
def ncu(folder, monkeypatch):
    """Makes an ncu that prints some text."""

    def make(text):
        tool = folder.parent / "ncu"
        tool.write_text(f"#!/bin/sh\ncat > request\necho $* > arguments\ncat <<'END'\n{text}\nEND\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder.parent}:/usr/bin:/bin")

    return make


def test_counters(folder, ncu):
    ncu('==PROF== Connected\n"ID","Metric Name","Metric Unit","Metric Value"\n'
        '"0","dram__bytes.sum","byte","1,234"\n"0","Executed Ipc","inst/cycle","0.5"\n"0","","",""')  # fmt: skip
    out = run(*SMALL, "--counters", "--contender", "torch linear").stdout
    found = lines(folder)[-2]
    assert (found["suite"], found["m"]) == ("counters", 3)
    assert found["counters"] == {"dram__bytes.sum": "1,234 byte", "Executed Ipc": "0.5 inst/cycle"}
    assert json.loads((folder.parent / "request").read_text()) == ["indexproj", ["glm-5", FP8, 3], "eager"]
    assert "--launch-count 1" in (folder.parent / "arguments").read_text()
    assert re.search(r"dram__bytes.sum +\| 1,234 byte", out)
    ncu("==ERROR== ERR_NVGPUCTRPERM: no permission")
    assert run(*SMALL, "--counters", code=2).stderr == "bench: ncu: ==ERROR== ERR_NVGPUCTRPERM: no permission\n"


def made_up(folder, name="made-up GPU"):
    """Results that nobody measured: ours take 2 us per row, torch 3."""
    machine = {"machine": {"GPU": name, "clocks.sm": "1980 MHz"}, "versions": {"torch": "2.13.0"}, "date": "today"}
    found = [machine, {"suite": "ceilings", "contender": "copy", "how": "device", "us": [2.0], "bytes": 6000}]
    head = {"suite": "projection", "shape": "glm-5", "pair": FP8, "how": "device"}
    for m in (16, 1, 64):
        torch_us = {"torch mm, fp32": 4 * m, "torch linear": 3 * m, "torch _scaled_mm": m}
        for contender, us in {"indexproj": 2 * m, **torch_us}.items():
            times = {"us": [0.9 * us, us, us, 1.1 * us, us]} | ({"bytes": 3000 * m} if us == 2 * m else {})
            found.append(head | {"m": m, "contender": contender} | times)
    found.append(head | {"m": 64, "contender": "indexproj, bf16", "error": "not supported", "wrong": False})
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in found))
    return folder


def test_report(tmp_path):
    folder = made_up(tmp_path / "results")
    result = invoke("report", folder)
    assert result.exit_code == 0, result.output
    text = (folder / "report.md").read_text()
    assert "- GPU made-up GPU, clocks.sm 1980 MHz, torch 2.13.0, date today" in text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| 1 ")]
    assert rows[0] == ["1", "indexproj", "2 (2-2)", "0.667 (0.667-0.667)", "1.5", "50%"]
    assert rows[2][:4] == ["1", "torch linear", "3 (3-3)", "1 (1-1)"]
    assert rows[3][3] == "0.333 (0.333-0.333)"
    assert "not supported" in text
    assert text.index("| 1 ") < text.index("| 16 ") < text.index("| 64 ")
    assert (folder / "projection-glm-5-fp8-128x128-bf16.png").read_bytes().startswith(b"\x89PNG")
    assert "made-up" not in DOCS


def test_plot_shows_quartiles_and_the_memory_floor(tmp_path):
    (group,) = list(report.groups(report.read(made_up(tmp_path / "results"))).values())[1:]
    axes = Figure().subplots()
    report.draw(axes, {key: how["device"] for key, how in group.items() if "us" in how["device"]}, rate=3000.0)
    lines = {line.get_label().split(":")[0]: [*zip(*line.get_data(), strict=True)] for line in axes.lines}
    assert lines["memory floor"] == [(1, 1.0), (16, 16.0), (64, 64.0)]
    assert lines["torch linear"] == [(1, 3), (16, 48), (64, 192)]
    assert len(axes.collections) == 4


def test_report_of_a_second_run_of_one_contender(tmp_path):
    """Its results replace those of the first run, and are not compared with them."""
    results = report.read(made_up(tmp_path / "results"))
    newer = next(result for result in results if result.get("contender") == "indexproj") | {"us": [1.0, 1.0]}
    text = report.markdown([*results, results[0], newer])
    (row,) = [line for line in text.splitlines() if line.startswith("| 16 | indexproj ")]
    assert [cell.strip() for cell in row.split("|")[3:5]] == ["1 (1-1)", ""]


NO_NUMBERS = '{"suite": "host", "contender": "a", "how": "cpu", "us": ["b"]}'


def test_report_after_a_killed_run(tmp_path):
    """The next run ends the line that was cut short, and the report leaves it out."""
    folder = made_up(tmp_path / "results")
    before = report.read(folder)
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"suite": "projec\n\n' + json.dumps(before[-1]) + "\n")
    assert report.read(folder) == [*before, before[-1]]


@pytest.mark.parametrize("line", ["3", "null", "[]", '{"suite": "projection"}', NO_NUMBERS])
def test_report_of_a_bad_line(tmp_path, line):
    folder = made_up(tmp_path / "results")
    with (folder / "results.jsonl").open("a") as file:
        file.write(line + "\n")
    result = invoke("report", folder)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"report: {folder}/results.jsonl, line 16: expected a result of `indexproj bench`")


def test_report_errors(tmp_path):
    assert "found none" in invoke("report", tmp_path).stderr
    folder = made_up(tmp_path / "results")
    made_up(tmp_path / "other", "another GPU")
    (tmp_path / "other/results.jsonl").rename(folder / "other.jsonl")
    result = invoke("report", folder)
    assert result.exit_code == 2
    assert "expected results of one GPU, found another GPU, made-up GPU" in result.stderr
