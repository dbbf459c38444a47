"""Kernels compiled for a GPU that need not be here, and what their binaries show."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from ..kernels.dispatch import KernelConfig, cdiv
from ..kernels.launch import KERNELS, constants, options
from ..kernels.matrix import operand_specs
from ..kernels.target import INTERPRETED, Target


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs that run side by side on one SM (compute unit) share.

    From the CUDA programming guide's table of compute capabilities, and AMD's CDNA 3 and 4 instruction set manuals.

    Attributes:
        shared_memory: bytes (LDS) in all.
        per_program: bytes of it that one program may take.
        reserved: bytes of it that every program takes for the driver.
        threads: at most.
        programs: at most.
        registers: of 32 bits, in all.
    """

    shared_memory: int
    per_program: int
    reserved: int
    threads: int
    programs: int
    registers: int = 64 * 1024


# By key of TARGETS.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 * 1024, 163 * 1024, 1024, threads=2048, programs=32),
    "sm_90": Multiprocessor(228 * 1024, 227 * 1024, 1024, threads=2048, programs=32),
    "sm_100": Multiprocessor(228 * 1024, 227 * 1024, 1024, threads=2048, programs=32),
    "sm_120": Multiprocessor(100 * 1024, 99 * 1024, 1024, threads=1536, programs=24),
    "gfx942": Multiprocessor(64 * 1024, 64 * 1024, 0, threads=2048, programs=32, registers=128 * 1024),
    "gfx950": Multiprocessor(160 * 1024, 160 * 1024, 0, threads=2048, programs=32, registers=128 * 1024),
}

# Matrix instructions.
_MMA = r"\b(?:[HQ]MMA|[HQ]GMMA|UTC\w*MMA)[\w.]*|\bv_s?mfma\w+"
# Loads from global memory, and the bytes of each by a part of its name; SASS does not name 4.
_LOAD = r"\b(?:LDG|LDGSTS)((?:\.\w+)+)|\b(?:global|buffer|flat)_load_(?:lds_)?(\w+)"
_LOAD_BYTES = {
    "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1,
    "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "sshort": 2, "ubyte": 1, "sbyte": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Binary:
    """Static facts of one compiled kernel, read from the binary.

    Attributes:
        registers: per thread (on AMD: vector registers).
        spills: instructions that move a register to or from local memory (on AMD: spilled registers, and none without
            scratch, as they only move to other registers then).
        scratch: bytes of local memory per thread.
        shared_memory: bytes per program.
        threads: per program.
        assembly: SASS or AMDGCN.
    """

    registers: int
    spills: int
    scratch: int
    shared_memory: int
    threads: int
    assembly: str

    @classmethod
    def of(cls, kernel: CompiledKernel, target: Target) -> Binary:
        """What a kernel that was compiled for target shows."""
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
            usage = _tool("cuobjdump", "-res-usage", cubin.name)
            sass = _tool("nvdisasm", "-c", cubin.name)
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump reports no resource usage: {usage}")
        spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
        return cls(int(found[1]), spills, int(found[2]), shared, threads, sass)

    def count(self, pattern: str) -> int:
        """Matches of a regular expression in the assembly."""
        return len(re.findall(pattern, self.assembly))

    @property
    def mma(self) -> Counter[str]:
        """Matrix instructions, by name."""
        return Counter(re.findall(_MMA, self.assembly))

    @property
    def loads(self) -> Counter[int]:
        """Instructions that load from global memory, by bytes per thread."""
        names = [[*sass.split("."), amd] for sass, amd in re.findall(_LOAD, self.assembly)]
        return Counter(next((_LOAD_BYTES[part] for part in name if part in _LOAD_BYTES), 4) for name in names)

    def programs(self, sm: Multiprocessor) -> int:
        """How many programs one SM holds at a time."""
        registers = cdiv(self.registers, 8) * 8 * self.threads
        shared = self.shared_memory + sm.reserved
        limits = sm.programs, sm.threads // self.threads, sm.registers // registers
        return min(*limits, sm.shared_memory // shared if shared else sm.programs)


def compile_for(
    target: Target, config: KernelConfig, shape: tuple[int, ...], kinds: tuple[int, ...], **types: Any
) -> Binary:
    """What `warm_up`, which takes the same arguments, compiles."""
    return Binary.of(warm_up(target, config, shape, kinds, **types), target)


def warm_up(
    target: Target,
    config: KernelConfig,
    shape: tuple[int, ...],
    kinds: tuple[int, ...],
    *,
    x: torch.dtype = torch.bfloat16,
    outs: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
    factors: tuple[float, ...] = (1.0, 1.0),
) -> CompiledKernel:
    """Compiles what `launch` would, for x and outputs of up to 2 GB whose rows begin at multiples of 16 elements.

    Needs no GPU. What it leaves in Triton's cache (TRITON_CACHE_DIR), a launch on such a GPU finds there.

    Args:
        shape: rows of each matrix, and K.
        kinds: of each matrix.
        x: dtype of x.
        outs: dtype of each output.
        factors: of each output.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    *ns, k = shape
    nothing = functools.partial(torch.empty, 0)
    matrices = tuple(
        tuple(None if spec is None else nothing(dtype=spec[0]) for spec in operand_specs(kind, n, k))
        for kind, n in zip(kinds, ns, strict=True)
    )
    outputs = tuple(nothing(dtype=dtype) for dtype in outs)
    lent: tuple[Any, ...] = ()
    if config.regime != "gemv":
        lent = (nothing(dtype=torch.float32), nothing(dtype=torch.int32)) if config.has_workspace else (None, None)
    constexprs = constants(config, shape, kinds, factors, x, target).values()
    arguments = nothing(dtype=x), matrices, outputs, *lent, 16, 16, (16,) * len(outs), *constexprs
    return compile_kernel(KERNELS[config.regime], target, *arguments, **options(config, target))


def compile_kernel(kernel: Any, target: Target, *arguments: Any, **named: Any) -> CompiledKernel:
    """Compiles any Triton kernel on its way to a launch with these arguments and options, which does not follow.

    Meanwhile Triton believes that the target is the only GPU: nothing else may be launched in the process.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    if INTERPRETED:
        raise RuntimeError("nothing is compiled under TRITON_INTERPRET=1; unset it")
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    driver, before = triton.runtime.driver, triton.runtime.driver._active
    driver.set_active(_Offline(gpu))
    try:
        return kernel.warmup(*arguments, grid=(1,), **named)
    finally:
        driver._active = before


class _Offline:
    """As much of a Triton driver as compiling takes. The GPU is its own number, by which kernels are kept."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.get_current_device = self.get_current_target = lambda: gpu
        self.get_current_stream = lambda _: 0


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA binary utilities that Triton's wheel brings along."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
