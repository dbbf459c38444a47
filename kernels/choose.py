"""Which kernel runs, in which shape: a pure function, so that it can be read and tested without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .target import Target


@dataclass(frozen=True)
class KernelConfig:
    """One compiled kernel, but for pointers, strides and M.

    Attributes:
        slices: parts of K that one program multiplies side by side (split_k only).
        split_k: programs that share the K of one output tile.
    """

    regime: Literal["split_k", "tiled"]
    block_m: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
    block_n: int = 16
    slices: int = 1

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's own compile-time arguments."""
        constants = {"BLOCK_M": self.block_m, "BLOCK_K": self.block_k, "SPLIT_K": self.split_k}
        if self.regime == "split_k":
            constants |= {"BLOCK_N": self.block_n, "SLICES": self.slices}
        return constants

    def grid(self, m: int, d: int, h: int) -> tuple[int, ...]:
        """Programs of one launch."""
        tiles_m = cdiv(m, self.block_m)
        if self.regime == "tiled":
            return tiles_m, self.split_k
        return cdiv(d, self.block_n) + cdiv(h, self.block_n), self.split_k, tiles_m

    def workspace(self, m: int, d: int, h: int) -> tuple[int, int]:
        """(fp32 partials, int32 arrival counters) that one launch needs."""
        tiles_m = cdiv(m, self.block_m)
        if self.regime == "tiled":
            if self.split_k == 1:
                return 0, 0
            size = self.block_m * (next_power_of_2(max(d, 16)) + next_power_of_2(max(h, 16)))
            return tiles_m * self.split_k * size, tiles_m
        tiles = tiles_m * (cdiv(d, self.block_n) + cdiv(h, self.block_n))
        return tiles * self.split_k * self.block_m * self.block_n, tiles


def choose(m: int, shape: tuple[int, int, int], target: Target) -> KernelConfig:
    """The config for m >= 1 rows of x and matrices of shape (D, H, K).

    m counts only up to the next power of two, so that a serving engine compiles a dozen kernels, not thousands.
    The limits come from published timings of neighbouring shapes and from compiled code (registers, shared
    memory); nobody has measured them on a GPU for this operation yet.
    """
    k = shape[2]
    m = next_power_of_2(m)
    if m <= 64:
        # One step over 512 of K fills the GPU with programs that each read their weights at once. At 64 rows that
        # many rows of x no longer fit the registers, and two smaller steps do.
        slices, num_warps = (8, 8) if m <= 32 else (4, 4)
        return KernelConfig(
            "split_k", block_m=max(m, 16), block_k=64, slices=slices, split_k=min(16, cdiv(k, 512)),
            num_warps=num_warps, num_stages=2,
        )  # fmt: skip
    block_m = 16 if m <= 256 else 32 if m <= 1024 else 64
    # Where a warp holds its operands in registers, a decoded weight tile must be small to fit beside the sums.
    in_registers = target.warp_mma or (target.backend == "cuda" and block_m == 32)
    block_k = 32 if in_registers and block_m > 16 else 64
    fill = next_power_of_2(target.sm_count // (m // block_m) + 1) // 2  # largest power of two that fits
    return KernelConfig(
        "tiled", block_m=block_m, block_k=block_k, split_k=max(1, min(16, fill, cdiv(k, block_k))),
        num_warps=8 if block_m == 64 else 4, num_stages=3,
    )  # fmt: skip


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
