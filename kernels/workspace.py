"""Memory that the split-K reductions need: partial sums, and counters that are zero between launches."""

from __future__ import annotations

import torch
from torch import Tensor

_counters: dict[tuple[torch.device, int], Tensor] = {}


def workspace(device: torch.device, partials: int, counters: int) -> tuple[Tensor | None, Tensor | None]:
    """fp32 partials and zeroed int32 counters for one launch on the current stream of device.

    Every launch leaves its counters at zero, so one buffer serves all eager launches of a stream, which run in turn. A
    launch under graph capture gets counters of its own, zeroed by the graph itself: graphs may be replayed on other
    streams and outlive any buffer kept here. So does one on the CPU, where nothing is left behind by a failure.
    """
    if not counters:
        return None, None
    partial = torch.empty(partials, dtype=torch.float32, device=device)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return partial, torch.zeros(counters, dtype=torch.int32, device=device)
    stream = device, torch.cuda.current_stream(device).cuda_stream
    arrived = _counters.get(stream)
    if arrived is None or arrived.numel() < counters:
        arrived = _counters[stream] = torch.zeros(max(counters, 1024), dtype=torch.int32, device=device)
    return partial, arrived
