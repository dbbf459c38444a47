"""Memory that the split-K reductions need: partial sums, and counters that are zero between launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
from torch import Tensor

from .target import INTERPRETED

# Counters set aside for captured launches, per device: 1 MiB, which 61 layers in 100 graphs do not use up.
RESERVE = 1 << 18

_eager: dict[tuple[torch.device, int], tuple[Tensor, Tensor]] = {}
_reserves: dict[torch.device, Tensor] = {}


def workspace(device: torch.device, partials: int, counters: int) -> tuple[Tensor | None, Tensor | None]:
    """fp32 partials and zeroed int32 counters for one launch on the current stream of device.

    Every launch leaves its counters at zero, so one pair of buffers serves all eager launches of a stream, which run in
    turn. A launch under graph capture gets partials from the graph's own memory and counters that no other launch ever
    gets: graphs may be replayed on other streams, and beside each other. Its counters come out of a reserve that the
    first eager launch has zeroed; where there was none, or it is used up, the graph itself zeroes them in every replay.
    """
    if not counters:
        return None, None
    if INTERPRETED:  # an error in the middle of a launch would leave counters behind
        return torch.empty(partials, dtype=torch.float32), torch.zeros(counters, dtype=torch.int32)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.empty(partials, dtype=torch.float32, device=device), _reserved(device, counters)
    if device not in _reserves:
        _reserves[device] = torch.zeros(RESERVE, dtype=torch.int32, device=device)
    stream = device, triton.runtime.driver.active.get_current_stream(device.index) if device.type == "cuda" else 0
    lent = _eager.get(stream)
    if lent is None or lent[0].numel() < partials or lent[1].numel() < counters:
        partial = torch.empty(max(partials, 1 << 16), dtype=torch.float32, device=device)
        lent = _eager[stream] = partial, torch.zeros(max(counters, 1 << 10), dtype=torch.int32, device=device)
    return lent


@contextmanager
def counters_returned(device: torch.device) -> Iterator[None]:
    """Takes back, in the end, the counters of all launches that were captured meanwhile; their graphs must be gone."""
    workspace(device, 1, 1)  # which sets the reserve aside, if nothing has yet
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
    rounded = -(-counters // 4) * 4  # 16 bytes, as the compiled kernel counts on
    _reserves[device] = reserve[rounded:]
    return reserve[:counters]
