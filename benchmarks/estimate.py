"""A rough estimate of how long a launch takes, to order tune's candidates and to show in `indexproj compile`.

Nothing here was measured by this project. Bandwidths and clocks are those of data sheets (A100 80 GB SXM, H100 SXM,
B200, RTX PRO 6000, MI300X, MI355X). Launches, latency and L2 are what others report for an H100; L2 is scaled to other
GPUs by the number of SMs. Instructions are counted in binaries for sm_90. Expect errors of 25 percent in decode and 35
in prefill; differences between two configs of one GPU are what it is for.
"""

import math

from ..kernels.dispatch import Case, KernelConfig, cdiv
from ..kernels.formats import Format, operand_layout
from ..kernels.target import Target

LAUNCH_US, LATENCY_US = 2.0, 0.8
# From L2, one SM that reads alone and one of all.
SM_BYTES_PER_US, L2_BYTES_PER_US = 105e3, 49e3
# Bytes from memory and cycles per microsecond. Keys are those of TARGETS.
GPUS = {
    "sm_80": (2.04e6, 1410), "sm_90": (3.35e6, 1755), "sm_100": (8.0e6, 1850), "sm_120": (1.79e6, 2400),
    "gfx942": (5.3e6, 2100), "gfx950": (8.0e6, 2400),
}  # fmt: skip
# Instructions to decode a weight: packed, as in prefill, and elsewhere.
DECODING = {
    Format.BF16: (0.0, 1.0), Format.FP8_BLOCK: (2.5, 6.0), Format.FP8_ROW: (2.5, 6.0), Format.MXFP8: (3.0, 8.0),
    Format.NVFP4: (3.5, 8.0), Format.MXFP4: (3.5, 8.0),
}  # fmt: skip


def estimate(case: Case, config: KernelConfig, target: Target) -> float:
    """Microseconds for bf16 x and outputs of 2 bytes.

    The launch, trips to memory one after another, reads or instructions, and what the last program of a tile reads.
    """
    m, (*ns, k), formats = case
    memory_rate, cycles = GPUS.get(target.name, GPUS["sm_90" if target.is_cuda() else "gfx942"])
    programs = math.prod(config.grid(m, *ns))
    moved = nbytes((*ns, k), formats) + 2 * m * (k + sum(ns))
    l2_rate = min(L2_BYTES_PER_US * target.sm_count, SM_BYTES_PER_US * programs)
    reads = max(moved / memory_rate, l2_bytes(case, config) / l2_rate)
    # Programs of one SM run one after another, or share it; it issues four instructions per cycle.
    instructions = max(1, programs / target.sm_count) * _instructions(ns, k, formats, config) / 4 / cycles
    trips = LATENCY_US * (3 if config.has_workspace else 1)
    return LAUNCH_US + trips + max(reads, instructions) + reduced_bytes(config, ns) / SM_BYTES_PER_US


def _instructions(ns: list[int], k: int, formats: tuple[Format, ...], config: KernelConfig) -> float:
    """Of all warps of one program."""
    is_prefill, is_gemv = config.regime == "prefill", config.regime == "gemv"
    columns = [1] * len(ns) if is_gemv else config.block_ns(*ns)
    decoding = sum(n * DECODING[format][not is_prefill] for n, format in zip(columns, formats, strict=True))
    if config.block_n:
        decoding /= len(ns)  # a program computes one of the matrices
    depth = config.block_k * config.slices
    steps = cdiv(k, depth * (1 if config.loop_splits else config.split_k))
    # Two per accumulator and step to scale and add it; gemv multiplies each element of x itself.
    sums = 2 * (config.block_m * depth if is_gemv else config.acc_size(*ns) * config.slices)
    return steps * (60 * config.num_warps + (decoding * depth + sums) / 32)


def l2_bytes(case: Case, config: KernelConfig) -> int:
    """Bytes of weights and x that all programs of a launch read, from caches or memory."""
    m, (*ns, k), formats = case
    return nbytes((*ns, k), formats) * cdiv(m, config.block_m) + 2 * m * k * config.grid(m, *ns)[0]


def reduced_bytes(config: KernelConfig, ns: list[int] | tuple[int, ...]) -> int:
    """Partial sums that the last program of a tile reads. Of two splits, it keeps its own."""
    splits = 1 if config.split_k == 2 else config.split_k
    return 4 * splits * config.acc_size(*ns) if config.has_workspace else 0


def nbytes(shape: tuple[int, ...], formats: tuple[Format, ...]) -> int:
    """Bytes of the weights."""
    *ns, k = shape
    operands = [each for format, n in zip(formats, ns, strict=True) for each in operand_layout(format, n, k) if each]
    return sum(dtype.itemsize * math.prod(size) for dtype, size in operands)
