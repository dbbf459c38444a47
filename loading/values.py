"""Judges values: refuses those that overflow in the kernels' fp32 sums, become NaN or vanish, and notes odd ones."""

import torch
from torch import Tensor

from ..kernels.formats import FP4, Format
from ..kernels.matrix import Matrix
from .problems import ranges

_LARGEST, _SMALLEST = 2.0**100, 2.0**-100
_LEAST, _MOST = 1e-10, 1e10  # the largest weight of a matrix is in between, unless its scales are misread
_ALL_ZERO = "values other than 0", "nothing but 0, as in a hole that an unfinished download leaves"
_SCALES = "scales with a magnitude from 2**-100 to 2**100, smaller or 0 only where all codes are 0"

Faults = dict[str, tuple[str, str]]  # role -> (expected values, found values)


def nan_codes(codes: Tensor) -> Faults:
    """Finds NaN in FP8 codes as stored, which kernels decode to numbers: 0x7F, 0xFF in e4m3fn, 0x80 in e4m3fnuz."""
    if codes.dtype == torch.float8_e4m3fn:
        has_nan = int(codes.view(torch.int8).max()) == 0x7F or int(codes.view(torch.uint8).max()) == 0xFF
    else:
        has_nan = codes.dtype == torch.float8_e4m3fnuz and int(codes.view(torch.int8).min()) == -0x80
    return {"weight": ("finite values", _summary(codes))} if has_nan else {}


def judge(matrix: Matrix) -> tuple[Faults, list[str]]:
    """Returns bad values, and in words those that load but that no training leaves.

    The latter are rows and blocks of zeros (pruned heads, half-written files) and negative scales. NaN among FP8 codes
    is up to `nan_codes`.
    """
    faults: Faults = {}
    oddities: list[str] = []
    if matrix.format == Format.BF16:
        # Ignoring the sign, bf16 values sort like their bits, with infinity and NaN above all others.
        bits = (matrix.values.view(torch.int16) & 0x7FFF).amax(1, keepdim=True)
        values, sizes = matrix.values, bits.view(torch.bfloat16).float()
    else:
        sizes = _largest_codes(matrix)
        for role, scale in zip(("scale", "global_scale"), matrix.tensors[1:], strict=False):
            sizes = judge_scale(role, scale.float(), sizes, matrix.group[0] if role == "scale" else 1, faults, oddities)
        values = sizes
    largest = sizes.max().item()  # NaN if one is
    if not faults and not _LEAST <= largest <= _MOST:
        expected = f"a largest magnitude from {_LEAST:.0e} to {_MOST:.0e}"
        faults["weight"] = (expected, _summary(values)) if largest else _ALL_ZERO
    is_zero = sizes == 0
    if is_zero.any():
        oddities += _zeros(is_zero, matrix)
    return faults, oddities


def judge_scale(role: str, scale: Tensor, sizes: Tensor, rows: int, faults: Faults, oddities: list[str]) -> Tensor:
    """Judges a scale [ceil(N / rows), groups] fp32 of codes whose largest magnitudes are sizes [N, groups] fp32.

    Returns sizes times the scale.
    """
    size = scale.abs().repeat_interleave(rows, 0)[: len(sizes)]
    if not ((size <= _LARGEST) & ((sizes == 0) | (size >= _SMALLEST))).all():
        faults[role] = (_SCALES, _summary(scale)) if scale.any() else _ALL_ZERO
    if negative := int((scale < 0).sum()):
        oddities.append(f"{negative} negative values in {role}")
    return sizes * size


def _largest_codes(matrix: Matrix) -> Tensor:
    """The largest magnitude of the codes in each group of columns of a row, [N, ceil(K / group)] fp32."""
    codes, width = matrix.values.view(torch.uint8), matrix.group[1]
    if matrix.format in FP4:
        codes, width = torch.maximum(codes & 7, codes >> 4 & 7), width // 2
    else:
        codes = codes & 0x7F
    n, k = codes.shape
    groups = torch.nn.functional.pad(codes, (0, -k % width)).view(n, -1, width).amax(2)
    if matrix.format in FP4:
        return torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)[groups.int()]
    return groups.clamp(max=0x7E).view(torch.float8_e4m3fn).float()  # 0x7F is 480 here


def _zeros(is_zero: Tensor, matrix: Matrix) -> list[str]:
    """Rows of zeros, and blocks of zeros in other rows, in words; is_zero is [N, groups of columns]."""
    rows = is_zero.all(1)
    found = [f"zeros in rows {ranges(rows.nonzero().flatten().tolist())}"] if rows.any() else []
    height, width = matrix.group
    # A block within rows of zeros has been named.
    bands = [slice(start, start + height) for start in range(0, len(rows), height)]
    blocks = torch.stack([is_zero[band].all(0) & ~rows[band].all() for band in bands]).nonzero().tolist()
    if blocks:
        (i, j), (n, k) = blocks[0], matrix.shape
        where = f"rows {i * height}-{min(n, (i + 1) * height) - 1}, columns {j * width}-{min(k, (j + 1) * width) - 1}"
        found.append(f"{len(blocks)} blocks of zeros, the first in {where}")
    return found


def _summary(tensor: Tensor) -> str:
    values = tensor.float()
    bad = ~values.isfinite()
    if bad.any():
        return f"{int(bad.sum())} NaN or infinite of {values.numel()}, the first at {bad.nonzero()[0].tolist()}"
    sizes = values.abs()
    return f"magnitudes from {sizes.min():.1e} to {sizes.max():.1e}"
