"""Memory that the split-K reductions need: partial sums, and counters that are zero between launches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


@contextmanager
def workspace(device: torch.device, partials: int, counters: int) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """Lends fp32 partials and zeroed int32 counters to one launch on the current stream of device.

    Every launch leaves its counters at zero, so the one buffer of a stream serves all its launches in turn. A launch
    that fails may not have, so its buffer is dropped.
    """
    if not counters:
        yield None, None
        return
    partial = torch.empty(partials, dtype=torch.float32, device=device)
    cuda = device.type == "cuda"
    key = device, torch.cuda.current_stream(device).cuda_stream if cuda else 0
    arrived = _counters.get(key)
    if arrived is None or arrived.numel() < counters:
        arrived = torch.zeros(max(counters, 256), dtype=torch.int32, device=device)
        # Zeros made under capture are a part of that graph: they hold nothing until it is replayed.
        if not (cuda and torch.cuda.is_current_stream_capturing()):
            _counters[key] = arrived
    try:
        yield partial, arrived
    except BaseException:
        _counters.pop(key, None)
        raise
