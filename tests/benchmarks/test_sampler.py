"""How `indexproj tune` compiles, checks and times kernels, with a made-up GPU."""

import contextlib
import itertools
import math
import os
from dataclasses import replace

import pytest
import torch

import fake_gpu
from indexproj.benchmarks import gpu, tune
from indexproj.benchmarks.tune import Case, WrongError
from indexproj.kernels import TARGETS, KernelConfig, workspace
from indexproj.kernels.dispatch import OUTS
from indexproj.kernels.formats import parse_pair

DENSE, FP8, SM_90 = parse_pair("BF16, BF16"), parse_pair("FP8 128x128, BF16"), TARGETS["sm_90"]
THREE = parse_pair("BF16, BF16, BF16")
SPLIT, GEMV = KernelConfig("split_k", 16, 64, 6, slices=4), KernelConfig("gemv", 8, 128, slices=8)


class Killer:
    """A target that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A kernel that compiles into tmp_path, in one process at a time."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: [0])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return KernelConfig("gemv", 1, 128, slices=8), (128, 16, 512), DENSE


def test_compile_all_skips_what_does_not_compile(kernel, tmp_path):
    config, shape, _ = kernel
    broken = config, shape, (None, None)
    assert list(tune.compile_all(SM_90, [kernel, broken], 300)) == [kernel]
    assert list(tmp_path.rglob("gemv_kernel.cubin"))


@pytest.mark.full
def test_compile_all_ends_in_time_or_when_killed(kernel):
    assert list(tune.compile_all(SM_90, [kernel], 0)) == []
    with pytest.raises(RuntimeError, match="a compiling process was killed"):
        list(tune.compile_all(Killer(), [kernel], 300))


@pytest.fixture
def measurer(monkeypatch, mm_to_fp32):
    """Makes a function that measures choices on a made-up GPU."""
    fake_gpu.install(monkeypatch.setattr)
    return lambda formats: tune._measurer(Case(5, (*(128, 32, 64)[: len(formats)], 1024), formats), fake_gpu.CPU)


def off_by(error):
    """A launch whose results are off if it has four warps."""

    def launch(x, operands, outs, signature, config):
        fake_gpu.launch(x, operands, outs, signature, config)
        for out in outs if config.num_warps == 4 else ():
            out *= 1 + error

    return launch


@pytest.mark.parametrize("formats", [DENSE, FP8, THREE])
def test_choices_run_on_every_copy_after_a_check(measurer, monkeypatch, formats):
    seen = []

    def launch(x, operands, *others, **named):
        assert x.shape == (5, 1024)
        seen.append(operands[0][0].data_ptr())
        fake_gpu.launch(x, operands, *others, **named)

    monkeypatch.setattr(gpu, "launch", launch)
    measure = measurer(formats)
    count = measure(SPLIT)
    assert len(set(seen)) == count > 1
    assert len(seen) == count + 1  # the check comes first
    assert measure(SPLIT) == count
    assert len(seen) == count + 1  # a graph is captured once
    assert formats == FP8 or [measure(outs) for outs in OUTS] == [count] * 2


@pytest.mark.parametrize("error", [1e-5, math.nan])
def test_wrong_kernels_are_found(measurer, monkeypatch, error):
    monkeypatch.setattr(gpu, "launch", off_by(error))
    measure = measurer(DENSE)
    measure(SPLIT)
    with pytest.raises(WrongError, match=r"Case\(m=5, .* split_k .* is off by (1.0e-05|nan) of the largest output"):
        measure(replace(SPLIT, num_warps=4))
    monkeypatch.setattr(gpu, "launch", lambda *_, **__: None)  # nobody writes the outputs
    with pytest.raises(WrongError):
        measurer(FP8)(SPLIT)


def test_torch_that_would_need_two_gemms_is_left_out(measurer, monkeypatch):
    monkeypatch.setattr(tune, "torch_mm", lambda *_: False)
    with pytest.raises(RuntimeError, match="torch is off by nan"):
        measurer(DENSE)("bf16")


def test_graphs_share_counters(measurer, monkeypatch):
    def replay(calls):
        workspace._reserved(fake_gpu.CPU, 1000)
        return lambda: 1.0

    monkeypatch.setattr(gpu, "replay", replay)
    workspace._reserves.clear()
    measure = measurer(DENSE)
    for warps in (1, 2, 8):
        measure(replace(GEMV, num_warps=warps))
        assert workspace._reserves[fake_gpu.CPU].numel() == workspace.RESERVE


@pytest.mark.parametrize(("off", "accepted"), [(2e-4, ["bf16"]), (2**-5, [])])
def test_inaccurate_torch_is_rejected(measurer, monkeypatch, off, accepted):
    torch_mm = tune.torch_mm

    def less_precise(x, matrices, outs):
        done = torch_mm(x, matrices, outs)
        for out in outs:
            out *= 1 + off
        return done

    monkeypatch.setattr(tune, "torch_mm", less_precise)
    measure = measurer(DENSE)
    for outs in OUTS:
        with contextlib.nullcontext() if outs in accepted else pytest.raises(RuntimeError, match="torch is off by"):
            measure(outs)


def test_replay_is_one_graph_of_many_calls(monkeypatch):
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 1.6  # milliseconds
            self.time = Event.now

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return end.time - self.time

    @contextlib.contextmanager
    def capture(graph):
        assert isinstance(graph, Graph)
        log.append("begin")
        yield
        log.append("end")

    for name, value in (("CUDAGraph", Graph), ("graph", capture), ("Event", Event), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    microseconds = gpu.replay([lambda name=name: log.append(name) for name in "abc"])
    assert log == [*"abc", "begin", *"abc" * 22, "end"]  # at least 64 calls
    assert microseconds() == pytest.approx(1600 / 66)
    assert log[-2:] == ["replay", "wait"]


def test_eager_times_every_call_until_the_gpu_is_done(monkeypatch):
    log, clock = [], itertools.count(0, 1.6e-3)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(gpu, "perf_counter", lambda: next(clock))
    microseconds = gpu.eager([lambda name=name: log.append(name) for name in "abc"])
    assert microseconds() == pytest.approx(1600 / 66)
    assert log == ["wait", *"abc" * 22, "wait"]
