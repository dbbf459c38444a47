"""Weight matrices in kernel-ready layouts."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .formats import Format, Operands, operand_layout, scale_group, spread


class Matrix(ABC):
    """A weight matrix [N, K]. Subclasses are frozen dataclasses that define its tensors, values or codes first."""

    @property
    @abstractmethod
    def format(self) -> Format: ...

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in dtype. fp64 is exact; fp32 rounds for each of the scales; narrower dtypes once more."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, in the order of the constructor's arguments."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(tensor for tensor in values if tensor is not None)

    @property
    def operands(self) -> Operands:
        """What the kernels take, see `operand_layout`: views, made anew, as engines move the memory of parameters."""
        values, *scales = [tensor.view(torch.uint8) if tensor.itemsize == 1 else tensor for tensor in self.tensors]
        if self.format == Format.FP8_ROW:
            return values, None, scales[0]
        return values, scales[0] if scales else None, scales[1] if len(scales) > 1 else None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        n, k = self.tensors[0].shape
        return n, k * (2 if self.format in (Format.NVFP4, Format.MXFP4) else 1)

    @property
    def group(self) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        return scale_group(self.format, self.shape[1])

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def rows(self, start: int, stop: int) -> "Matrix":
        """Rows from start to stop, as views.

        Raises:
            ValueError: start lies inside a block of rows that share scales.
        """
        height = self.group[0]
        if start % height:
            expected = f"a start that is a multiple of {height}, as {height} rows share scales"
            raise ValueError(f"{type(self).__name__}.rows: expected {expected}, got {start}")
        first, *scales = self.tensors
        parts = [first[start:stop], *(scale[start // height : -(-stop // height)] for scale in scales)]
        return type(self)(*parts)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Matrix":
        """The same matrix with fn applied to its tensors."""
        return type(self)(*map(fn, self.tensors))

    def matches(self, other: "Matrix") -> bool:
        """True if the two have the same class, shapes, dtypes and device."""
        return type(self) is type(other) and [(t.shape, t.dtype, t.device) for t in self.tensors] == [
            (t.shape, t.dtype, t.device) for t in other.tensors
        ]

    def _check(self, **dtypes: tuple[torch.dtype, ...]) -> None:
        """Checks each field: dtype, contiguous and 2-D, one device, and the shape in `operand_layout`."""
        for name, expected in dtypes.items():
            tensor, field = getattr(self, name), f"{type(self).__name__}.{name}"
            if tensor.dtype not in expected:
                raise TypeError(f"{field}: expected {' or '.join(map(str, expected))}, got {tensor.dtype}")
            if tensor.ndim != 2 or 0 in tensor.shape:
                raise ValueError(f"{field}: expected a non-empty 2-D tensor, got shape {list(tensor.shape)}")
            if not tensor.is_contiguous():
                strides = f"strides {tensor.stride()} for shape {list(tensor.shape)}"
                raise ValueError(f"{field}: expected a contiguous tensor, got {strides}; call .contiguous()")
            if tensor.device != self.device:
                raise ValueError(f"{field}: expected it on {self.device} like the others, got {tensor.device}")
        n, k = self.shape
        for name, (_, shape) in zip(dtypes, filter(None, operand_layout(self.format, n, k)), strict=True):
            found = tuple(getattr(self, name).shape)
            if found != shape:
                per_row = f" or {[n, 1]}" if self.format == Format.FP8_BLOCK else ""
                got = f"for a matrix {[n, k]}, got {list(found)}"
                raise ValueError(f"{type(self).__name__}.{name}: expected {list(shape)}{per_row} {got}")


@dataclass(frozen=True, eq=False)
class DenseMatrix(Matrix):
    """A bf16 matrix.

    Attributes:
        weight: [N, K] bf16, contiguous (K-major).

    Raises:
        TypeError: another dtype.
        ValueError: not 2-D, empty or not contiguous.
    """

    weight: Tensor

    def __post_init__(self) -> None:
        self._check(weight=(torch.bfloat16,))

    @property
    def format(self) -> Format:
        return Format.BF16

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)


@dataclass(frozen=True, eq=False)
class Fp8Matrix(Matrix):
    """An e4m3 matrix: value = code * scale.

    The codes 0x7F and 0xFF, NaN in e4m3fn, are +480 and -480 here, as in the kernels: e4m3fnuz codes need them (see
    `from_e4m3fnuz`). Loading refuses NaN codes; checking for them here would wait for the GPU.

    Attributes:
        codes: [N, K] float8_e4m3fn, contiguous (K-major).
        scale: contiguous, one of
            fp32 [ceil(N/128), ceil(K/128)], per 128x128 block (DeepSeek-V3's `weight_scale_inv`);
            fp32 [N, 1], per row;
            float8_e8m0fnu [N, ceil(K/32)], per 32 values along K (MXFP8).

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not fit together, an empty or non-contiguous tensor, or two devices.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        self._check(codes=(torch.float8_e4m3fn,), scale=(torch.float32, torch.float8_e8m0fnu))

    @classmethod
    def from_e4m3fnuz(cls, codes: Tensor, scale: Tensor) -> "Fp8Matrix":
        """From float8_e4m3fnuz codes other than NaN (0x80): keeps their bits and halves the scale, exactly.

        Read as e4m3fn, with 0x7F as 480, the same bits mean twice as much. An e8m0 scale of 2**-127 stays.
        """
        if scale.dtype == torch.float8_e8m0fnu:
            halved = (scale.view(torch.uint8).clamp(min=1) - 1).view(scale.dtype)
        else:
            halved = scale / 2
        return cls(codes.view(torch.float8_e4m3fn), halved)

    @property
    def format(self) -> Format:
        if self.scale.dtype == torch.float8_e8m0fnu:
            return Format.MXFP8
        # One row in one block has the same scale either way.
        return Format.FP8_ROW if tuple(self.scale.shape) == (self.codes.shape[0], 1) else Format.FP8_BLOCK

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        table = torch.arange(256, dtype=torch.uint8, device=self.device).view(torch.float8_e4m3fn).to(wide)
        table[0x7F], table[0xFF] = 480, -480
        values = table[self.codes.view(torch.uint8).int()]
        return (values * spread(self.scale.to(wide), self.group, self.shape)).to(dtype)


@dataclass(frozen=True, eq=False)
class Fp4Matrix(Matrix):
    """An e2m1 matrix: value = code * scale * global_scale.

    Attributes:
        codes: [N, K/2] uint8, contiguous (K-major): two codes per byte, the even column's in the low half.
        scale: contiguous, one of
            float8_e4m3fn [N, ceil(K/16)], per 16 values along K (NVFP4);
            float8_e8m0fnu [N, ceil(K/32)], per 32 values along K (MXFP4).
        global_scale: fp32 [N, 1] for NVFP4, None for MXFP4. One per row, so that matrices can be concatenated.

    Raises:
        TypeError: another dtype, or a global_scale that the format does not have or lacks.
        ValueError: shapes that do not fit together, an empty or non-contiguous tensor, or two devices.
    """

    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        fields = {"codes": (torch.uint8,), "scale": (torch.float8_e4m3fn, torch.float8_e8m0fnu)}
        if self.global_scale is not None:
            fields["global_scale"] = (torch.float32,)
        if (self.global_scale is None) != (self.scale.dtype == torch.float8_e8m0fnu):
            raise TypeError(
                "Fp4Matrix.global_scale: expected fp32 [N, 1] with e4m3fn scales (NVFP4) and None with e8m0fnu scales "
                f"(MXFP4), got {'None' if self.global_scale is None else 'one'} with {self.scale.dtype}"
            )
        self._check(**fields)

    @property
    def format(self) -> Format:
        return Format.MXFP4 if self.global_scale is None else Format.NVFP4

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        positive = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=wide, device=self.device)
        table = torch.cat((positive, -positive))
        values = table[torch.stack((self.codes & 0xF, self.codes >> 4), -1).view(self.shape).int()]
        values = values * spread(self.scale.to(wide), self.group, self.shape)
        return (values if self.global_scale is None else values * self.global_scale.to(wide)).to(dtype)
