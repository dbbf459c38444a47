"""Which kernel runs with which block sizes: a pure function, readable and testable without a GPU.

A table that `indexproj tune` measured on the user's GPU takes precedence; this module reads it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import triton

from .formats import Format
from .target import INTERPRETED, Target

LOGGER = logging.getLogger("indexproj")
MAX_SPLIT_K = 16


@dataclass(frozen=True)
class KernelConfig:
    """One compiled kernel, apart from pointers, strides and M.

    Attributes:
        block_m: rows of x per program.
        block_k: columns of K per step and slice, 32, 64 or 128: whole scale groups inside one 128-wide scale block.
        split_k: splits of K, each computed by a program of its own.
        block_n: rows of a matrix per program (split_k only; gemv: one, prefill: all).
        slices: parts of K that the warps of a program multiply side by side (gemv and split_k only).
        loop_splits: one program computes all splits of its tile (split_k only).
        pdl: programmatic dependent launch: waits for the previous kernel as late as possible (gemv and split_k, sm_90
            and newer). Off by default, as nobody has measured it.

    Raises:
        ValueError: a regime or sizes that no kernel has.
    """

    regime: Literal["gemv", "split_k", "prefill"]
    block_m: int
    block_k: int
    split_k: int = 1
    num_stages: int = 1
    num_warps: int = 8
    block_n: int = 16
    slices: int = 1
    loop_splits: bool = False
    pdl: bool = False

    def __post_init__(self) -> None:
        sizes = self.block_m, self.block_n, self.slices, self.num_warps
        if self.regime not in ("gemv", "split_k", "prefill") or any(size & (size - 1) or size < 1 for size in sizes):
            raise ValueError(
                f"KernelConfig: expected regime gemv, split_k or prefill and powers of two as sizes, got {self!r}"
            )
        if self.block_k not in (32, 64, 128) or self.split_k < 1 or self.num_stages < 1:
            raise ValueError(
                f"KernelConfig: expected block_k 32, 64 or 128, split_k >= 1 and num_stages >= 1, got {self!r}"
            )

    def __str__(self) -> str:
        block_n = f"x{self.block_n}" if self.regime == "split_k" else ""
        split = f", K/{self.split_k}" if self.split_k > 1 else ""
        loop = ", looped" if self.loop_splits else ""
        return f"{self.regime} {self.block_m}{block_n}x{self.slices * self.block_k}{split}{loop}"

    def acc_size(self, *ns: int) -> int:
        """Elements of the accumulators of one program, for matrices with these numbers of rows."""
        if self.regime == "prefill":
            return self.block_m * accumulator_columns(*ns)
        return self.block_m * (self.block_n if self.regime == "split_k" else 1)

    @property
    def has_workspace(self) -> bool:
        """Whether programs exchange partial sums."""
        return not self.loop_splits and (self.split_k > 1 or self.regime == "split_k")

    def grid(self, m: int, *ns: int) -> tuple[int, int, int]:
        """Programs of a launch with m rows of x."""
        return self.grid_of_tiles(cdiv(m, self.block_m), self.tiles_n(*ns))

    def tiles_n(self, *ns: int) -> int:
        """Tiles of the outputs' columns."""
        if self.regime == "prefill":
            return 1
        return sum(ns) if self.regime == "gemv" else sum([cdiv(n, self.block_n) for n in ns])

    def grid_of_tiles(self, tiles_m: int, tiles_n: int) -> tuple[int, int, int]:
        """Programs of a launch with these tiles of x's rows and of the outputs' columns."""
        if self.regime == "split_k":
            return tiles_n, 1 if self.loop_splits else self.split_k, tiles_m
        return (tiles_n, tiles_m, 1) if self.regime == "gemv" else (tiles_m, self.split_k, 1)

    def workspace_size(self, m: int, *ns: int) -> tuple[int, int]:
        """(fp32 partial sums, int32 arrival counters) of a launch with m rows of x."""
        if not self.has_workspace:
            return 0, 0
        programs = math.prod(self.grid(m, *ns))
        return programs * self.acc_size(*ns), programs // self.split_k


@dataclass(frozen=True)
class Limits:
    """Up to where a choice is good on a GPU. From compiled code (registers, spills) unless a source is given.

    Attributes:
        gemv_rows: largest M for gemv. FMA time grows with M; published gemv kernels lose to tensor cores from M = 5 on
            Hopper. Blackwell multiplies bf16 into fp32 in one instruction (FHFMA) and stays ahead up to 8.
        mma_rows: rows of x in the narrowest matrix instruction.
        prefill_columns: accumulator columns next to which 64 of K fit in shared memory and registers.
        decoded_rows: rows of x in prefill next to which FP8 and FP4 weights are decoded without spills.
    """

    gemv_rows: int
    mma_rows: int
    prefill_columns: int
    decoded_rows: int


# The newest entry that is not newer than the GPU applies.
_CUDA_LIMITS = {80: Limits(4, 8, 320, 64), 100: Limits(8, 8, 320, 64), 120: Limits(8, 8, 320, 32)}
_AMD_LIMITS = Limits(4, 16, 256, 64)  # gfx942 has 64 KiB of LDS
SPLIT_K_ROWS, MAX_BLOCK_M = 64, 32  # more rows do not fit the registers next to 16 rows of weights in 8 slices
# Rounding x to e4m3 (W8A8) takes registers.
QUANTIZED_GEMV_ROWS, QUANTIZED_SPLIT_K_ROWS = 1, 32


def limits(target: Target) -> Limits:
    """The entry for a GPU."""
    if not isinstance(target.arch, int):
        return _AMD_LIMITS
    return _CUDA_LIMITS[max(arch for arch in _CUDA_LIMITS if arch <= target.arch)]


def choose(
    m: int,
    shape: tuple[int, ...],
    formats: tuple[Format, ...],
    target: Target,
    x_dtype: torch.dtype = torch.bfloat16,
    *,
    quantize_x: bool = False,
    batch_invariant: bool = False,
) -> KernelConfig:
    """The config for m >= 1 rows of x and matrices of these formats and of shape (D, H, K), or with more before K.

    Depends on m only through the next power of two, so a server compiles a dozen kernels, not thousands. Nothing here
    was measured on a GPU for this operation.

    Args:
        quantize_x: a matrix takes x in e4m3 (W8A8).
        batch_invariant: the bits of a row must not depend on m.
    """
    m, (*ns, k) = next_power_of_2(m), shape
    if batch_invariant:
        return replace(_split_k(m, k, target), loop_splits=m > SPLIT_K_ROWS)
    if m <= (QUANTIZED_GEMV_ROWS if quantize_x else limits(target).gemv_rows):
        return _gemv(m, target)
    if m <= (QUANTIZED_SPLIT_K_ROWS if quantize_x else SPLIT_K_ROWS):
        config = _split_k(m, k, target)
        # An SM holds two of these programs. Two steps of K per program beat a second wave; three would spill, and so
        # would two with quantize_x.
        one_wave = math.prod(config.grid(m, *ns)) <= 2 * target.sm_count
        return config if one_wave or quantize_x else replace(config, split_k=cdiv(config.split_k, 2))
    is_fp16 = x_dtype != torch.bfloat16
    if quantize_x:
        return _prefill_quantized(m, ns, k, target, is_fp16)
    return _prefill(m, ns, k, target, is_fp16, is_decoded=set(formats) != {Format.BF16})


def _gemv(m: int, target: Target) -> KernelConfig:
    """A step is 16 bytes of x per thread."""
    return KernelConfig("gemv", block_m=m, block_k=128, slices=8, num_warps=4 if target.is_cuda() else 2)


def _split_k(m: int, k: int, target: Target) -> KernelConfig:
    """One step over 512 of K: enough programs to fill a GPU, each of which loads its weights in one go."""
    block_m = min(max(m, limits(target).mma_rows), MAX_BLOCK_M)
    splits = min(MAX_SPLIT_K, cdiv(k, 512))
    return KernelConfig("split_k", block_m, block_k=64, slices=8, split_k=splits, num_stages=2)


def _prefill(m: int, ns: list[int], k: int, target: Target, is_fp16: bool, is_decoded: bool) -> KernelConfig:
    """fp16 is multiplied as fp32, which takes twice the room."""
    limit = limits(target)
    largest = 32 if is_fp16 else limit.decoded_rows if is_decoded else 64
    block_m = 16 if m <= 256 else largest
    block_k = 32 if is_fp16 or accumulator_columns(*ns) > limit.prefill_columns else 64
    splits = _fill(m // block_m, cdiv(k, block_k), target)
    return KernelConfig("prefill", block_m, block_k, splits, num_stages=3, num_warps=_prefill_warps(target, is_fp16))


def _prefill_quantized(m: int, ns: list[int], k: int, target: Target, is_fp16: bool) -> KernelConfig:
    """A step is a whole scale group of x, 128 of K; more rows or stages would spill."""
    block_m = 16 if m <= 256 or is_fp16 or accumulator_columns(*ns) > 256 else 32
    splits, num_stages = _fill(m // block_m, cdiv(k, 128), target), 2 if target.is_cuda() else 1
    return KernelConfig("prefill", block_m, 128, splits, num_stages, _prefill_warps(target, is_fp16))


def _prefill_warps(target: Target, is_fp16: bool) -> int:
    return 4 if is_fp16 and not target.is_cuda() else 8  # with 8, a thread would load less than 16 bytes


def _fill(tiles: int, steps: int, target: Target) -> int:
    """Splits of K that fill the GPU in one wave: a power of two, or fewer where the last splits would be empty."""
    fit = next_power_of_2(target.sm_count // tiles + 1) // 2  # the largest power of two that fits, or 0
    return cdiv(steps, cdiv(steps, max(1, min(MAX_SPLIT_K, fit))))


def accumulator_columns(*ns: int) -> int:
    """Accumulator columns of a prefill program: each N rounded up to a power of two, at least 16."""
    return sum([next_power_of_2(max(n, 16)) for n in ns])


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


# Tables of `indexproj tune`.

TABLE_VARIABLE = "INDEXPROJ_TUNED"  # a file to read instead of the default one; empty for none
TABLE_SCHEMA = 1
# dtypes of k and gate that are measured: those of `project`, and one tensor for both, which vLLM's forward slices.
OUTS = {"fp32": (torch.bfloat16, torch.float32), "bf16": (torch.bfloat16, torch.bfloat16)}

Case = tuple[int, tuple[int, ...], tuple[Format, ...]]  # M (a power of two), shape, formats


@dataclass(frozen=True)
class TunedTable:
    """The fastest config of each measured case.

    Attributes:
        configs: case -> config. The case with M stands for all that round up to it.
        torch_for: case -> dtypes of the outputs for which torch.mm was faster. All matrices are BF16.
    """

    configs: Mapping[Case, KernelConfig]
    torch_for: Mapping[Case, tuple[tuple[torch.dtype, ...], ...]]

    @classmethod
    def read(cls, path: Path, gpu: str) -> TunedTable:
        """Reads what benchmarks/tune.py wrote.

        Raises:
            OSError: the file cannot be read.
            ValueError, KeyError, TypeError, AttributeError: it is no table, or one of another GPU or other versions.
        """
        found = json.loads(path.read_text(encoding="utf-8"))
        for key, expected in (("schema", TABLE_SCHEMA), ("gpu", gpu), ("versions", versions())):
            if found[key] != expected:
                raise ValueError(f"expected {key} {expected}, found {found[key]}")
        configs, torch_for = {}, {}
        for entry in found["entries"]:
            case = entry["m"], tuple(entry["shape"]), tuple(map(Format, entry["formats"]))
            configs[case] = KernelConfig(**entry["config"])
            is_bf16 = set(case[2]) == {Format.BF16}  # torch.mm takes no other weights
            torch_for[case] = tuple(OUTS[name] for name in entry["torch_for"] if is_bf16)
        return cls(configs, torch_for)


@functools.cache
def versions() -> dict[str, str]:
    """What measurements depend on besides the GPU. Kernels count by their text, which changes between versions."""
    names = "tile", "gemv", "split_k", "prefill", "launch"
    text = b"".join(Path(__file__).with_name(f"{name}.py").read_bytes() for name in names)
    kernels = f"{version('indexproj')}-{hashlib.sha256(text).hexdigest()[:12]}"
    return {"indexproj": kernels, "torch": torch.__version__, "triton": triton.__version__}


def table_path(gpu: str) -> Path:
    """Where the table of a GPU is kept by default."""
    folder = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return folder / "indexproj" / f"{'-'.join(gpu.lower().split())}.json"


@functools.cache
def table_of(device: torch.device) -> TunedTable | None:
    """The table for a device, read once per process; None without one, with a WARNING if it cannot be used."""
    chosen = os.environ.get(TABLE_VARIABLE)
    if device.type != "cuda" or INTERPRETED or chosen == "":
        return None
    gpu = torch.cuda.get_device_name(device)
    path: Any = chosen
    try:
        path = Path(chosen) if chosen else table_path(gpu)
        if chosen is None and not path.exists():
            return None
        table = TunedTable.read(path, gpu)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # RuntimeError: no home
        LOGGER.warning("indexproj ignores the tuned table %s: %r; run `indexproj tune` again", path, error)
        return None
    LOGGER.info("indexproj uses the tuned table %s", path)
    return table
