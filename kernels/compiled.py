"""Kernels compiled for a GPU that need not be here, and what their binaries show."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .dispatch import KernelConfig, cdiv
from .launch import KERNELS, constants, options
from .matrix import operand_specs
from .target import INTERPRETED, Target


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

_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}


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
    target: Target,
    config: KernelConfig,
    shape: tuple[int, ...],
    kinds: tuple[int, ...],
    *,
    x: torch.dtype = torch.bfloat16,
    outs: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
    factors: tuple[float, ...] = (1.0, 1.0),
) -> Binary:
    """Compiles what `launch` would, for contiguous x and outputs of up to 2 GB. Needs no GPU.

    Args:
        shape: rows of each matrix, and K.
        kinds: of each matrix.
        outs: dtype of each output.
        factors: of each output.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    if INTERPRETED:
        raise RuntimeError("compile_for: nothing is compiled under TRITON_INTERPRET=1; unset it")
    kernel = KERNELS[config.regime]
    *ns, k = shape
    known: dict[Any, Any] = constants(config, shape, kinds, factors, x, target)
    types: dict[str, Any] = dict.fromkeys(known, "constexpr") | {
        "x_ptr": _POINTER[x],
        "matrices": tuple(
            tuple("constexpr" if spec is None else _POINTER[spec[0]] for spec in operand_specs(kind, n, k))
            for kind, n in zip(kinds, ns, strict=True)
        ),
        "outs": tuple(_POINTER[dtype] for dtype in outs),
        "partial_ptr": "*fp32" if config.has_workspace else "constexpr",
        "arrived_ptr": "*i32" if config.has_workspace else "constexpr",
        "M": "i32",
        "stride_xm": "i32",
        "strides_om": ("i32",) * len(outs),
    }
    signature = {name: types[name] for name in kernel.arg_names}
    aligned = {}
    for path, kind in _leaves(signature):
        name = kernel.arg_names[path[0]]
        if kind == "constexpr" and name not in known:
            known[path] = None
        elif kind != "constexpr" and name != "M":
            aligned[path] = [["tt.divisibility", 16]]
            if target.backend == "hip" and kind.startswith("*"):
                aligned[path].append(["tt.pointer_range", 32])  # as Triton finds of tensors up to 2 GB
    return compile_source(ASTSource(kernel, signature, known, aligned), target, options(config, target))


def compile_source(source: ASTSource, target: Target, chosen: dict[str, Any]) -> Binary:
    """Compiles any Triton kernel with the given options."""
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    return _read(triton.compile(source, target=gpu, options=chosen), target)


def _leaves(signature: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """(indices, type) of every argument, also of those in tuples."""
    if isinstance(signature, str):
        yield path, signature
        return
    for position, part in enumerate(signature.values() if isinstance(signature, dict) else signature):
        yield from _leaves(part, (*path, position))


def _read(kernel: CompiledKernel, target: Target) -> Binary:
    shared, threads = kernel.metadata.shared, kernel.metadata.num_warps * kernel.metadata.warp_size
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        values = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        scratch = values["private_segment_fixed_size"]
        spills = values["vgpr_spill_count"] + values["sgpr_spill_count"] if scratch else 0
        return Binary(values["vgpr_count"], spills, scratch, shared, threads, text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"compile_for: cuobjdump reports no resource usage: {usage}")
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return Binary(int(found[1]), spills, int(found[2]), shared, threads, sass)


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA binary utilities that Triton's wheel brings along."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
