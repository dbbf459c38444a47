"""Which kernel runs, in which shape: a pure function, so that it can be read and tested without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .target import Target


@dataclass(frozen=True)
class KernelConfig:
    """One compiled kernel, but for pointers, strides and M.

    Attributes:
        block_m: rows of x per program.
        block_n: rows of a matrix per program (split_k only; a tiled program owns all).
        slices: parts of K that one program multiplies side by side (split_k only).
        split_k: programs that share the K of one output tile.
    """

    regime: Literal["split_k", "tiled"]
    block_m: int
    block_k: int
    split_k: int
    num_stages: int
    num_warps: int = 8
    block_n: int = 16
    slices: int = 1

    def __post_init__(self) -> None:
        if self.block_k not in (32, 64, 128):  # whole groups of 32 values in one block of 128
            raise ValueError(f"KernelConfig: block_k must be 32, 64 or 128, got {self.block_k}")

    def constants(self, *ns: int) -> dict[str, int]:
        """The kernel's own compile-time arguments, for matrices of so many rows."""
        constants = {"BLOCK_M": self.block_m, "BLOCK_K": self.block_k, "SPLIT_K": self.split_k}
        if self.regime == "split_k":
            return constants | {"BLOCK_N": self.block_n, "SLICES": self.slices}
        return constants | {"SIZE": self.block_m * sum(next_power_of_2(max(n, 16)) for n in ns)}

    def grid(self, m: int, *ns: int) -> tuple[int, ...]:
        """Programs of one launch."""
        tiles_m = cdiv(m, self.block_m)
        if self.regime == "tiled":
            return tiles_m, self.split_k
        return sum(cdiv(n, self.block_n) for n in ns), self.split_k, tiles_m

    def workspace(self, m: int, *ns: int) -> tuple[int, int]:
        """(fp32 partials, int32 arrival counters) that one launch needs."""
        tiles_m = cdiv(m, self.block_m)
        if self.regime == "tiled":
            return (0, 0) if self.split_k == 1 else (tiles_m * self.split_k * self.constants(*ns)["SIZE"], tiles_m)
        tiles = tiles_m * sum(cdiv(n, self.block_n) for n in ns)
        return tiles * self.split_k * self.block_m * self.block_n, tiles


def choose(m: int, shape: tuple[int, ...], target: Target, x_dtype: torch.dtype = torch.bfloat16) -> KernelConfig:
    """The config for m >= 1 rows of x and matrices of shape (D, H, K), or of more before the K.

    m counts only up to the next power of two, so that a serving engine compiles a dozen kernels, not thousands.
    The limits come from published timings of neighbouring shapes and from compiled code (registers, shared
    memory); nobody has measured them on a GPU for this operation yet.
    """
    k = shape[-1]
    m = next_power_of_2(m)
    if m <= 64:
        # One step over 512 of K: enough programs to fill a GPU, each reading its weights in one go. NVIDIA's tensor
        # cores take 8 rows of x, AMD's 16; more than 32 would not fit beside the weights.
        block_m = min(max(m, 8 if target.backend == "cuda" else 16), 32)
        split_k = min(16, cdiv(k, 512))
        return KernelConfig("split_k", block_m=block_m, block_k=64, slices=8, split_k=split_k, num_stages=2)
    # fp16 is multiplied in fp32, which takes twice the room; and on sm_120 FP8 weights beside 64 rows spill.
    is_wide = x_dtype != torch.bfloat16
    block_m = 16 if m <= 256 else 32 if is_wide or target.arch == 120 else 64
    block_k = 32 if is_wide else 64
    fill = next_power_of_2(target.sm_count // (m // block_m) + 1) // 2  # largest power of two that fits, or 0
    split_k = max(1, min(16, fill, cdiv(k, block_k)))
    return KernelConfig("tiled", block_m=block_m, block_k=block_k, split_k=split_k, num_stages=3)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
