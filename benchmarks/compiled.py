"""Compiles kernels for GPUs that this machine does not have, and reads resource usage from the binaries."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel

from ..kernels.dispatch import KernelConfig, cdiv, out_dtypes
from ..kernels.formats import Activation, Format, operand_layout
from ..kernels.launch import KERNELS, Signature, constants, options
from ..kernels.target import INTERPRETED, Target


class Multiprocessor(NamedTuple):
    """Limits of one SM (compute unit), shared by the programs that run on it at the same time.

    Sources: the CUDA programming guide's table of compute capabilities; AMD's CDNA 3 and 4 instruction set manuals.
    """

    shared_memory: int  # bytes of shared memory (LDS)
    per_program: int  # bytes of it that one program can use
    reserved: int  # bytes of it that the driver reserves per program
    threads: int
    programs: int
    registers: int = 64 * 1024  # 32-bit registers


# Keys are those of TARGETS.
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
    """Resource usage and assembly of one compiled kernel.

    Attributes:
        registers: per thread (AMD: vector registers).
        spills: instructions that access local memory (AMD: spilled registers; 0 without scratch, because registers
            then spill only to other registers).
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
        names = [[*sass.split("."), amd] for sass, amd in re.findall(_LOAD, self.assembly)]
        return Counter(next((_LOAD_BYTES[part] for part in name if part in _LOAD_BYTES), 4) for name in names)

    @property
    def load_groups(self) -> list[Counter[int]]:
        """Global loads issued before the program waits for one of them, group after group, by bytes per thread.

        Every group costs a trip to memory. Reads SASS without following branches; each exit ends a group, too. Leaves
        out copies to shared memory.
        """
        pending: set[int] = set()
        groups: list[Counter[int]] = [Counter()]
        for text in re.findall(_SASS, self.assembly):
            opcode, _, rest = text.partition(" ")
            operands = [operand.strip() for operand in rest.split(",")]
            has_result = not opcode.startswith(("ST", "RED", "BAR", "BRA", "EXIT"))
            read = {int(r) for operand in operands[has_result:] for r in re.findall(r"\bR(\d+)\b", operand)}
            if pending & read or opcode == "EXIT":
                pending = set()
                groups.append(Counter())
            written = re.match(r"R(\d+)\b", operands[0]) if has_result else None
            if written is None:
                continue
            if opcode.startswith("LDG."):
                size = next((_LOAD_BYTES[part] for part in opcode.split(".") if part in _LOAD_BYTES), 4)
                groups[-1][size] += 1
                pending.update(range(int(written[1]), int(written[1]) + max(size // 4, 1)))
            else:
                pending.discard(int(written[1]))
        return [group for group in groups if group]

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


@cache
def signature(
    shape: tuple[int, ...],
    formats: tuple[Format, ...],
    activation: Activation | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    batch_invariant: bool = False,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Signature:
    """A projection of bf16 x, the same object every time.

    Args:
        shape: rows of each matrix, then K.
        activation: for the first matrix.
        dtypes: of the outputs; by default `out_dtypes` with "fp32".
    """
    *ns, k = shape
    activations, factors = (activation, *[None] * (len(ns) - 1)), (1.0,) * len(ns)
    dtypes = dtypes or out_dtypes("fp32", len(ns))
    return Signature(device, torch.bfloat16, k, (*ns,), formats, activations, factors, dtypes, batch_invariant)


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
    driver.set_active(_OfflineDriver(gpu))
    try:
        return kernel.warmup(*arguments, grid=(1,), **named)
    finally:
        driver._active = before


class _OfflineDriver:
    """The part of a Triton driver that compilation uses. The target doubles as device number, Triton's cache key."""

    def __init__(self, gpu: GPUTarget) -> None:
        self.get_current_device = self.get_current_target = lambda: gpu
        self.get_current_stream = lambda _: 0


def _cuda_tool(name: str, *arguments: str) -> str:
    """Output of a CUDA binary utility from Triton's wheel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout
