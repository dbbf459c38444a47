"""`indexproj bench` and `report` on a made-up GPU: everything but the GPU and the clock is real."""

import json
import os
import re
import select
import signal
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import fake_gpu
from indexproj.benchmarks import bench, gpu, report
from indexproj.indexer.models import PAIRS, SHAPES, fits
from support import invoke

FP8, THREE = "FP8 128x128, BF16", "BF16, BF16, BF16"
SIDE = sys.executable
SMALL = ("--shape", "glm-5", "--pair", FP8, "--m", 3)


@pytest.fixture
def folder(monkeypatch, tmp_path, mm_to_fp32):
    fake_gpu.install(monkeypatch.setattr)
    monkeypatch.setattr(bench, "SERVER", (fake_gpu.__file__,))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


run = partial(invoke, "bench", code=0)


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines() if line]


def executable(name, script):
    Path(name).write_text(f"#!/bin/sh\n{script}\n")
    Path(name).chmod(0o755)


@pytest.mark.parametrize(
    ("shape", "pair", "weights_bytes", "out_bytes"),
    [("glm-5", FP8, 128 * 256 + 2 * 4 + 2 * 32 * 256, 160 + 32), ("deepseek-v4-pro", THREE, 2 * 320 * 256, 2 * 320)],
)
def test_every_contender_in_turn(folder, monkeypatch, shape, pair, weights_bytes, out_bytes):
    """out_bytes: of a row, in units of bf16."""
    scaled_mm = mock.Mock(side_effect=torch._scaled_mm)
    in_turn = mock.Mock(side_effect=gpu.in_turn)
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(gpu, "in_turn", in_turn)
    out = run("--shape", shape, "--pair", pair, "--m", 3).stdout
    start, empty, copy, *results, end = lines(folder)
    assert start["machine"] == end["machine"] == {"GPU": "made-up GPU"}
    assert start["versions"].keys() == {"indexproj", "torch", "triton", "INDEXPROJ_TUNED", "tuned cases"}
    assert (empty["contender"], empty["us"], copy["bytes"]) == ("empty kernel", [2.0] * gpu.ROUNDS, 6000)
    assert [(r["how"], r["contender"]) for r in results] == [*product(("device", "eager"), bench.CONTENDERS)]
    copies = 1 + -(-2 * 10**5 // weights_bytes)
    for result in results:
        assert (result["suite"], result["shape"], result["pair"], result["m"]) == ("projection", shape, pair, 3)
        assert result["us"] == [float(copies)] * gpu.ROUNDS
    moved, rows = weights_bytes + 3 * 2 * 256, sum(fake_gpu.SHAPES[shape][:-1])
    assert [r.get("bytes") for r in results[:3]] == [moved + 3 * 2 * out_bytes, moved + 3 * 2 * rows, None]
    assert f"## projection, {shape}, {pair}" in out
    assert [len(call.args[0]) for call in in_turn.mock_calls] == [1, 1, 5, 5]
    assert len({call.args[0].data_ptr() for call in scaled_mm.mock_calls}) == 1  # quantizes x once
    run(*SMALL, "--minutes", 0)
    assert len(lines(folder)) == 14 + 4  # appended; no time for more than ceilings


def test_most_telling_cases_first_and_filters(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda suite, case, makers, hows: asked.append((case, *makers)) or ())
    run()
    published = sum(fits(*each) for each in product(SHAPES, PAIRS))
    assert len(asked) == len(set(asked)) == published * len(bench.MS)
    assert asked[0] == (("deepseek-v3.2", FP8, 1), *bench.CONTENDERS)
    assert [case[2] for case, *_ in asked[::published]][:4] == [1, 16, 64, 8192]
    asked.clear()
    run("--pair", "MXFP8, MXFP8", "--m", 5, "--m", 6, "--shape", "glm-5", "--contender", "torch linear")
    assert asked == [(("glm-5", "MXFP8, MXFP8", m), "torch linear") for m in (5, 6)]


@pytest.mark.parametrize(
    ("name", "pair", "tolerance"),
    [("indexproj", THREE, 2e-6), ("indexproj", "BF16, BF16", 1e-4), ("indexproj, bf16", "BF16, BF16", 2**-8),
     ("torch mm, fp32", FP8, 2**-6), ("torch linear", FP8, 2**-6), ("torch _scaled_mm", FP8, 0.1)],
)  # fmt: skip
@pytest.mark.parametrize("factor", [0.5, 2])
def test_wrong_results_are_not_timed(folder, monkeypatch, name, pair, tolerance, factor):
    """A contender adds error to exact results: half as much as is tolerated, or twice. Only ours fail the run."""
    exact = fake_gpu.exact_outputs
    inexact = lambda x, matrices: [(1 + factor * tolerance) * each for each in exact(x, matrices)]  # noqa: E731
    monkeypatch.setattr(fake_gpu, "exact_outputs", inexact)
    if name.startswith("torch"):
        dtype = torch.float32 if name == "torch mm, fp32" else torch.bfloat16
        contender = lambda x, matrices: lambda: [each.to(dtype) for each in inexact(x, matrices)]  # noqa: E731
        monkeypatch.setitem(bench.CONTENDERS, name, (contender, bench.CONTENDERS[name][1]))
    shape = "deepseek-v4-pro" if pair == THREE else "glm-5"
    is_wrong, fails = factor > 1, factor > 1 and name.startswith("indexproj")
    result = run("--shape", shape, "--pair", pair, "--m", 3, "--contender", name, code=int(fails))
    assert (f"bench: {name}, device, {shape}, {pair}, 3: off by" in result.stderr) == fails
    assert [("us" in each, "wrong" in each) for each in lines(folder)[3:-1]] == [(not is_wrong, is_wrong)] * 2


@pytest.mark.parametrize("error", ["interrupted", "CUDA error: an illegal memory access"])
def test_interrupted_and_killed_runs_keep_results(folder, monkeypatch, error):
    """Each result is on disk before the next one is measured; the next run ends a line that was cut short."""
    seen = []

    def measure(suite, case, makers, hows):
        for number in range(3):
            seen.append(len(lines(folder)))
            yield {"suite": suite, "contender": str(number), "how": "device", "us": [1.0]}
        if error == "interrupted":
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise RuntimeError(f"{error}\nmore")

    monkeypatch.setattr(bench, "measure", measure)
    assert run(*SMALL, code=2).stderr == f"bench: {error}\n"
    assert seen == [3, 4, 5]
    with (folder / "results.jsonl").open("a") as file:
        file.write('{"suite": "proj')  # the process was killed here
    run(*SMALL, "--minutes", 0)
    assert len(report.read(folder)) == 6 + 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--contender", "cublas"), "--contender must be one of indexproj;"),
        (("--ab", "python3"), "--ab needs two sides"),
        (("--ab", "no-such-python", "--ab", "python3"), "No such file or directory: 'no-such-python'"),
        (("--ab", '{"regime": "gem"}', "--ab", SIDE, *SMALL), "KernelConfig.__init__() missing 2 required positional"),
        (("--output", __file__), "File exists"),
        (("--output", "full"), "No space left on device"),
        (("--counters", *SMALL), "No such file or directory: 'ncu'"),
    ],
)
def test_bad_input_exits_with_2(folder, arguments, message):
    (folder.parent / "full").mkdir()
    (folder.parent / "full/results.jsonl").symlink_to("/dev/full")
    result = run(*arguments, code=2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_without_a_supported_gpu(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    properties = SimpleNamespace(name="Tesla T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for is_available, message in ((True, "Tesla T4 is sm_75; the kernels need sm_80"), (False, "there is none\n")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=is_available: found)
        assert message in run(code=2).stderr
    monkeypatch.setattr(gpu, "INTERPRETED", True)
    assert "TRITON_INTERPRET" in run(code=2).stderr
    assert not [*tmp_path.iterdir()]


def test_ab_of_two_processes(folder):
    """One has another clock, or measures a config that is wrong: one with one warp."""
    slower = f"env SLOWER=3 {SIDE}"
    config = '{"regime": "gemv", "block_m": 4, "block_k": 128, "num_warps": 1}'
    run(*SMALL, "--ab", SIDE, "--ab", slower)
    start, *_, a, b, c, d, _ = lines(folder)
    assert start[f"versions of A: {SIDE}"] == start["versions"]
    for one, two in ((a, b), (c, d)):
        assert (one["suite"], one["contender"], two["contender"]) == ("A/B", f"A: {SIDE}", f"B: {slower}")
        assert [own / base for own, base in zip(two["us"], one["us"], strict=True)] == [3.0] * gpu.ROUNDS
        assert one["bytes"] == two["bytes"]
    result = run(*SMALL, "--ab", SIDE, "--ab", config, code=1)
    assert result.stderr.count("off by 1.0e+00 of the largest output") == 1
    assert bench.contender_of(config)[1] == bench.CONTENDERS["indexproj"][1]  # tolerances
    assert [each["how"] for each in lines(folder)[-3:-1]] == ["device"] * 2  # a config's launches are not those of A


@pytest.mark.parametrize("output", ["Welcome", "3", "null", '"error"', "{}", '{"error": "no wrong"}', ""])
def test_a_side_without_the_protocol_is_ended(folder, output):
    """With all of its processes, which hold a pipe open, and before an answer is taken for that to a later question."""
    os.mkfifo("held")
    held, hangup = os.open("held", os.O_RDONLY | os.O_NONBLOCK), select.poll()
    hangup.register(held)
    versions, late = """echo '{"answer": {}}'""", """while echo '{"answer": 1.0}'; do read -r line || exit; done"""
    executable("side", f"exec 3> held; sleep 100 & read -r line; {versions}; read -r line; echo '{output}'; {late}")
    run(*SMALL, "--ab", "./side", "--ab", SIDE, code=2)
    errors = [each["error"].partition(", found ") for each in lines(folder) if "error" in each]
    expected = "A: ./side: expected a Python that has indexproj and prints nothing else"
    assert [error[::2] for error in errors] == [(expected, f"output {output!r}"), (expected, "that the process ended")]
    assert hangup.poll(10_000) == [(held, select.POLLHUP)]
    os.close(held)


def test_a_side_prepares_a_case_once_and_answers_errors(folder, monkeypatch, capsys):
    unknown, known = ([["indexproj", [shape, FP8, 3], "device"]] for shape in ("deepseek-v9", "glm-5"))
    timer = mock.Mock(side_effect=fake_gpu.timer)
    monkeypatch.setattr(gpu, "timer", timer)
    monkeypatch.setattr(sys, "stdin", map(json.dumps, unknown + 3 * known))
    bench.serve()
    failed, *measured = map(json.loads, capsys.readouterr().out.splitlines())
    assert failed == {"error": "KeyError('deepseek-v9')", "wrong": False}
    assert [each["answer"] > 1 for each in measured] == [True] * 3
    assert timer.call_count == 1


def test_counters(folder, monkeypatch):
    monkeypatch.setenv("PATH", ".:/usr/bin:/bin")
    csv = '==PROF== Connected\n"ID","Metric Name","Metric Unit","Metric Value"\n'
    csv += '"0","dram__bytes.sum","byte","1,234"\n"0","","",""'
    executable("ncu", f"cat > request; echo $* > arguments; echo '{csv}'")
    out = run(*SMALL, "--counters", "--contender", "torch linear").stdout
    found = lines(folder)[-2]
    assert (found["suite"], found["m"], found["counters"]) == ("counters", 3, {"dram__bytes.sum": "1,234 byte"})
    assert json.loads(Path("request").read_text()) == ["indexproj", ["glm-5", FP8, 3], "eager"]
    assert "--launch-count 1" in Path("arguments").read_text()
    assert re.search(r"dram__bytes.sum +\| 1,234 byte", out)
    message = "ncu: ==ERROR== ERR_NVGPUCTRPERM: no permission"
    executable("ncu", f"cat > request; echo '{message[5:]}'")
    result = run(*SMALL, "--m", 1, "--counters", "--contender", "torch linear", code=2)
    assert result.stderr == "".join(f"bench: indexproj, device, glm-5, {FP8}, {m}: {message}\n" for m in (3, 1))
    assert re.search(rf"error +\| {message} \| {message} \|", report.markdown(report.read(folder)))
