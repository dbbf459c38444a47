"""Timing on a GPU: graphs of calls, weights that are not in L2, and the limits of data sheets."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable, Sequence

import torch

from ..indexer.cli.synthetic import random_matrix
from ..indexer.models import SHAPES
from ..kernels import ProjectionWeights
from ..kernels.formats import Format, parse_pair
from .estimate import nbytes

Call = Callable[[], object]
# Calls per measurement, at least: enough to hide the microseconds that starting one takes.
CALLS = 64
# Memory bandwidth in TB/s and dense bf16 TFLOPS from the vendors' data sheets, by part of torch's device name.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": (2.04, 312),
    "NVIDIA H100 80GB HBM3": (3.35, 989),
    "NVIDIA H200": (4.8, 989),
    "NVIDIA B200": (8.0, 2250),
    "MI300X": (5.3, 1307),
}


@functools.lru_cache(maxsize=1)
def weight_copies(shape: tuple[int, ...], formats: tuple[Format, ...], device: torch.device) -> list[ProjectionWeights]:
    """Random weights, and copies of them that take more than twice the L2 cache, for calls that cycle through them."""
    *ns, k = shape
    torch.manual_seed(0)
    weights = ProjectionWeights.pack(*(random_matrix(format, n, k) for format, n in zip(formats, ns, strict=True)))
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    count = 1 + -(-2 * l2_bytes // weights.nbytes)
    return [weights.map(lambda tensor: tensor.to(device, copy=True)) for _ in range(count)]


def repeated(calls: Sequence[Call]) -> list[Call]:
    """The calls, repeated until there are at least CALLS."""
    return [*calls] * -(-CALLS // len(calls))


class Replay:
    """A CUDA graph of `repeated` calls.

    A graph captured inside `recycled_counters` must not be replayed after the block, nor beside other launches.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            call()
        torch.cuda.synchronize()
        captured = repeated(calls)
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
        """GPU time per call of one replay."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / self._count


def floors(gpu: str, shape: str, pair: str, m: int) -> dict[str, float]:
    """The least microseconds that memory and arithmetic need for a projection; empty for a GPU that is not in PEAKS.

    Counts the bytes of weights, bf16 x, bf16 k and fp32 gate once each.
    """
    d, h, k = SHAPES[shape]
    weights = sum(nbytes(format, n, k) for format, n in zip(parse_pair(pair), (d, h), strict=True))
    moved, flops = weights + m * (2 * k + 2 * d + 4 * h), 2 * m * k * (d + h)
    for name, (bandwidth, rate) in PEAKS.items():
        if name in gpu:
            return {"memory floor": moved / bandwidth / 1e6, "compute floor": flops / rate / 1e6}
    return {}


def description() -> dict[str, str]:
    """Name, runtime, driver and clocks of the current GPU, or nothing without one."""
    if not torch.cuda.is_available():
        return {}
    found = {"name": torch.cuda.get_device_name(), "runtime": torch.version.hip or torch.version.cuda or "?"}
    fields = "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"
    if tool := shutil.which("nvidia-smi"):
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        query = [tool, f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        found |= dict(zip(fields, map(str.strip, answer.stdout.split(",")), strict=False))
    return found
