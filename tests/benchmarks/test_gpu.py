"""How `bench` and `tune` check and time calls on a GPU, and how `tune` compiles, with a made-up GPU."""

import contextlib
import math
import os
from dataclasses import replace

import pytest
import torch

import fake_gpu
from indexproj.benchmarks import gpu, tune
from indexproj.benchmarks.gpu import Sampler, WrongError
from indexproj.kernels import TARGETS, KernelConfig, workspace
from indexproj.kernels.dispatch import OUTS
from indexproj.kernels.formats import parse_pair

DENSE, FP8, THREE = map(parse_pair, ("BF16, BF16", "FP8 128x128, BF16", "BF16, BF16, BF16"))
SPLIT = KernelConfig("split_k", 16, 64, 6, slices=4)


class Killer:
    """A target that ends the process that unpickles it."""

    def __reduce__(self):
        return os._exit, (9,)


@pytest.mark.parametrize("case", ["broken", pytest.param("late", marks=pytest.mark.full), "killed"])
def test_compile_all(monkeypatch, tmp_path, case):
    """It skips what does not compile, and ends in time or with its process."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: [0])
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = KernelConfig("gemv", 1, 128, slices=8), (128, 16, 512), DENSE
    if case == "killed":
        with pytest.raises(RuntimeError, match="a compiling process was killed"):
            list(tune.compile_all(Killer(), [kernel], 300))
        return
    broken = *kernel[:2], (None, None)
    compiled = list(tune.compile_all(TARGETS["sm_90"], [kernel, broken], 300 if case == "broken" else 0))
    assert compiled == ([kernel] if case == "broken" else [])
    assert len(list(tmp_path.rglob("gemv_kernel.cubin"))) == len(compiled)


@pytest.fixture
def timer_of(monkeypatch, mm_to_fp32):
    """A function that makes timers on a made-up GPU."""
    fake_gpu.install(monkeypatch.setattr)
    return lambda formats: Sampler(5, (*(128, 32, 64)[: len(formats)], 1024), formats, fake_gpu.CPU).timer


def off_by(function, factor):
    """The same function with other outputs."""

    def changed(x, operands, outs, **named):
        done = function(x, operands, outs, **named)
        for out in outs:
            out *= factor
        return done

    return changed


@pytest.mark.parametrize("formats", [DENSE, FP8, THREE])
def test_choices_run_on_every_copy_after_a_check(timer_of, monkeypatch, formats):
    seen = []

    def launch(x, operands, *others, **named):
        assert x.shape == (5, 1024)
        seen.append(operands[0][0].data_ptr())
        fake_gpu.launch(x, operands, *others, **named)

    monkeypatch.setattr(gpu, "launch", launch)
    timer = timer_of(formats)
    count = timer(SPLIT)()
    assert len(set(seen)) == count > 1
    assert len(seen) == count + 1  # the check comes first
    assert formats == FP8 or [timer(outs)() for outs in OUTS] == [count] * 2


@pytest.mark.parametrize("factor", [1 + 1e-5, math.nan])
def test_wrong_kernels_are_found(timer_of, monkeypatch, factor):
    monkeypatch.setattr(gpu, "launch", off_by(fake_gpu.launch, factor))
    with pytest.raises(WrongError, match=r"off by (1.0e-05|nan) of the largest output"):
        timer_of(DENSE)(SPLIT)
    monkeypatch.setattr(gpu, "launch", lambda *_, **__: None)  # nobody writes the outputs
    with pytest.raises(WrongError, match="off by nan"):
        timer_of(FP8)(SPLIT)


@pytest.mark.parametrize(("factor", "accepted"), [(1 + 2e-4, ["bf16"]), (1 + 2**-5, []), (math.nan, [])])
def test_inaccurate_torch_is_rejected(timer_of, monkeypatch, factor, accepted):
    """NaN: torch_mm did nothing, as torch would need two GEMMs."""
    monkeypatch.setattr(gpu, "torch_mm", off_by(gpu.torch_mm, factor))
    timer = timer_of(DENSE)
    for outs in OUTS:
        with contextlib.nullcontext() if outs in accepted else pytest.raises(WrongError, match="off by"):
            timer(outs)


def test_graphs_share_counters(timer_of, monkeypatch):
    def replay(calls, how):
        workspace._reserved(fake_gpu.CPU, 1000)
        return lambda: 1.0

    monkeypatch.setattr(gpu, "timer", replay)
    workspace._reserves.clear()
    timer = timer_of(DENSE)
    for warps in (1, 2, 8):
        timer(replace(SPLIT, num_warps=warps))
        assert workspace._reserves[fake_gpu.CPU].numel() == workspace.RESERVE


@pytest.mark.parametrize("how", ["device", "eager"])
def test_timer_of_many_calls(monkeypatch, how):
    log, clock = [], iter(range(100))

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.time = 1.6 * next(clock)  # milliseconds

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return end.time - self.time

    @contextlib.contextmanager
    def capture(graph):
        log.append("begin")
        yield
        log.append("end")

    graph = type("Graph", (), {"replay": lambda self: log.append("replay")})
    for name, value in (("CUDAGraph", graph), ("graph", capture), ("Event", Event), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    microseconds = gpu.timer([lambda name=name: log.append(name) for name in "abc"], how)
    calls = [*"abc" * 22]  # at least 64
    assert log == (calls if how == "eager" else [*calls, "begin", *calls, "end"])
    log.clear()
    assert microseconds() == pytest.approx(1600 / 66)
    assert log == ["record", *(calls if how == "eager" else ["replay"]), "record", "wait"]
