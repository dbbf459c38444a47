"""How `bench` and `tune` check and time calls on a GPU, and how `tune` compiles, with a made-up GPU."""

import contextlib
import os
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
    launch = mock.Mock(side_effect=fake_gpu.launch)
    monkeypatch.setattr(gpu, "launch", launch)
    timer = timer_of(formats)
    count = timer(SPLIT)()
    weights = [call.args[1][0][0].data_ptr() for call in launch.mock_calls]
    assert len(set(weights)) == count > 1
    assert len(weights) == count + 1  # the check comes first
    assert formats == FP8 or [timer(outs)() for outs in OUTS] == [count] * 2


def test_weight_copies_do_not_stay_in_amds_cache(timer_of, monkeypatch):
    """While one is read, the others take twice MI300's Infinity Cache."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(gpu, "random_matrix", lambda *_: mock.Mock(nbytes=10**7, map=lambda _: None))
    copies = gpu.weight_copies((128, 32, 1024), FP8, fake_gpu.CPU)
    assert 2 * 2**28 <= (len(copies) - 1) * 2 * 10**7 < 2 * 2**28 + 2 * 10**7


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [(SPLIT, None, "off by nan"), (SPLIT, 1e-5, "off by 1.0e-05 of the largest output"),
     ("fp32", 5e-5, None), ("fp32", 2e-4, "off by 2"), ("bf16", 2**-5, "off by")],
)  # fmt: skip
def test_wrong_results_are_found(timer_of, monkeypatch, choice, error, message):
    """None: of a kernel that writes nothing."""

    def inexact(x, operands, outs, **named):
        for (weight, *_), out in zip(operands, outs, strict=True):
            if error is not None:
                torch.mul(x.double() @ weight.double().T, 1 + error, out=out)

    monkeypatch.setattr(gpu, "torch_mm", inexact)
    monkeypatch.setattr(gpu, "launch", inexact)
    with pytest.raises(WrongError, match=message) if message else contextlib.nullcontext():
        timer_of(DENSE)(choice)


def test_graphs_share_counters(timer_of, monkeypatch):
    monkeypatch.setattr(gpu, "timer", lambda calls, how: workspace._reserved(fake_gpu.CPU, 1000))
    workspace._reserves.clear()
    timer_of(DENSE)(SPLIT)
    assert workspace._reserves[fake_gpu.CPU].numel() == workspace.RESERVE


@pytest.mark.parametrize("how", ["device", "eager"])
def test_timer_of_many_calls(monkeypatch, how):
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
