"""Kernels compiled for a GPU that need not be here, and what their binaries show."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .dispatch import KernelConfig
from .operation import KERNELS, constants, options
from .target import INTERPRETED, Target

# Bytes of shared memory (LDS) that one program may take, by key of TARGETS.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
    "gfx950": 160 * 1024,
}

_POINTER = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*u8",
}


@dataclass(frozen=True)
class Binary:
    """Static facts of one compiled kernel, read from the binary.

    Attributes:
        registers: per thread (on AMD: vector registers).
        spills: instructions that move a register to or from local memory (on AMD: spilled registers).
        scratch: bytes of local memory per thread.
        shared_memory: bytes per program.
        assembly: SASS or AMDGCN.
    """

    registers: int
    spills: int
    scratch: int
    shared_memory: int
    assembly: str

    def count(self, pattern: str) -> int:
        """Matches of a regular expression in the assembly."""
        return len(re.findall(pattern, self.assembly))


def compile_for(
    target: Target,
    config: KernelConfig,
    shape: tuple[int, int, int],
    *,
    wk: torch.dtype = torch.bfloat16,
    gate: torch.dtype = torch.bfloat16,
    x: torch.dtype = torch.bfloat16,
    k_out: torch.dtype = torch.bfloat16,
    gate_out: torch.dtype = torch.float32,
) -> Binary:
    """Compiles what `launch` would, for contiguous x and outputs. Needs no GPU.

    Args:
        shape: (D, H, K).
        wk, gate: torch.bfloat16 or torch.float8_e4m3fn.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    if INTERPRETED:
        raise RuntimeError("compile_for: nothing is compiled under TRITON_INTERPRET=1; unset it")
    kernel = KERNELS[config.regime]
    known: dict[str, Any] = constants(config, shape, x, target)
    pointers = {
        "x_ptr": _POINTER[x],
        "wk_ptr": _POINTER[wk],
        "wg_ptr": _POINTER[gate],
        "k_ptr": _POINTER[k_out],
        "gate_ptr": _POINTER[gate_out],
    }
    for name, dtype in (("wk_sf_ptr", wk), ("wg_sf_ptr", gate)):
        if dtype == torch.float8_e4m3fn:
            pointers[name] = "*fp32"
    if any(config.workspace(1, *shape[:2])):
        pointers |= {"partial_ptr": "*fp32", "arrived_ptr": "*i32"}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name.endswith("_ptr") and name not in pointers:
            known[name] = None
        signature[name] = "constexpr" if name in known else pointers.get(name, "i32")
        if name not in known and name != "M":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, known, attributes)
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    return _read(triton.compile(source, target=gpu, options=options(config, target)), target)


def _read(kernel: CompiledKernel, target: Target) -> Binary:
    shared = kernel.metadata.shared
    if target.backend == "hip":
        text = kernel.asm["amdgcn"]
        values = {key: int(value) for key, value in re.findall(r"^\s*\.(\w+):\s+(\d+)$", text, re.MULTILINE)}
        spills = values["vgpr_spill_count"] + values["sgpr_spill_count"]
        return Binary(values["vgpr_count"], spills, values["private_segment_fixed_size"], shared, text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "-res-usage", cubin.name)
        sass = _tool("nvdisasm", "-c", cubin.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"compile_for: cuobjdump reports no resource usage: {usage}")
    spills = len(re.findall(r"\b(?:STL|LDL)\b", sass))
    return Binary(int(found[1]), spills, int(found[2]), shared, sass)


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA binary utilities that Triton's wheel brings along."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
