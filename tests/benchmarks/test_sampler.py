"""How `indexproj tune` compiles, checks and times kernels, with a made-up GPU."""

import contextlib
import math
import os
from dataclasses import replace

import pytest
import torch

from indexproj.benchmarks import gpu, tune
from indexproj.benchmarks.tune import Case, WrongError
from indexproj.kernels import TARGETS, KernelConfig, workspace
from indexproj.kernels.dispatch import OUTS
from indexproj.kernels.formats import parse_pair

DENSE, FP8, SM_90 = parse_pair("BF16, BF16"), parse_pair("FP8 128x128, BF16"), TARGETS["sm_90"]
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


class Calls:
    """In place of a Replay: runs the calls one by one."""

    def __init__(self, calls):
        self.calls = calls
        for call in calls:
            call()

    def microseconds(self):
        return float(len(self.calls))


@pytest.fixture
def sampler(monkeypatch, mm_to_fp32):
    """Makes a Sampler on the CPU for launches that are off by error[0]; it has the pointers of all weights."""
    gpu.weight_copies.cache_clear()
    l2 = type("Properties", (), {"L2_cache_size": 10**6})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: l2)
    monkeypatch.setattr(tune, "Replay", Calls)
    workspace._reserves.clear()

    def make(formats, error=0.0):
        def launch(x, operands, outs, signature, config):
            made.seen.append(operands[0][0].data_ptr())
            for out, exact in zip(outs, made._exact, strict=True):
                out.copy_(exact * (1 + (error if config.num_warps == 4 else 0)))

        monkeypatch.setattr(tune, "launch", launch)
        made = tune.Sampler(Case(5, (128, 32, 1024), formats), torch.device("cpu"))
        made.seen = []
        return made

    yield make
    gpu.weight_copies.cache_clear()


def test_sampler_cycles_through_copies_and_checks_results(sampler):
    sample = sampler(DENSE, error=1e-5)
    copies = 1 + -(-2 * 10**6 // (2 * 160 * 1024))
    assert sample(SPLIT) == copies
    assert len(set(sample.seen)) == copies
    assert len(sample.seen) == copies + 1  # the check comes first
    for outs in OUTS:
        assert sample(outs) == copies
    assert sample._x.shape == (5, 1024)
    with pytest.raises(WrongError, match=r"split_k .* is off by 1.0e-05 of the largest output"):
        sample(replace(SPLIT, num_warps=4))
    fp8 = sampler(FP8, error=math.nan)
    assert fp8(SPLIT) == len(set(fp8.seen))
    with pytest.raises(WrongError):
        fp8(replace(SPLIT, num_warps=4))


def test_sampler_finds_outputs_that_nobody_wrote(sampler, monkeypatch):
    sample = sampler(DENSE)
    monkeypatch.setattr(tune, "launch", lambda x, operands, outs, signature, config: None)
    with pytest.raises(WrongError):
        sample(SPLIT)


def test_sampler_graphs_share_counters(sampler, monkeypatch):
    class Graph(Calls):
        def __init__(self, calls):
            super().__init__(calls)
            workspace._reserved(torch.device("cpu"), 1000)

    monkeypatch.setattr(tune, "Replay", Graph)
    sample = sampler(DENSE)
    for warps in (1, 2, 8):
        sample(replace(GEMV, num_warps=warps))
        assert workspace._reserves[torch.device("cpu")].numel() == workspace.RESERVE


@pytest.mark.parametrize(("off", "accepted"), [(2e-4, ["bf16"]), (2**-5, [])])
def test_sampler_rejects_inaccurate_torch(sampler, monkeypatch, off, accepted):
    torch_mm = tune.torch_mm

    def less_precise(x, matrices, outs):
        done = torch_mm(x, matrices, outs)
        for out in outs:
            out *= 1 + off
        return done

    monkeypatch.setattr(tune, "torch_mm", less_precise)
    sample = sampler(DENSE)
    for outs in OUTS:
        with contextlib.nullcontext() if outs in accepted else pytest.raises(RuntimeError, match="torch is off by"):
            sample(outs)


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
    replay = gpu.Replay([lambda name=name: log.append(name) for name in "abc"])
    assert log == [*"abc", "begin", *"abc" * 22, "end", "replay"]  # at least 64 calls
    assert replay.microseconds() == pytest.approx(1600 / 66)
    assert log[-2:] == ["replay", "wait"]
