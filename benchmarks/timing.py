"""GPU time of calls that are too short to be timed one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]
CALLS = 64  # at least, in one measurement: the few microseconds that it takes to begin one are shared by so many


def enough(calls: Sequence[Call]) -> list[Call]:
    """All of them, over and over until they are CALLS or more."""
    return [*calls] * -(-CALLS // len(calls))


def copies_to_outgrow_l2(nbytes: int, device: torch.device) -> int:
    """How many copies of weights of so many bytes to go through, so that none is still in L2 when its turn comes."""
    return 1 + -(-2 * torch.cuda.get_device_properties(device).L2_cache_size // nbytes)


class Replay:
    """A CUDA graph of calls, which replays without Python.

    Where it was made in a block of `counters_returned`, it must not run beside what is launched or made after that.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        """Runs each of the calls once, then captures `enough` of them."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        captured = enough(calls)
        self._count = len(captured)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for call in captured:
                call()
        self._graph.replay()
        torch.cuda.synchronize()

    def __call__(self) -> None:
        self._graph.replay()

    def microseconds(self) -> float:
        """GPU time per call, of one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / self._count
