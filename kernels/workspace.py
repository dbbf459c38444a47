"""Device memory for the split-K reductions: partial sums, and counters that are zero between launches."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

from .target import INTERPRETED

# Counters reserved for captured launches, per device: 1 MiB, enough for 61 layers in 100 graphs.
RESERVE = 1 << 18

_buffers: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
_reserves: dict[torch.device, Tensor] = {}


def workspace(device: torch.device, partials: int, counters: int) -> tuple[Tensor | None, Tensor | None]:
    """fp32 partial sums and zeroed int32 counters for one launch on the current stream of a device.

    Every launch leaves its counters at zero, and launches of one stream run one after another, so they share a pair of
    buffers. A captured launch gets partial sums from the graph's memory pool and counters of its own, as graphs may run
    on other streams and at the same time. Its counters come from a reserve that the first eager launch has zeroed;
    without one, or when it is used up, each replay of the graph zeroes them.
    """
    if not counters:
        return None, None
    if INTERPRETED:  # an exception in a launch would leave counters behind
        return torch.empty(partials, dtype=torch.float32), torch.zeros(counters, dtype=torch.int32)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(partials, dtype=torch.float32, device=device), _reserved(device, counters)
    if device not in _reserves:
        _reserves[device] = torch.zeros(RESERVE, dtype=torch.int32, device=device)
    stream = device, triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    buffers = _buffers.get(stream)
    if buffers is None or buffers[0].numel() < partials or buffers[1].numel() < counters:
        partial_sums = torch.empty(max(partials, 1 << 16), dtype=torch.float32, device=device)
        buffers = partial_sums, torch.zeros(max(counters, 1 << 10), dtype=torch.int32, device=device)
        _buffers[stream] = buffers
    return buffers


@contextmanager
def recycled_counters(device: torch.device) -> Iterator[None]:
    """On exit, recycles the counters of launches captured inside; their graphs must be gone by then."""
    workspace(device, 1, 1)  # makes the reserve if there is none
    before = _reserves.get(device)
    try:
        yield
    finally:
        if before is not None:
            _reserves[device] = before


def _reserved(device: torch.device, counters: int) -> Tensor:
    reserve = _reserves.get(device)
    if reserve is None or reserve.numel() < counters:
        return torch.zeros(counters, dtype=torch.int32, device=device)
    rounded = -(-counters // 4) * 4  # compiled kernels expect addresses that are multiples of 16
    _reserves[device] = reserve[rounded:]
    return reserve[:counters]
