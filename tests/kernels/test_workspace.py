"""Who gets which counters, on a GPU that is not here."""

import pytest
import torch

from indexproj.kernels import workspace as module


class Cuda:
    """Stands for a CUDA device; tensors are made on the CPU."""

    type = "cuda"


@pytest.fixture
def gpu(monkeypatch):
    state = {"capturing": False, "stream": 7}
    monkeypatch.setattr(module, "_counters", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: type("Stream", (), {"cuda_stream": state["stream"]}))
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, make=make, device=None, **options: make(*size, **options))
    return state


def counters(count):
    return module.workspace(Cuda, 1, count)[1]


def test_a_stream_has_one_buffer_and_another_stream_another(gpu):
    first = counters(10)
    assert counters(300).data_ptr() == first.data_ptr()
    gpu["stream"] = 8
    assert counters(10).data_ptr() != first.data_ptr()


def test_a_larger_launch_gets_a_larger_buffer(gpu):
    assert counters(10).numel() >= 10
    assert counters(5000).numel() >= 5000
    assert not counters(5000).any()


def test_every_captured_launch_has_counters_of_its_own(gpu):
    eager = counters(10)
    gpu["capturing"] = True
    captured = counters(10), counters(10)
    gpu["capturing"] = False
    assert len({tensor.data_ptr() for tensor in (eager, *captured)}) == 3
    assert counters(10).data_ptr() == eager.data_ptr()


def test_no_split_no_memory():
    assert module.workspace(torch.device("cpu"), 0, 0) == (None, None)
