"""The kernels behind the ceilings of `indexproj bench`."""

import pytest
import torch

import fake_gpu
from indexproj.benchmarks import gpu


@pytest.fixture(autouse=True)
def cpu(device, monkeypatch):
    """In the interpreter, a GPU with little memory and L2."""
    if device.type == "cpu":
        properties = type("Properties", (), {"L2_cache_size": 2**18, "multi_processor_count": 1})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 2**20))
        monkeypatch.setattr(gpu, "timer", fake_gpu.timer)


def test_ceilings(device):
    properties = torch.cuda.get_device_properties(device)
    (empty, _, _), (copy, copied, _), (read, moved, _) = found = list(gpu.ceilings(device))
    assert (empty, copy, read) == ("empty kernel", "copy", "L2 read")
    assert all(timer() > 0 for _, _, timer in found)
    assert copied > 0
    assert moved == 4 * properties.multi_processor_count * 64 * 4096 * 4


def test_l2_read_that_skips_blocks_is_found(device, monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(
        torch, "ones", lambda *size, **options: ones(*size, **options).index_fill(0, torch.tensor([5]), 0)
    )
    with pytest.raises(gpu.WrongError, match="did not read all of its blocks"):
        list(gpu.ceilings(device))
