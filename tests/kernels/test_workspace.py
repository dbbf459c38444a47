"""Which launch gets which workspace, on a mocked GPU."""

import itertools
from unittest import mock

import pytest
import torch

from indexproj.kernels import workspace as module

CUDA = mock.Mock(type="cuda", index=0)  # its tensors are on the CPU


@pytest.fixture
def gpu(monkeypatch):
    state = {"capturing": False, "stream": 7}
    monkeypatch.setattr(module, "_buffers", {})
    monkeypatch.setattr(module, "_reserves", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["capturing"])
    active = mock.Mock(get_current_stream=lambda index: (index, state["stream"]))
    monkeypatch.setattr(module.triton.runtime.driver, "_active", active)
    for name in ("empty", "zeros"):
        make = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *size, make=make, device=None, **options: make(*size, **options))
    return state


def counters(count):
    return module.workspace(CUDA, 1, count)[1]


def test_each_stream_has_one_pair_of_buffers(gpu):
    assert module.workspace(CUDA, 0, 0) == (None, None)
    first = module.workspace(CUDA, 100, 10)
    for same, stream, partials, count in ((True, 7, 300, 300), (False, 8, 100, 10), (False, 7, 1, 5000)):
        gpu["stream"] = stream
        other = module.workspace(CUDA, partials, count)
        assert [a.data_ptr() == b.data_ptr() for a, b in zip(first, other, strict=True)] == [same, same]
        assert other[0].numel() >= partials
        assert other[1].numel() >= count
        assert not other[1].any()
    assert module.workspace(CUDA, 200_000, 1)[0].numel() >= 200_000


def test_captured_launches_share_no_memory(gpu):
    eager = module.workspace(CUDA, 100, 10)
    gpu["capturing"] = True
    captured = [module.workspace(CUDA, 100, 10) for _ in range(3)]
    gpu["capturing"] = False
    for number in (0, 1):
        spans = sorted((buffers[number].data_ptr(), buffers[number].nbytes) for buffers in (eager, *captured))
        assert all(start + size <= following for (start, size), (following, _) in itertools.pairwise(spans))
    assert all(arrived.data_ptr() % 16 == 0 and arrived.numel() == 10 for _, arrived in captured)
    assert counters(10).data_ptr() == eager[1].data_ptr()


def test_captured_launch_has_no_memset_while_the_reserve_lasts(gpu, monkeypatch):
    monkeypatch.setattr(module, "RESERVE", 32)
    zeros = mock.Mock(wraps=torch.zeros)
    monkeypatch.setattr(torch, "zeros", zeros)
    gpu["capturing"] = True
    assert not counters(10).any()
    assert zeros.call_count == 1  # no eager launch yet
    gpu["capturing"] = False
    counters(10)
    gpu["capturing"] = True
    zeros.reset_mock()
    first, second = counters(10), counters(16)
    assert zeros.call_count == 0
    assert first.data_ptr() + 48 == second.data_ptr()
    assert not counters(10).any()
    assert zeros.call_count == 1


def test_recycled_counters_are_used_again(gpu):
    with module.recycled_counters(CUDA):
        gpu["capturing"] = True
        first, second = (counters(10).data_ptr() for _ in range(2))
        assert first != second
        gpu["capturing"] = False
    gpu["capturing"] = True
    assert counters(10).data_ptr() == first
