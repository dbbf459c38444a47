"""The compile gates: what a compiled kernel shows without a GPU, and what of it dispatch or the GPU does not allow."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from ..indexer.models import SHAPES
from ..kernels.dispatch import KernelConfig, choose
from ..kernels.matrix import Kind, operand_specs
from ..kernels.target import TARGETS, Target
from ..kernels.tuned import OUTS
from .compiled import MULTIPROCESSORS, Binary, compile_for

# The pairs of encodings that published checkpoints hold.
PAIRS = {
    "BF16, BF16": (Kind.BF16, Kind.BF16),
    "FP8 128x128, BF16": (Kind.FP8_BLOCK, Kind.BF16),
    "FP8 128x128, FP8 128x128": (Kind.FP8_BLOCK, Kind.FP8_BLOCK),
    "MXFP8, MXFP8": (Kind.MXFP8, Kind.MXFP8),
    "NVFP4, BF16": (Kind.NVFP4, Kind.BF16),
    "NVFP4, NVFP4": (Kind.NVFP4, Kind.NVFP4),
    "MXFP4, BF16": (Kind.MXFP4, Kind.BF16),
    "MXFP4, MXFP4": (Kind.MXFP4, Kind.MXFP4),
}
# And what FP8 becomes where `project` is told an activation: no other checkpoint, but other kernels.
COMPILED = PAIRS | {"W8A8, BF16": (Kind.W8A8, Kind.BF16), "W8A8 ue8m0, BF16": (Kind.W8A8_UE8M0, Kind.BF16)}
# Encodings decide over registers and instructions, K and H over little: one shape has all pairs, the other the usual.
CASES = [("deepseek-v3.2", pair) for pair in COMPILED] + [("glm-5", "BF16, BF16"), ("glm-5", "FP8 128x128, BF16")]
LARGEST_M = 65536


@dataclass(frozen=True)
class Row:
    """One compiled kernel.

    Attributes:
        gate: dtype of the gate; k is bf16.
        kernel: the regime, and what tells the configs of one apart.
        m: the largest power of two of rows of x for which dispatch picks it.
        programs: of a launch with so many rows.
        weight_reads, x_reads: how often the programs of such a launch ask for each byte.
        bytes_per_program: of weights and x, that one of its programs asks for, on average.
        registers: per thread.
        shared_memory: bytes per program.
        per_sm: programs that one SM holds at a time.
        mma: matrix instructions in the binary.
        loads: instructions that load from global memory, by bytes per thread.
        faults: what speaks against it.
    """

    target: str
    shape: str
    pair: str
    gate: str
    kernel: str
    m: int
    programs: int
    weight_reads: int
    x_reads: int
    bytes_per_program: int
    registers: int
    shared_memory: int
    per_sm: int
    mma: int
    loads: dict[int, int]
    faults: tuple[str, ...] = ()

    @classmethod
    def of(cls, binary: Binary, target: Target, **facts: Any) -> Row:
        """A row with what the binary shows."""
        return cls(
            target=target.name,
            registers=binary.registers,
            shared_memory=binary.shared_memory,
            per_sm=binary.programs(MULTIPROCESSORS[target.name]),
            mma=sum(binary.mma.values()),
            loads=dict(sorted(binary.loads.items(), reverse=True)),
            **facts,
        )


def configs(target: Target, shape: tuple[int, ...], kinds: tuple[int, ...], **options: Any) -> dict[KernelConfig, int]:
    """Every config that dispatch picks on that target, and the largest power of two of rows for which it does."""
    powers = [2**power for power in range(LARGEST_M.bit_length())]
    return {choose(m, shape, kinds, target, **options): m for m in powers}


def faults(target: Target, shape: tuple[int, ...], m: int, config: KernelConfig, binary: Binary) -> list[str]:
    """What speaks against a binary, launched with m rows; none if nothing does."""
    sm, found = MULTIPROCESSORS[target.name], []
    if binary.spills or binary.scratch:
        found.append(f"{binary.spills} spills, {binary.scratch} bytes of local memory")
    if binary.shared_memory > sm.per_program:
        found.append(f"{binary.shared_memory} bytes of shared memory, of {sm.per_program}")
    if bool(binary.mma) != (config.regime != "gemv"):
        found.append(f"matrix instructions: {dict(binary.mma)}")
    widest = max(binary.loads, default=0)
    if widest < (8 if config.regime == "tiled" else 16):  # 32 columns of fp16 are 8 bytes a thread
        found.append(f"no load is wider than {widest} bytes")
    # Of GPUs with other numbers of SMs, what does not fit comes in a second wave.
    if config.regime != "tiled" and not config.serial and target in TARGETS.values():
        programs, resident = math.prod(config.grid(m, *shape[:-1])), binary.programs(sm) * target.sm_count
        if programs > resident:
            found.append(f"{programs} programs, and the GPU holds {resident}")
    return found


def nbytes(kind: Kind, n: int, k: int) -> int:
    """Bytes of a matrix [N, K] of that kind."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in filter(None, operand_specs(kind, n, k)))


def rows(
    targets: Iterable[Target],
    cases: Iterable[tuple[str, str]] = CASES,
    gates: Iterable[str] = ("fp32",),
    batch_invariant: bool = False,
) -> Iterator[Row]:
    """Compiles every config of every target and case, for every dtype of the gate, on all cores; in order."""
    tasks = [
        (target, shape, pair, gate, config, m, min(m, 32) if batch_invariant else m)
        for target, (shape, pair), gate in itertools.product(targets, cases, gates)
        for config, m in configs(target, SHAPES[shape], COMPILED[pair], batch_invariant=batch_invariant).items()
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_row, *zip(*tasks, strict=True))


def _row(target: Target, shape: str, pair: str, gate: str, config: KernelConfig, m: int, at_once: int) -> Row:
    """at_once: rows for which the GPU has to hold all programs; batch-invariant ones may come in several waves."""
    *ns, k = sizes = SHAPES[shape]
    binary = compile_for(target, config, sizes, COMPILED[pair], outs=OUTS[gate])
    programs, (weight_reads, x_reads) = math.prod(config.grid(m, *ns)), config.reads(m, *ns)
    weights = sum(nbytes(kind, n, k) for kind, n in zip(COMPILED[pair], ns, strict=True))
    return Row.of(
        binary,
        target,
        shape=shape,
        pair=pair,
        gate=gate,
        kernel=str(config),
        m=m,
        programs=programs,
        weight_reads=weight_reads,
        x_reads=x_reads,
        bytes_per_program=(weights * weight_reads + 2 * m * k * x_reads) // programs,
        faults=tuple(faults(target, sizes, at_once, config, binary)),
    )
