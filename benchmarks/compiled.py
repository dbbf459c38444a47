"""Compiles kernels for GPUs that this machine does not have, reads resource usage from the binaries, and checks it."""

import math
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from ..indexer.models import PAIRS, SHAPES, fits
from ..kernels.dispatch import REDUCED_BYTES, KernelConfig, cdiv, choose, out_dtypes
from ..kernels.formats import ACTIVATIONS, Activation, operand_layout, parse_pair
from ..kernels.launch import KERNELS, Signature, constants, options
from ..kernels.target import INTERPRETED, TARGETS, Target
from .estimate import estimate, l2_bytes, reduced_bytes


class Multiprocessor(NamedTuple):
    """Limits of one SM (compute unit), shared by the programs that run on it at the same time.

    Sources: the CUDA programming guide's table of compute capabilities; AMD's CDNA 3 and 4 instruction set manuals.
    """

    shared_memory: int  # bytes of shared memory (LDS)
    reserved: int = 1024  # bytes of it that the driver reserves per program
    threads: int = 2048
    programs: int = 32
    registers: int = 64 * 1024  # 32-bit registers


# Keys are those of TARGETS.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 * 1024),
    "sm_90": Multiprocessor(228 * 1024),
    "sm_100": Multiprocessor(228 * 1024),
    "sm_120": Multiprocessor(100 * 1024, threads=1536, programs=24),
    "gfx942": Multiprocessor(64 * 1024, reserved=0, registers=128 * 1024),
    "gfx950": Multiprocessor(160 * 1024, reserved=0, registers=128 * 1024),
}

LARGEST_M = 65536
# gemv, per matrix: weights and scales, then the x that did not fit the registers next to them, sometimes twice; and
# barriers of the one exchange of sums between the warps.
LOAD_GROUPS, BARRIERS = 3, 5

# Matrix instructions.
_MMA = r"\b(?:[HQ]MMA|[HQ]GMMA|UTC\w*MMA)[\w.]*|\bv_s?mfma\w+"
_SASS = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);"
# A label, or an instruction of SASS or AMDGCN.
_LINE = r"^\s*(?:(\.L_x_\d+|\.LBB\w+):|/\*[0-9a-f]{4,}\*/\s+(.*?);|((?:v|s|ds|buffer|global)_\w+.*))"
# Loads from global memory. Part of the name gives the bytes per thread; SASS does not spell out 4.
_LOAD = r"\b(?:LDG|LDGSTS)((?:\.\w+)+)|\b(?:global|buffer|flat)_load_(?:lds_)?(\w+)"
_LOAD_BYTES = {
    "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1,
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "ubyte": 1, "sbyte": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Binary:
    """Resource usage and assembly of one compiled kernel."""

    registers: int  # per thread (AMD: vector registers)
    # Instructions that access local memory. AMD: spilled registers; 0 without scratch, as they spill to registers then.
    spills: int
    scratch: int  # bytes of local memory per thread
    shared_memory: int  # bytes per program
    threads: int  # per program
    assembly: str  # SASS or AMDGCN

    @classmethod
    def of(cls, kernel: CompiledKernel, target: Target) -> "Binary":
        """Reads a kernel that was compiled for target."""
        shared, threads = kernel.metadata.shared, kernel.metadata.num_warps * kernel.metadata.warp_size
        if target.backend == "hip":
            text = kernel.asm["amdgcn"]
            values = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
            scratch = values["private_segment_fixed_size"]
            spills = values["vgpr_spill_count"] + values["sgpr_spill_count"] if scratch else 0
            return cls(values["vgpr_count"], spills, scratch, shared, threads, text)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(kernel.asm["cubin"])
            cubin.flush()
            usage = _cuda_tool("cuobjdump", "-res-usage", cubin.name)
            sass = _cuda_tool("nvdisasm", "-c", cubin.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump reports no resource usage: {usage}")
        spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
        return cls(int(found[1]), spills, int(found[2]), shared, threads, sass)

    @property
    def mma(self) -> Counter[str]:
        """Matrix instructions by name."""
        return Counter(re.findall(_MMA, self.assembly))

    @property
    def loads(self) -> Counter[int]:
        """Loads from global memory by bytes per thread."""
        return Counter(_load_bytes(sass or amd) for sass, amd in re.findall(_LOAD, self.assembly))

    @property
    def load_groups(self) -> int:
        """How often the program waits for global loads: groups of loads, each a trip to memory.

        Reads SASS without following branches; each exit ends a group, too. Leaves out copies to shared memory.
        """
        groups, pending = 0, set[int]()
        for text in re.findall(_SASS, self.assembly):
            opcode, _, rest = text.partition(" ")
            first, *others = (set(map(int, re.findall(r"\bR(\d+)\b", operand))) for operand in rest.split(","))
            has_result = not opcode.startswith(("ST", "RED", "BAR", "BRA", "EXIT"))
            if opcode == "EXIT" or pending & set().union(*others, () if has_result else first):
                pending.clear()
            if opcode.startswith("LDG."):
                groups += not pending
                pending.update(range(min(first), min(first) + max(_load_bytes(opcode) // 4, 1)))
            elif has_result:
                pending -= first
        return groups

    @property
    def step(self) -> int:
        """Instructions of the longest loop with matrix instructions: one step of K. 0 without such a loop.

        Behind an exit, code may branch back to where it came from (sm_100, AMD); that is no loop.
        """
        labels: dict[str, int] = {}
        code: list[str] = []
        longest = 0
        for label, sass, amd in re.findall(_LINE, self.assembly, re.MULTILINE):
            if label:
                labels[label] = len(code)
                continue
            code.append(sass or amd)
            branch = re.search(r"\bBRA\b.*?(\.L_x_\d+)|s_c?branch\w* (\.LBB\w+)", code[-1])
            start = labels.get(branch[1] or branch[2], len(code)) if branch else len(code)
            loop = "\n".join(code[start:])
            if re.search(_MMA, loop) and not re.search(r"\bEXIT\b|\bs_endpgm\b", loop):
                longest = max(longest, len(code) - start)
        return longest

    def programs(self, sm: Multiprocessor) -> int:
        """How many programs fit on one SM."""
        registers = cdiv(self.registers, 8) * 8 * self.threads
        shared = self.shared_memory + sm.reserved
        limits = sm.programs, sm.threads // self.threads, sm.registers // registers
        return min(*limits, sm.shared_memory // shared if shared else sm.programs)


def warm_up(target: Target, config: KernelConfig, signature: Signature) -> CompiledKernel:
    """Compiles the kernel that `launch` runs for 16-byte aligned tensors of up to 2 GB.

    Needs no GPU. The binary stays in Triton's cache (TRITON_CACHE_DIR), where a launch on such a GPU finds it.
    Raises RuntimeError in Triton's interpreter.
    """
    empty = partial(torch.empty, 0)
    matrices = tuple(
        tuple(layout and empty(dtype=layout[0]) for layout in operand_layout(format, n, signature.k))
        for format, n in zip(signature.formats, signature.ns, strict=True)
    )
    outs = tuple(empty(dtype=dtype) for dtype in signature.dtypes)
    buffers: tuple[Any, ...] = ()
    if config.regime != "gemv":
        buffers = (empty(dtype=torch.float32), empty(dtype=torch.int32)) if config.has_workspace else (None, None)
    constexprs = constants(config, signature, target).values()
    arguments = empty(dtype=signature.x_dtype), matrices, outs, *buffers, 16, 16, (16,) * len(outs), *constexprs
    return compile_kernel(KERNELS[config.regime], target, *arguments, **options(config, target))


def compile_kernel(kernel: Any, target: Target, *arguments: Any, **named: Any) -> CompiledKernel:
    """Compiles a Triton kernel for a launch with these arguments and options, without launching it.

    Replaces Triton's driver meanwhile, so nothing else may be launched. Raises RuntimeError in Triton's interpreter.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set and disables compilation; unset it")
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    driver, before = triton.runtime.driver, triton.runtime.driver._active
    # The part of a driver that compilation uses. The target doubles as device number, which is Triton's cache key.
    offline = {"get_current_device": lambda: gpu, "get_current_target": lambda: gpu, "get_current_stream": lambda _: 0}
    driver.set_active(SimpleNamespace(**offline))
    try:
        return kernel.warmup(*arguments, grid=(1,), **named)
    finally:
        driver._active = before


def _load_bytes(name: str) -> int:
    return next((_LOAD_BYTES[part] for part in name.split(".") if part in _LOAD_BYTES), 4)


def _cuda_tool(name: str, *arguments: str) -> str:
    """Output of a CUDA binary utility from Triton's wheel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


class Case(NamedTuple):
    """A key of SHAPES, a pair of formats that fits it, and the activation for wk."""

    shape: str
    pair: str
    activation: Activation | None = None

    def signature(self, gate: str = "fp32", batch_invariant: bool = False) -> Signature:
        """What is compiled; gate is a key of OUTS."""
        shape, formats = SHAPES[self.shape], parse_pair(self.pair)
        return Signature.of(shape, formats, self.activation, out_dtypes(gate, len(formats)), batch_invariant)


# Formats determine registers and instructions; K and H hardly do. So one shape covers all formats, the other two.
CASES = [Case("deepseek-v3.2", pair) for pair in PAIRS if fits("deepseek-v3.2", pair)]
CASES += [Case("deepseek-v3.2", "FP8 128x128, BF16", activation) for activation in ACTIVATIONS[1:]]
CASES += [Case("glm-5", pair) for pair in ("BF16, BF16", "FP8 128x128, BF16")]
CASES += [Case("deepseek-v4-pro", "BF16, BF16, BF16")]


def configs(target: Target, signature: Signature) -> dict[KernelConfig, int]:
    """The configs that dispatch selects, each with the largest power of two rows for which it does."""
    choose_for = partial(choose, quantize_x=any(signature.activations), batch_invariant=signature.batch_invariant)
    powers = [2**power for power in range(LARGEST_M.bit_length())]
    return {choose_for(m, signature.shape, signature.formats, target, signature.x_dtype): m for m in powers}


def faults(target: Target, signature: Signature, m: int, config: KernelConfig, binary: Binary) -> list[str]:
    """The checks that a binary fails. In decode, all programs of a launch with m rows must run at the same time."""
    sm, ns, is_gemv = MULTIPROCESSORS[target.name], signature.ns, config.regime == "gemv"
    limit, read, widest = sm.shared_memory - sm.reserved, reduced_bytes(config, ns), max(binary.loads, default=0)
    groups, barriers = binary.load_groups if target.is_cuda() else 0, binary.assembly.count("BAR.SYNC")
    programs, resident = math.prod(config.grid(m, *ns)), binary.programs(sm) * target.sm_count
    # GPUs with fewer SMs may need a second wave, and batch-invariant kernels, which keep one split for all M, several.
    one_wave = config.regime != "prefill" and not signature.batch_invariant and target in TARGETS.values()
    found = {
        f"{binary.spills} spills, {binary.scratch} bytes of local memory": binary.spills or binary.scratch,
        f"{binary.shared_memory} bytes of shared memory, limit {limit}": binary.shared_memory > limit,
        f"matrix instructions: {dict(binary.mma)}": bool(binary.mma) == is_gemv,
        f"the last program reads {read} bytes of partial sums, limit {REDUCED_BYTES}": read > REDUCED_BYTES,
        f"{groups} groups of loads, limit {LOAD_GROUPS} per matrix": is_gemv and groups > LOAD_GROUPS * len(ns),
        f"{barriers} barriers, limit {BARRIERS} per matrix": is_gemv and barriers > BARRIERS * len(ns),
        # 32 columns of fp16 are 8 bytes per thread.
        f"the widest load has {widest} bytes": widest < (8 if config.regime == "prefill" else 16),
        f"{programs} programs, but the GPU runs {resident} at a time": one_wave and programs > resident,
    }
    return [text for text, is_fault in found.items() if is_fault]


def rows(
    targets: Iterable[Target], cases: Iterable[Case], gates: Iterable[str], batch_invariant: bool
) -> Iterator[dict[str, Any]]:
    """Compiles every config of every target, case and gate dtype on all cores.

    Yields what `indexproj compile --json` prints. gate is a dtype, and k is bf16. m is the largest power of two rows
    for which dispatch selects the kernel. bytes are weights and x that the programs of a launch with m rows read from
    caches or memory, and reduced_bytes the partial sums that the last program of a tile reads. step: instructions of
    one step of K, 0 without a loop. load_groups: trips to memory (NVIDIA, without copies to shared memory). loads: by
    bytes per thread. estimate_us: see estimate.py; not measured.
    """
    tasks = [
        (target, case, gate, signature, config, m)
        for target, case, gate in product(targets, cases, gates)
        for signature in [case.signature(gate, batch_invariant)]
        for config, m in configs(target, signature).items()
    ]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_row, *zip(*tasks, strict=True))


def _row(target: Target, case: Case, gate: str, signature: Signature, config: KernelConfig, m: int) -> dict[str, Any]:
    binary = Binary.of(warm_up(target, config, signature), target)
    sizes = m, signature.shape, signature.formats
    return {
        "target": target.name, **case._asdict(), "gate": gate, "kernel": str(config), "m": m,
        "bytes": l2_bytes(sizes, config), "reduced_bytes": reduced_bytes(config, signature.ns),
        "estimate_us": round(estimate(sizes, config, target), 1),
        "registers": binary.registers, "shared_memory": binary.shared_memory,
        "step": binary.step, "load_groups": binary.load_groups,
        "loads": dict(sorted(binary.loads.items(), reverse=True)),
        "faults": faults(target, signature, m, config, binary),
    }  # fmt: skip
