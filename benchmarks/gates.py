"""Compile gates: checks on the kernels that dispatch selects, compiled without a GPU."""

import itertools
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

from ..indexer.models import PAIRS, SHAPES, fits
from ..kernels.dispatch import REDUCED_BYTES, KernelConfig, choose, out_dtypes
from ..kernels.formats import Activation, parse_pair
from ..kernels.launch import Signature
from ..kernels.target import TARGETS, Target
from .compiled import MULTIPROCESSORS, Binary, signature, warm_up
from .estimate import estimate, l2_bytes, reduced_bytes

LARGEST_M = 65536
# gemv, per matrix: weights and scales, then the x that did not fit the registers next to them, sometimes twice; and
# barriers of the one exchange of sums between the warps.
LOAD_GROUPS, BARRIERS = 3, 5
# One compiled kernel; see `rows`.
Row = dict[str, Any]


class Case(NamedTuple):
    """A key of SHAPES, a pair of PAIRS that fits it, and the activation for wk."""

    shape: str
    pair: str
    activation: Activation | None = None

    def signature(self, gate: str = "fp32", batch_invariant: bool = False) -> Signature:
        """What is compiled; gate is a key of OUTS."""
        formats = parse_pair(self.pair)
        dtypes = out_dtypes(gate, len(formats))
        return signature(SHAPES[self.shape], formats, self.activation, dtypes, batch_invariant)


# Formats determine registers and instructions; K and H hardly do. So one shape covers all formats, the other two.
CASES = [
    *(Case("deepseek-v3.2", pair) for pair in PAIRS if fits("deepseek-v3.2", pair)),
    Case("deepseek-v3.2", "FP8 128x128, BF16", "fp8"),
    Case("deepseek-v3.2", "FP8 128x128, BF16", "fp8_ue8m0"),
    Case("glm-5", "BF16, BF16"),
    Case("glm-5", "FP8 128x128, BF16"),
    Case("deepseek-v4-pro", "BF16, BF16, BF16"),
]


def configs(target: Target, signature: Signature) -> dict[KernelConfig, int]:
    """The configs that dispatch selects, each with the largest power of two rows for which it does."""
    activated, invariant = any(signature.activations), signature.batch_invariant
    choose_for = partial(choose, quantize_x=activated, batch_invariant=invariant)
    powers = [2**power for power in range(LARGEST_M.bit_length())]
    return {choose_for(m, signature.shape, signature.formats, target, signature.x_dtype): m for m in powers}


def faults(target: Target, ns: tuple[int, ...], m: int, config: KernelConfig, binary: Binary) -> list[str]:
    """The checks that a binary fails.

    Args:
        ns: rows of each matrix.
        m: rows of x for which all programs of a launch must run at the same time.
    """
    sm, found = MULTIPROCESSORS[target.name], []
    if binary.spills or binary.scratch:
        found.append(f"{binary.spills} spills, {binary.scratch} bytes of local memory")
    if binary.shared_memory > sm.per_program:
        found.append(f"{binary.shared_memory} bytes of shared memory, limit {sm.per_program}")
    if bool(binary.mma) != (config.regime != "gemv"):
        found.append(f"matrix instructions: {dict(binary.mma)}")
    if config.has_workspace and (size := reduced_bytes(config, ns)) > REDUCED_BYTES:
        found.append(f"the last program reads {size} bytes of partial sums, limit {REDUCED_BYTES}")
    if config.regime == "gemv" and target.is_cuda() and len(binary.load_groups) > LOAD_GROUPS * len(ns):
        found.append(f"{len(binary.load_groups)} groups of loads, limit {LOAD_GROUPS} per matrix")
    if config.regime == "gemv" and (barriers := binary.assembly.count("BAR.SYNC")) > BARRIERS * len(ns):
        found.append(f"{barriers} barriers, limit {BARRIERS} per matrix")
    widest = max(binary.loads, default=0)
    if widest < (8 if config.regime == "prefill" else 16):  # 32 columns of fp16 are 8 bytes per thread
        found.append(f"the widest load has {widest} bytes")
    # GPUs with fewer SMs may need a second wave.
    if config.regime != "prefill" and not config.loop_splits and target in TARGETS.values():
        programs, resident = math.prod(config.grid(m, *ns)), binary.programs(sm) * target.sm_count
        if programs > resident:
            found.append(f"{programs} programs, but the GPU runs {resident} at a time")
    return found


def rows(
    targets: Iterable[Target],
    cases: Iterable[Case] = CASES,
    gates: Iterable[str] = ("fp32",),
    batch_invariant: bool = False,
) -> Iterator[Row]:
    """Compiles every config of every target, case and gate dtype on all cores.

    Yields what `indexproj compile --json` prints. gate is a dtype, and k is bf16. m is the largest power of two rows
    for which dispatch selects the kernel. bytes are weights and x that the programs of a launch with m rows read from
    caches or memory, and reduced_bytes the partial sums that the last program of a tile reads. step: instructions of
    one step of K, 0 without a loop. load_groups: trips to memory (NVIDIA, without copies to shared memory). loads: by
    bytes per thread. estimate_us: see estimate.py; not measured.
    """
    tasks = [
        (target, case, gate, batch_invariant, config, m)
        for target, case, gate in itertools.product(targets, cases, gates)
        for config, m in configs(target, case.signature(gate, batch_invariant)).items()
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_row, *zip(*tasks, strict=True))


def _row(target: Target, case: Case, gate: str, batch_invariant: bool, config: KernelConfig, m: int) -> Row:
    signature = case.signature(gate, batch_invariant)
    ns = signature.ns
    binary = Binary.of(warm_up(target, config, signature), target)
    # Batch-invariant kernels keep one split for all M, so more than 32 rows may come in several waves.
    at_once = min(m, 32) if batch_invariant else m
    sizes = m, signature.shape, signature.formats, config
    return {
        "target": target.name, **case._asdict(), "gate": gate, "kernel": str(config), "m": m,
        "programs": math.prod(config.grid(m, *ns)), "per_sm": binary.programs(MULTIPROCESSORS[target.name]),
        "bytes": l2_bytes(*sizes), "reduced_bytes": reduced_bytes(config, ns),
        "estimate_us": round(estimate(*sizes, target), 1),
        "registers": binary.registers, "shared_memory": binary.shared_memory, "mma": sum(binary.mma.values()),
        "step": binary.step, "load_groups": len(binary.load_groups),
        "loads": dict(sorted(binary.loads.items(), reverse=True)),
        "faults": faults(target, ns, at_once, config, binary),
    }  # fmt: skip
