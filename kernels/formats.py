"""The formats of weight matrices, and what the kernels take of each."""

from enum import Enum
from typing import Literal

import torch
from torch import Tensor

SCALE_BLOCK, MX_GROUP, NVFP4_GROUP = 128, 32, 16

# How a matrix takes x: unchanged, or rounded to e4m3 (W8A8). The kernels know an activation by its position.
Activation = Literal["fp8", "fp8_ue8m0"]
ACTIVATIONS: tuple[Activation | None, ...] = (None, "fp8", "fp8_ue8m0")

# Values or codes, scales of groups or blocks, scales of rows; None where the format has none.
Operands = tuple[Tensor, Tensor | None, Tensor | None]


class Format(Enum):
    """How a matrix is stored, see `Matrix`. The kernels know a format by its position."""

    BF16 = "BF16"
    FP8_BLOCK = "FP8 128x128"
    FP8_ROW = "FP8 per row"
    MXFP8 = "MXFP8"
    NVFP4 = "NVFP4"
    MXFP4 = "MXFP4"

    __hash__ = object.__hash__  # Enum's own is a Python function, which every launch would call

    def __str__(self) -> str:
        return self.value


def parse_pair(pair: str) -> tuple[Format, ...]:
    """The formats in a label such as "FP8 128x128, BF16". Raises ValueError for an unknown one."""
    return tuple(Format(label) for label in pair.split(", "))


FP4 = Format.NVFP4, Format.MXFP4  # two codes per byte

# (dtype, shape) of the values, scale and row scale of a matrix; None where the format has none.
Layout = tuple[tuple[torch.dtype, tuple[int, int]] | None, ...]


def matrix_layout(format: Format, n: int, k: int) -> Layout:
    """The layout of a `Matrix` [N, K]."""
    fp8, fp4, row_scale = (torch.float8_e4m3fn, (n, k)), (torch.uint8, (n, k // 2)), (torch.float32, (n, 1))
    grid = scale_shape((n, k), *scale_group(format, k))
    fp32, e4m3, e8m0 = ((dtype, grid) for dtype in (torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu))
    return {
        "BF16": ((torch.bfloat16, (n, k)), None, None),
        "FP8_BLOCK": (fp8, fp32, None),
        "FP8_ROW": (fp8, None, row_scale),
        "MXFP8": (fp8, e8m0, None),
        "NVFP4": (fp4, e4m3, row_scale),
        "MXFP4": (fp4, e8m0, None),
    }[format.name]  # torch 2.11 does not trace a format as a key


def operand_layout(format: Format, n: int, k: int) -> Layout:
    """What the kernels take: codes and 8-bit scales are uint8, as sm_80 and gfx942 have no e4m3fn type."""
    layout = matrix_layout(format, n, k)
    return tuple([each and (torch.uint8 if each[0].itemsize == 1 else each[0], each[1]) for each in layout])


def scale_group(format: Format, k: int) -> tuple[int, int]:
    """(rows, columns) that share a scale in a matrix [N, K]."""
    if format == Format.FP8_BLOCK:
        return SCALE_BLOCK, SCALE_BLOCK
    if format in (Format.MXFP8, Format.MXFP4):
        return 1, MX_GROUP
    return 1, NVFP4_GROUP if format == Format.NVFP4 else k


def scale_shape(shape: tuple[int, ...], rows: int = SCALE_BLOCK, columns: int = SCALE_BLOCK) -> tuple[int, int]:
    """The grid of scales of a matrix [N, K], ragged groups included: (ceil(N/rows), ceil(K/columns))."""
    return -(-shape[0] // rows), -(-shape[1] // columns)


def spread(scale: Tensor, group: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """[N, K] with each scale repeated over its group."""
    return scale.repeat_interleave(group[0], 0)[: shape[0]].repeat_interleave(group[1], 1)[:, : shape[1]]
