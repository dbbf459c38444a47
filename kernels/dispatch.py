"""Which kernel runs, in which shape: a pure function, so that it can be read and tested without a GPU."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .matrix import Kind
from .target import Target

MAX_SPLIT_K = 16
_POWERS = [1, 2, 4, 8, 16, 32, 64, 128, 256]


@dataclass(frozen=True)
class KernelConfig:
    """One compiled kernel, but for pointers, strides and M.

    Attributes:
        block_m: rows of x per program.
        split_k: parts of the K of one output tile, one program each.
        block_n: rows of a matrix per program (split_k only; a gemv program owns one, a tiled program all).
        slices: parts of K that one program multiplies side by side (gemv and split_k only).
        serial: one program computes all splits of its tile, one after the other (split_k only).
        pdl: wait for the kernel before this one as late as possible (gemv and split_k, sm_90 and newer). Off by
            default, as nobody has measured it yet.
    """

    regime: Literal["gemv", "split_k", "tiled"]
    block_m: int
    block_k: int
    split_k: int = 1
    num_stages: int = 1
    num_warps: int = 8
    block_n: int = 16
    slices: int = 1
    serial: bool = False
    pdl: bool = False

    def __post_init__(self) -> None:
        expected = {
            "regime": ("gemv", "split_k", "tiled"),
            "block_m": _POWERS[:9],
            "block_n": _POWERS[4:9],
            "block_k": (32, 64, 128),  # whole groups of 32 values in one block of 128
            "slices": _POWERS[:6],
            "split_k": range(1, MAX_SPLIT_K + 1),
            "num_stages": range(1, 9),
            "num_warps": _POWERS[:5],
            "serial": (False, True),
            "pdl": (False, True),
        }
        for name, values in expected.items():
            found = getattr(self, name)
            if type(found) is not type(values[0]) or found not in values:
                raise ValueError(f"KernelConfig: {name} must be one of {', '.join(map(str, values))}, got {found!r}")

    def __str__(self) -> str:
        block_n = f"x{self.block_n}" if self.regime == "split_k" else ""
        split = f", K in {self.split_k}" if self.split_k > 1 else ""
        return f"{self.regime} {self.block_m}{block_n}x{self.slices * self.block_k}{split}{', serial' * self.serial}"

    def size(self, *ns: int) -> int:
        """Elements of the accumulators of one program, for matrices of so many rows."""
        if self.regime == "tiled":
            return self.block_m * columns_together(*ns)
        return self.block_m * (self.block_n if self.regime == "split_k" else 1)

    @property
    def has_workspace(self) -> bool:
        """Whether programs pass partial sums to each other."""
        return not self.serial if self.regime == "split_k" else self.split_k > 1

    def grid(self, m: int, *ns: int) -> tuple[int, ...]:
        """Programs of one launch."""
        tiles_m = cdiv(m, self.block_m)
        if self.regime == "gemv":
            return sum(ns), tiles_m, 1
        if self.regime == "tiled":
            return tiles_m, self.split_k, 1
        return sum([cdiv(n, self.block_n) for n in ns]), 1 if self.serial else self.split_k, tiles_m

    def reads(self, m: int, *ns: int) -> tuple[int, int]:
        """How often the programs of a launch ask for each byte of the weights, and of x; caches answer most of it."""
        return cdiv(m, self.block_m), 1 if self.regime == "tiled" else self.grid(m, *ns)[0]

    def workspace(self, grid: tuple[int, ...], *ns: int) -> tuple[int, int]:
        """(fp32 partials, int32 arrival counters) that a launch on that grid needs."""
        if not self.has_workspace:
            return 0, 0
        programs = math.prod(grid)
        return programs * self.size(*ns), programs // self.split_k


def choose(
    m: int,
    shape: tuple[int, ...],
    kinds: tuple[int, ...],
    target: Target,
    x_dtype: torch.dtype = torch.bfloat16,
    *,
    batch_invariant: bool = False,
) -> KernelConfig:
    """The config for m >= 1 rows of x and matrices of these kinds and of shape (D, H, K), or of more before the K.

    m counts only up to the next power of two, so that a serving engine compiles a dozen kernels, not thousands.
    The limits come from published timings of neighbouring shapes and from compiled code (registers, shared
    memory); nobody has measured them on a GPU for this operation yet.
    """
    return _choose(next_power_of_2(m), shape, kinds, target, x_dtype, batch_invariant)


@functools.cache
def _choose(
    m: int,
    shape: tuple[int, ...],
    kinds: tuple[int, ...],
    target: Target,
    x_dtype: torch.dtype,
    batch_invariant: bool,
) -> KernelConfig:
    *ns, k = shape
    # A W8A8 matrix takes x in e4m3: every step of a program is whole groups of 128 of K, and rounding x takes
    # registers, so that more rows or stages than these would spill.
    w8a8 = max(kinds) >= Kind.W8A8
    if m <= (1 if w8a8 else 8 if target.is_cuda(100) else 4) and not batch_invariant:
        # 16 bytes of x per thread and step. Blackwell multiplies bf16 into fp32 in one instruction, which pays longer.
        return KernelConfig("gemv", block_m=m, block_k=128, slices=8, num_warps=4 if target.is_cuda() else 2)
    is_wide = x_dtype != torch.bfloat16  # fp16 is multiplied in fp32, which takes twice the room
    # One step over 512 of K: enough programs to fill a GPU, each reading its weights in one go. NVIDIA's tensor cores
    # take 8 rows of x, AMD's 16; more than 32 would not fit beside the weights.
    block_m, splits = min(max(m, 8 if target.is_cuda() else 16), 32), min(MAX_SPLIT_K, cdiv(k, 512))
    decode = KernelConfig("split_k", block_m=block_m, block_k=64, slices=8, split_k=splits, num_stages=2)
    if batch_invariant:
        return replace(decode, serial=m > 64)
    if m <= (32 if w8a8 else 64):
        # Every SM holds two of these programs; two steps each are better than a second wave. Three would spill,
        # and so would two beside an x that is rounded.
        has_room = math.prod(decode.grid(m, *ns)) <= 2 * target.sm_count
        return decode if has_room or w8a8 else replace(decode, split_k=cdiv(splits, 2))
    # On sm_120, weights that are decoded spill beside 64 rows.
    is_tight = is_wide or (target.arch == 120 and set(kinds) != {Kind.BF16})
    block_m = 16 if m <= 256 else 32 if is_tight else 64
    # A third matrix and two blocks of 64 of K do not fit the 64 KiB of gfx942.
    block_k = 32 if is_wide or columns_together(*ns) > (320 if target.is_cuda() else 256) else 64
    if w8a8:
        block_m, block_k = 16 if m <= 256 or is_wide or columns_together(*ns) > 256 else 32, 128
    fill = next_power_of_2(target.sm_count // (m // block_m) + 1) // 2  # largest power of two that fits, or 0
    steps = cdiv(k, block_k)
    # Fewer, where the last ones would find no steps left.
    split_k = cdiv(steps, cdiv(steps, max(1, min(MAX_SPLIT_K, fill))))
    num_warps = 4 if is_wide and not target.is_cuda() else 8  # 8 waves would load less than 16 bytes a thread
    num_stages = 3 if not w8a8 else 2 if target.is_cuda() else 1
    return KernelConfig("tiled", block_m, block_k, split_k, num_stages, num_warps)


def candidates(m: int, shape: tuple[int, ...], kinds: tuple[int, ...], target: Target) -> list[KernelConfig]:
    """What is worth measuring for m rows of bf16 x: what `choose` reckons, then what is near to it and fills the GPU.

    Of each regime in turn, so that where time runs out, none has been left out.
    """
    m, (*ns, k) = next_power_of_2(m), shape
    gemvs, splits, tiles = [], [], []
    if m <= 16:
        for block_m, num_warps in itertools.product((min(m, 4), min(m, 8)), (2, 4, 8)):
            gemvs.append(KernelConfig("gemv", block_m, block_k=128, num_warps=num_warps, slices=8))
    if 2 <= m <= 1024:
        lowest = 8 if target.is_cuda() else 16
        rows = [rows for rows in (8, 16, 32) if lowest <= rows < 2 * max(m, lowest)]
        for block_m, block_n, slices, steps in itertools.product(rows, (16, 32), (4, 8), (1, 2, 4)):
            split_k = cdiv(k, slices * 64 * steps)
            if split_k <= MAX_SPLIT_K:
                splits.append(KernelConfig("split_k", block_m, 64, split_k, 2, slices, block_n, slices))
    if m >= 32:
        for block_m, split_k in itertools.product((16, 32, 64, 128), (1, 2, 4, 8, 16)):
            if block_m <= m:
                for num_stages in (3,) if split_k > 1 else (3, 2, 4):
                    tiles.append(KernelConfig("tiled", block_m, 64, split_k, num_stages, 4 if block_m < 64 else 8))

    def fills(config: KernelConfig) -> bool:
        programs, one_wave = math.prod(config.grid(m, *ns)), target.sm_count
        may_queue = config.regime == "tiled" and config.split_k == 1
        return one_wave / 4 <= programs and (programs <= 4 * one_wave or may_queue)

    near = itertools.zip_longest(*(filter(fills, configs) for configs in (gemvs, splits, tiles)))
    in_turn = [config for configs in near for config in configs if config is not None]
    return list(dict.fromkeys([choose(m, shape, kinds, target), *in_turn]))


def columns_together(*ns: int) -> int:
    """Columns of the accumulators of a tiled program: of each matrix a power of two, 16 at least."""
    return sum([next_power_of_2(max(n, 16)) for n in ns])


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
