"""A rough estimate of how long a launch takes, to order candidates and to show what it is made of.

Nothing here was measured by this project. Bandwidths and clocks are those of data sheets (A100 80 GB SXM, H100 SXM,
B200, RTX PRO 6000, MI300X, MI355X). Launches, latency and L2 are what others report for an H100; L2 is scaled to other
GPUs by the number of SMs. Instructions are counted in binaries for sm_90. Expect errors of 25 percent in decode and 35
in prefill; differences between two configs of one GPU are what it is for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from ..kernels.dispatch import KernelConfig, cdiv
from ..kernels.formats import Format, operand_layout
from ..kernels.target import Target

LAUNCH_US, LATENCY_US = 2.0, 0.8
L2_BYTES_PER_US = 49e3  # per SM, if all of them read
SM_BYTES_PER_US = 105e3  # one SM that reads alone


class Gpu(NamedTuple):
    bytes_per_us: float  # from memory
    cycles_per_us: float


# Keys are those of TARGETS.
GPUS = {
    "sm_80": Gpu(2.04e6, 1410),
    "sm_90": Gpu(3.35e6, 1755),
    "sm_100": Gpu(8.0e6, 1850),
    "sm_120": Gpu(1.79e6, 2400),
    "gfx942": Gpu(5.3e6, 2100),
    "gfx950": Gpu(8.0e6, 2400),
}

# Instructions per weight to decode it in prefill (packed) and elsewhere.
PACKED = {Format.BF16: 0.0, Format.FP8_BLOCK: 2.5, Format.FP8_ROW: 2.5, Format.MXFP8: 3.0}  # FP4: 3.5
UNPACKED = {Format.BF16: 1.0, Format.FP8_BLOCK: 6.0, Format.FP8_ROW: 6.0, Format.MXFP8: 8.0}  # FP4: 8


class Estimate(NamedTuple):
    """Microseconds. `reads` and `instructions` overlap."""

    launch: float
    trips: float  # to memory, one after another
    reads: float  # from L2 and memory
    instructions: float
    tail: float  # the last program of a tile reads partial sums

    @property
    def total(self) -> float:
        return self.launch + self.trips + max(self.reads, self.instructions) + self.tail


def estimate(
    m: int, shape: tuple[int, ...], formats: tuple[Format, ...], config: KernelConfig, target: Target
) -> Estimate:
    """For m rows of bf16 x and outputs of 2 bytes. shape is (D, H, K), or has more rows before K."""
    *ns, k = shape
    gpu = GPUS[target.name]
    grid = config.grid(m, *ns)
    weights = sum(nbytes(format, n, k) for format, n in zip(formats, ns, strict=True))
    memory = weights + 2 * m * (k + sum(ns))
    l2_rate = min(L2_BYTES_PER_US * target.sm_count, SM_BYTES_PER_US * math.prod(grid))
    reads = max(memory / gpu.bytes_per_us, l2_bytes(m, shape, formats, config) / l2_rate)
    per_sm = max(1, math.prod(grid) / target.sm_count)  # programs one after another, or sharing an SM
    instructions = per_sm * _instructions(ns, k, formats, config) / 4 / gpu.cycles_per_us
    trips = LATENCY_US * (3 if config.has_workspace else 1)
    return Estimate(LAUNCH_US, trips, reads, instructions, reduced_bytes(config, tuple(ns)) / SM_BYTES_PER_US)


def _instructions(ns: list[int], k: int, formats: tuple[Format, ...], config: KernelConfig) -> float:
    """Of all warps of one program; an SM issues four per cycle."""
    if config.regime == "prefill":
        columns, costs, default = config.block_ns(*ns), PACKED, 3.5
    else:
        columns, costs, default = (config.block_n if config.regime == "split_k" else 1,) * len(ns), UNPACKED, 8.0
    share = 1.0 if not config.block_n else 1 / len(ns)  # a program computes one of the matrices
    if config.regime == "gemv":
        share = 1 / len(ns)
    decoding = share * sum(n * costs.get(format, default) for n, format in zip(columns, formats, strict=True))
    splits = 1 if config.loop_splits else config.split_k
    depth = config.block_k * config.slices
    steps = cdiv(k, depth * splits)
    # Two per accumulator and step to scale and add it; gemv multiplies each element of x itself.
    sums = 2 * (config.block_m * depth if config.regime == "gemv" else config.acc_size(*ns) * config.slices)
    return steps * (60 * config.num_warps + (decoding * depth + sums) / 32)


def l2_bytes(m: int, shape: tuple[int, ...], formats: tuple[Format, ...], config: KernelConfig) -> int:
    """Bytes of weights and x that all programs of a launch read, from caches or memory."""
    *ns, k = shape
    weights = sum(nbytes(format, n, k) for format, n in zip(formats, ns, strict=True))
    return weights * cdiv(m, config.block_m) + 2 * m * k * config.grid(m, *ns)[0]


def reduced_bytes(config: KernelConfig, ns: tuple[int, ...]) -> int:
    """Partial sums that the last program of a tile reads. In prefill, one of two programs keeps its own."""
    splits = 1 if config.split_k == 2 else config.split_k
    return 4 * splits * config.acc_size(*ns) if config.has_workspace else 0


def nbytes(format: Format, n: int, k: int) -> int:
    """Bytes of a matrix [N, K] in that format."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in filter(None, operand_layout(format, n, k)))
