"""`indexproj bench` and `report` on a made-up GPU: everything but the GPU and the clock is real."""

import contextlib
import json
import os
import re
import signal
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path
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
    """Where `bench` of the made-up GPU writes."""
    fake_gpu.install(monkeypatch.setattr)
    monkeypatch.setattr(bench, "SERVER", (fake_gpu.__file__,))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "results"


run = partial(invoke, "bench", code=0)


def lines(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines() if line]


@pytest.mark.parametrize(
    ("shape", "pair", "weights_bytes", "out_bytes"),
    [("glm-5", FP8, 128 * 256 + 2 * 4 + 2 * 32 * 256, 160 + 32), ("deepseek-v4-pro", THREE, 2 * 288 * 256, 2 * 288)],
)
def test_every_contender_in_turn(folder, shape, pair, weights_bytes, out_bytes):
    """out_bytes: of a row, in units of bf16."""
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
    run(*SMALL, "--minutes", 0)
    assert len(lines(folder)) == 14 + 4  # appended; no time for more than ceilings


def test_scaled_mm_quantizes_x_once(folder, monkeypatch):
    codes, multiply = set(), torch._scaled_mm
    spy = lambda a, *others, **named: codes.add(a.data_ptr()) or multiply(a, *others, **named)  # noqa: E731
    monkeypatch.setattr(torch, "_scaled_mm", spy)
    run(*SMALL, "--contender", "torch _scaled_mm")
    assert len(codes) == 1


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


@pytest.mark.parametrize(("names", "code"), [({"indexproj", "indexproj, bf16"}, 1), ({"torch linear"}, 0)])
def test_wrong_results_are_not_timed(folder, monkeypatch, names, code):
    """Ours fail the run; others are left out of it."""
    for name in names:
        right, tolerances = bench.CONTENDERS[name]
        wrong = lambda x, matrices, right=right: lambda: [1.1 * each for each in right(x, matrices)()]  # noqa: E731
        monkeypatch.setitem(bench.CONTENDERS, name, (wrong, tolerances))
    result = run(*SMALL, code=code)
    errors = [each for each in lines(folder) if "error" in each]
    assert {each["contender"] for each in errors} == names
    assert all(each["wrong"] and "us" not in each and "off by" in each["error"] for each in errors)
    assert ("bench: indexproj, device, glm-5, FP8 128x128, BF16, 3: off by" in result.stderr) == bool(code)


@pytest.mark.parametrize(
    ("name", "pair", "tolerance"),
    [
        ("indexproj", FP8, 2e-6), ("indexproj", THREE, 2e-6), ("indexproj", "BF16, BF16", 1e-4),
        ("indexproj, bf16", FP8, 2**-8), ("indexproj, bf16", "BF16, BF16", 2**-8),
        ("torch mm, fp32", FP8, 2**-6), ("torch linear", FP8, 2**-6), ("torch _scaled_mm", FP8, 0.1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("factor", [0.5, 2])
def test_tolerances(folder, monkeypatch, name, pair, tolerance, factor):
    """A contender that adds error to exact results: half as much as is tolerated, or twice."""
    case = bench.Case("deepseek-v4-pro" if pair == THREE else "glm-5", pair, 3)
    dtype = torch.bfloat16 if name in ("indexproj, bf16", "torch linear", "torch _scaled_mm") else torch.float32

    def contender(x, matrices):
        return lambda: [((1 + factor * tolerance) * each).to(dtype) for each in fake_gpu.exact_outputs(x, matrices)]

    monkeypatch.setitem(bench.CONTENDERS, name, (contender, bench.CONTENDERS[name][1]))
    with pytest.raises(gpu.WrongError, match="off by") if factor > 1 else contextlib.nullcontext():
        bench.timer(name, case, "device")


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
        (("--shape", "glm"), "--shape must be one of deepseek-v3.2; glm-5; deepseek-v4-pro; deepseek-v4-flash; got"),
        (("--pair", "FP8"), "--pair must be formats such as"),
        (("--pair", THREE, "--shape", "glm-5"), "no --pair has as many formats as a --shape has matrices"),
        (("--contender", "cublas"), "--contender must be one of indexproj;"),
        (("--ab", "python3"), "--ab needs two sides"),
        (("--ab", "no-such-python", "--ab", "python3"), "No such file or directory: 'no-such-python'"),
        (("--ab", "false", "--ab", SIDE), "A: false: expected a Python that has indexproj and prints nothing else, fo"),
        (("--ab", "echo Welcome", "--ab", SIDE), "A: echo Welcome: expected a Python that has indexproj and prints no"),
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
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(code=2).stderr == "bench: needs a GPU, but there is none\n"
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "INTERPRETED", True)
        assert "TRITON_INTERPRET" in run(code=2).stderr
    old = mock.Mock(major=7, minor=5, multi_processor_count=40)
    old.name = "Tesla T4"
    cuda = {"is_available": lambda: True, "current_device": lambda: 0, "get_device_properties": lambda _: old}
    with mock.patch.multiple(torch.cuda, **cuda):
        assert "Tesla T4 is sm_75; the kernels need sm_80" in run(code=2).stderr
    assert not [*tmp_path.iterdir()]


def test_ab_of_two_processes(folder):
    """One has another clock, or measures a config that is wrong: one with one warp."""
    slower = f"env SLOWER=3 TABLE=bf16.json {SIDE}"
    config = '{"regime": "gemv", "block_m": 4, "block_k": 128, "num_warps": 1}'
    run(*SMALL, "--ab", SIDE, "--ab", slower)
    start, *_, a, b, c, d, _ = lines(folder)
    assert start[f"versions of A: {SIDE}"] == start["versions"]
    for one, two in ((a, b), (c, d)):
        assert (one["suite"], one["contender"], two["contender"]) == ("A/B", f"A: {SIDE}", f"B: {slower}")
        assert [own / base for own, base in zip(two["us"], one["us"], strict=True)] == [3.0] * gpu.ROUNDS
        assert one["bytes"] == two["bytes"]
    assert "3 (3-3)" in report.markdown(report.read(folder))
    result = run(*SMALL, "--ab", SIDE, "--ab", config, code=1)
    assert result.stderr.count("off by 1.0e+00 of the largest output") == 1
    assert [each["how"] for each in lines(folder)[-3:-1]] == ["device"] * 2  # a config's launches are not those of A


def is_running(pid):
    """Zombies are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("output", ["Welcome", "3", "null", '"error"', "{}", '{"error": "no wrong"}', ""])
def test_a_side_without_the_protocol_is_ended(folder, output):
    """With all of its processes, so that no later answer is taken for another question's."""
    script = folder.parent / "side"
    script.write_text(f"#!/bin/sh\necho $$ >> pids\nsleep 100 &\necho $! >> pids\necho '{output}'\nwait\n")
    script.chmod(0o755)
    message = "B: ./side: expected a Python that has indexproj and prints nothing else, found output "
    assert message + repr(output) in run(*SMALL, "--ab", SIDE, "--ab", "./side", code=2).stderr
    pids, deadline = (folder.parent / "pids").read_text().split(), time.monotonic() + 10
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_no_answer_is_read_after_an_unreadable_one(folder):
    """The side answers the request for versions, and the next request twice."""
    script = folder.parent / "side"
    late = """while echo '{"answer": 1.0}'; do read -r line || exit; done"""
    script.write_text(f"""#!/bin/sh\nread -r line\necho '{{"answer": {{}}}}'\nread -r line\necho Warning\n{late}\n""")
    script.chmod(0o755)
    run(*SMALL, "--ab", "./side", "--ab", SIDE, code=2)
    errors = [each["error"] for each in lines(folder) if "error" in each]
    assert [error.rpartition("found ")[2] for error in errors] == ["output 'Warning'", "that the process ended"]


def test_a_side_without_the_shape_answers(folder, monkeypatch, capsys):
    requests = [["indexproj", ["deepseek-v9", FP8, 3], "device"], ["indexproj", ["glm-5", FP8, 3], "device"]]
    monkeypatch.setattr(sys, "stdin", map(json.dumps, requests))
    bench.serve()
    failed, measured = map(json.loads, capsys.readouterr().out.splitlines())
    assert failed == {"error": "KeyError('deepseek-v9')", "wrong": False}
    assert measured["answer"] > 1


def test_contenders_take_turns(folder, monkeypatch):
    """One call of each per round, and its checks only before the first."""
    log = []

    def timer(choice, tolerances, how):
        log.append("check")
        return lambda: log.append(choice) or 1.0

    monkeypatch.setattr(bench, "sampler_of", lambda *_: mock.Mock(timer=timer))
    monkeypatch.setattr(bench, "CONTENDERS", {name: (name, {}) for name in "ab"})
    list(
        bench.measure("projection", bench.Case("glm-5", FP8, 3), {n: partial(bench.timer, n) for n in "ab"}, ["eager"])
    )
    assert log == ["check"] * 2 + ["a", "b"] * (1 + gpu.ROUNDS)
    log.clear()
    request = json.dumps(["a", ["glm-5", FP8, 3], "eager"])
    monkeypatch.setattr(sys, "stdin", [request] * 3)
    bench.serve()
    assert log == ["check", "a", "a", "a"]


def test_counters(folder, monkeypatch):
    def ncu(text):
        tool = folder.parent / "ncu"
        tool.write_text(f"#!/bin/sh\ncat > request\necho $* > arguments\ncat <<'END'\n{text}\nEND\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder.parent}:/usr/bin:/bin")

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
    result = run(*SMALL, "--m", 1, "--counters", "--contender", "torch linear", code=2)
    message = "ncu: ==ERROR== ERR_NVGPUCTRPERM: no permission"
    assert result.stderr == "".join(f"bench: indexproj, device, glm-5, {FP8}, {m}: {message}\n" for m in (3, 1))
    assert re.search(rf"error +\| {message} \| {message} \|", report.markdown(report.read(folder)))
