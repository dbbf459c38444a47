"""The kernels behind the ceilings of `indexproj bench`."""

from unittest import mock

import pytest
import torch

import fake_gpu
from indexproj.benchmarks import gpu


def test_ceilings(device, monkeypatch):
    """And an L2 read that skips a block is found. In the interpreter, the GPU has little memory and L2."""
    if device.type == "cpu":
        properties = mock.Mock(L2_cache_size=2**18, multi_processor_count=1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 2**20))
        monkeypatch.setattr(gpu, "timer", fake_gpu.timer)
    properties = torch.cuda.get_device_properties(device)
    (empty, _, _), (copy, copied, _), (read, moved, _) = found = list(gpu.ceilings(device))
    assert (empty, copy, read) == ("empty kernel", "copy", "L2 read")
    assert all(timer() > 0 for _, _, timer in found)
    assert moved == 4 * properties.multi_processor_count * 64 * 4096 * 4
    full = mock.Mock(
        side_effect=lambda size, **more: torch.full((size,), 1.0, **more).index_fill(0, torch.tensor(5), 0)
    )
    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(gpu.WrongError, match="did not read all of its blocks"):
        list(gpu.ceilings(device))
    if device.type == "cpu":  # a quarter of the memory, read and written; a quarter of L2
        assert (copied, full.call_args.args) == (2 * 2**18, (2**16 // 4,))
