"""Kernels compiled for a GPU that need not be here, and what their binaries show."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from .dispatch import KernelConfig
from .matrix import operand_specs
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

_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}


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
    shape: tuple[int, ...],
    kinds: tuple[int, ...],
    *,
    x: torch.dtype = torch.bfloat16,
    outs: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32),
) -> Binary:
    """Compiles what `launch` would, for contiguous x and outputs. Needs no GPU.

    Args:
        shape: rows of each matrix, and K.
        kinds: of each matrix.
        outs: dtype of each output.

    Raises:
        RuntimeError: in Triton's interpreter, which compiles nothing.
    """
    if INTERPRETED:
        raise RuntimeError("compile_for: nothing is compiled under TRITON_INTERPRET=1; unset it")
    kernel = KERNELS[config.regime]
    *ns, k = shape
    has_workspace = any(config.workspace(1, *ns))
    signature: dict[str, Any] = {
        "x_ptr": _POINTER[x],
        "matrices": tuple(
            tuple("constexpr" if spec is None else _POINTER[spec[0]] for spec in operand_specs(kind, n, k))
            for kind, n in zip(kinds, ns, strict=True)
        ),
        "outs": tuple(_POINTER[dtype] for dtype in outs),
        "partial_ptr": "*fp32" if has_workspace else "constexpr",
        "arrived_ptr": "*i32" if has_workspace else "constexpr",
        "M": "i32",
        "stride_xm": "i32",
        "strides_om": ("i32",) * len(outs),
    }
    known: dict[Any, Any] = constants(config, shape, list(kinds), x, target)
    signature |= dict.fromkeys(known, "constexpr")
    aligned = {}
    for path, kind in _leaves({name: signature[name] for name in kernel.arg_names}):
        if kind == "constexpr" and kernel.arg_names[path[0]] not in known:
            known[path] = None
        elif kind != "constexpr" and kernel.arg_names[path[0]] != "M":
            aligned[path] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, known, aligned)
    gpu = GPUTarget(target.backend, target.arch, 64 if target.backend == "hip" else 32)
    return _read(triton.compile(source, target=gpu, options=options(config, target)), target)


def _leaves(signature: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], str]]:
    """(indices, type) of every argument, also of those in tuples."""
    if isinstance(signature, str):
        yield path, signature
        return
    for position, part in enumerate(signature.values() if isinstance(signature, dict) else signature):
        yield from _leaves(part, (*path, position))


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
