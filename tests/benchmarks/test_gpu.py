"""How `bench` and `tune` check and time calls on a GPU, and how `tune` compiles, with a made-up GPU."""

import contextlib
import math
import os
from dataclasses import replace
from unittest import mock

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


@pytest.mark.parametrize(("hip", "cached", "size"), [(None, 10**5, 2 * 10**4), ("7.0", 2**28, 2 * 10**7)])
def test_weight_copies_do_not_stay_in_a_cache(timer_of, monkeypatch, hip, cached, size):
    """While one is read, the others take twice the L2 cache, or MI300's Infinity Cache."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(gpu, "random_matrix", lambda *_: mock.Mock(nbytes=size // 2, map=lambda _: None))
    copies = gpu.weight_copies((128, 32, 1024), FP8, fake_gpu.CPU)
    assert 2 * cached <= (len(copies) - 1) * size < 2 * cached + size


@pytest.mark.parametrize(
    ("choice", "factor", "message"),
    [
        (SPLIT, 1 + 1e-5, "off by 1.0e-05 of the largest output"), (SPLIT, math.nan, "off by nan"),
        (SPLIT, None, "off by nan"), ("fp32", 1 + 2e-4, "off by 2"), ("bf16", 1 + 2e-4, ""),
        ("bf16", 1 + 2**-5, "off by"), ("bf16", None, "off by nan"),
    ],
)  # fmt: skip
def test_wrong_results_are_found(timer_of, monkeypatch, choice, factor, message):
    """None: nobody writes the outputs; torch would need two GEMMs."""

    def off_by(function):
        def changed(x, operands, outs, **named):
            if factor is not None:
                function(x, operands, outs, **named)
                [out.mul_(factor) for out in outs]

        return changed

    monkeypatch.setattr(gpu, "launch", off_by(fake_gpu.launch))
    monkeypatch.setattr(gpu, "torch_mm", off_by(gpu.torch_mm))
    with pytest.raises(WrongError, match=message) if message else contextlib.nullcontext():
        timer_of(DENSE)(choice)


def test_graphs_share_counters(timer_of, monkeypatch):
    def replay(calls, how):
        workspace._reserved(fake_gpu.CPU, 1000)
        return lambda: 1.0

    monkeypatch.setattr(gpu, "timer", replay)
    workspace._reserves.clear()
    timer = timer_of(DENSE)
    for warps in (2, 4, 8):
        timer(replace(SPLIT, num_warps=warps))
        assert workspace._reserves[fake_gpu.CPU].numel() == workspace.RESERVE


def test_bytes_of_ceilings(monkeypatch):
    """A copy reads and writes a quarter of the free memory; L2 is read again and again, a quarter of it."""
    seen = []

    def read(x, out, blocks, repeats, block):
        seen.append((x.nbytes, 4 * blocks * block))
        out.fill_(repeats * block)

    properties = mock.Mock(L2_cache_size=2**22, multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4000, 8000))
    monkeypatch.setattr(gpu, "empty_kernel", {(1,): lambda: None})
    monkeypatch.setattr(gpu, "read_kernel", {(8,): read})
    monkeypatch.setattr(gpu, "timer", fake_gpu.timer)
    found = [(name, size) for name, size, _ in gpu.ceilings(fake_gpu.CPU)]
    assert found == [("empty kernel", 0), ("copy", 2 * 1000), ("L2 read", 8 * 64 * 4 * 4096)]
    assert seen == [(2**20, 2**20)]


@pytest.mark.parametrize("how", ["device", "eager"])
def test_timer_of_many_calls(monkeypatch, how):
    """In a graph, or from Python; at least 64."""
    log, calls = mock.MagicMock(), [*"abc" * 22]
    log.Event.return_value.elapsed_time.return_value = 1.6  # milliseconds
    for name in ("CUDAGraph", "graph", "Event", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, getattr(log, name))
    microseconds = gpu.timer([log.a, log.b, log.c], how)
    graph = ["CUDAGraph", "synchronize", "graph", "graph().__enter__", *calls, "graph().__exit__"]
    assert [name for name, *_ in log.mock_calls] == calls + graph * (how == "device")
    log.reset_mock()
    assert microseconds() == pytest.approx(1600 / 66)
    timed = ["CUDAGraph().replay"] if how == "device" else calls
    timed = ["Event", "Event", "synchronize", "Event().record", *timed, "Event().record", "Event().synchronize"]
    assert [name for name, *_ in log.mock_calls] == [*timed, "Event().elapsed_time"]
    assert log.Event.mock_calls[0] == mock.call(enable_timing=True)
