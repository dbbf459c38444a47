"""A weight matrix in a kernel-ready layout."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import FP4, Format, Operands, matrix_layout, scale_group, spread


@dataclass(frozen=True, eq=False)
class Matrix:
    """A weight matrix [N, K]: value = code * scale * row_scale. Tensors are contiguous (K-major), on one device.

    format       values                  scale                                 row_scale
    BF16         bfloat16 [N, K]         None                                  None
    FP8_BLOCK    float8_e4m3fn [N, K]    float32 [ceil(N/128), ceil(K/128)]    None
    FP8_ROW      float8_e4m3fn [N, K]    None                                  float32 [N, 1]
    MXFP8        float8_e4m3fn [N, K]    float8_e8m0fnu [N, ceil(K/32)]        None
    NVFP4        uint8 [N, K/2]          float8_e4m3fn [N, ceil(K/16)]         float32 [N, 1]
    MXFP4        uint8 [N, K/2]          float8_e8m0fnu [N, ceil(K/32)]        None

    A byte of FP4 values has two e2m1 codes, the even column's in its low half. NVFP4's global factor is repeated in
    every row, so that matrices can be concatenated. The e4m3 codes 0x7F and 0xFF, NaN in e4m3fn, are +480 and -480
    here, as in the kernels: e4m3fnuz codes need them. Loading refuses NaN codes; checking here would force a GPU sync.

    Raises:
        TypeError: another dtype, or a tensor that the format does not have or lacks.
        ValueError: shapes that do not fit together, an empty or non-contiguous tensor, or two devices.
    """

    format: Format
    values: Tensor
    scale: Tensor | None = None
    row_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.format, Format) and isinstance(self.values, Tensor)):
            raise TypeError(f"Matrix: expected a Format and values, got {self.format!r} and {type(self.values)}")
        if self.values.ndim != 2 or 0 in self.values.shape:
            raise ValueError(f"Matrix.values: expected a non-empty 2-D tensor, got shape {list(self.values.shape)}")
        (n, k), names = self.shape, ("values", "scale", "row_scale")
        for name, layout in zip(names, matrix_layout(self.format, n, k), strict=True):
            tensor, field = getattr(self, name), f"Matrix.{name} in {self.format}"
            dtype, shape = layout or (None, ())
            found = None if tensor is None else tensor.dtype
            if found != dtype:
                raise TypeError(f"{field}: expected {dtype}, got {found}")
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{field}: expected {list(shape)} for a matrix {[n, k]}, got {list(tensor.shape)}")
            if not tensor.is_contiguous():
                raise ValueError(f"{field}: expected contiguous, got strides {tensor.stride()}; call .contiguous()")
            if tensor.device != self.device:
                raise ValueError(f"{field}: expected it on {self.device} like the values, got {tensor.device}")

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The values, and the scales that the format has."""
        return tuple([tensor for tensor in (self.values, self.scale, self.row_scale) if tensor is not None])

    @property
    def operands(self) -> Operands:
        """What the kernels take: views, rebuilt on each call, since engines may move the memory of parameters."""
        tensors = self.values, self.scale, self.row_scale
        return tuple([t if t is None or t.itemsize > 1 else t.view(torch.uint8) for t in tensors])  # type: ignore

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.values.shape
        return n, k * (2 if self.format in FP4 else 1)

    @property
    def group(self) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        return scale_group(self.format, self.shape[1])

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in dtype. fp64 is exact; fp32 rounds for each of the scales; narrower dtypes once more."""
        if self.format == Format.BF16:
            return self.values.to(dtype)
        wide, codes = torch.float64 if dtype == torch.float64 else torch.float32, self.values.view(torch.uint8)
        if self.format in FP4:
            positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=wide, device=self.device)
            table, codes = torch.cat((positive, -positive)), torch.stack((codes & 0xF, codes >> 4), -1).flatten(1)
        else:
            table = torch.arange(256, dtype=torch.uint8, device=self.device).view(torch.float8_e4m3fn).to(wide)
            table[0x7F], table[0xFF] = 480, -480
        values = table[codes.int()]
        if self.scale is not None:
            values = values * spread(self.scale.to(wide), self.group, self.shape)
        return (values if self.row_scale is None else values * self.row_scale.to(wide)).to(dtype)

    def rows(self, start: int, stop: int) -> "Matrix":
        """Rows from start to stop, as views. Raises ValueError if start lies inside a block that shares scales."""
        height = self.group[0]
        if start % height:
            expected = f"a start that is a multiple of {height}, as {height} rows share scales"
            raise ValueError(f"Matrix.rows: expected {expected}, got {start}")
        scales = [scale[start // height : -(-stop // height)] for scale in self.tensors[1:]]
        return self._with(self.values[start:stop], *scales)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Matrix":
        """The same matrix with fn applied to its tensors."""
        return self._with(*map(fn, self.tensors))

    def _with(self, *tensors: Tensor) -> "Matrix":
        values, *scales = tensors
        return Matrix(self.format, values, *([None] * (self.scale is None)), *scales)

    def matches(self, other: "Matrix") -> bool:
        """True if the two have the same format, shape and device."""
        return (self.format, self.shape, self.device) == (other.format, other.shape, other.device)
