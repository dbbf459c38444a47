"""Weight matrices in kernel-ready layouts."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

SCALE_BLOCK = 128
MX_GROUP = 32
NVFP4_GROUP = 16
# One program of the tiled kernel holds all rows: D or H, and those of all matrices, each rounded up to a power of two.
MAX_ROWS, MAX_ROWS_TOGETHER = 256, 384


class Kind(IntEnum):
    """How the kernels have to read a matrix; kernels/tile.py describes each."""

    BF16 = 0
    FP8 = 1
    FP8_BLOCK = 2
    MXFP8 = 3
    NVFP4 = 4
    MXFP4 = 5
    FP8_FNUZ = 6
    FP8_BLOCK_FNUZ = 7
    MXFP8_FNUZ = 8
    # FP8_BLOCK, and an x that is rounded to e4m3 on the way; see `project`'s activation.
    W8A8 = 9
    W8A8_UE8M0 = 10
    W8A8_FNUZ = 11
    W8A8_UE8M0_FNUZ = 12


Operands = tuple[Tensor, Tensor | None, Tensor | None]
Spec = tuple[torch.dtype, tuple[int, ...]]

# The value of each e2m1 code.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


class Matrix(ABC):
    """One weight matrix [N, K]. Which tensors it consists of is for each kind to say."""

    @property
    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything it consists of, in the order of its constructor."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(N, K)."""

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """How the kernels have to read it."""

    @property
    @abstractmethod
    def operands(self) -> Operands:
        """What the kernels take: values or codes, scales of groups or blocks, scales of rows; codes as uint8."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in dtype; exact in fp64."""

    @abstractmethod
    def rows(self, start: int, stop: int) -> Matrix:
        """Rows from start to stop, in the same memory.

        Raises:
            ValueError: start lies inside a block of rows that share their scales.
        """

    @property
    def device(self) -> torch.device:
        return self.tensors[0].device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Matrix:
        """The same matrix with fn applied to its tensors."""
        return type(self)(*map(fn, self.tensors))

    def matches(self, other: Matrix) -> bool:
        """True if the two differ in nothing but values."""
        return type(self) is type(other) and [(t.shape, t.dtype, t.device) for t in self.tensors] == [
            (t.shape, t.dtype, t.device) for t in other.tensors
        ]


@dataclass(frozen=True, eq=False)
class DenseMatrix(Matrix):
    """A bf16 matrix.

    Attributes:
        weight: [N, K] bf16, contiguous (K-major).

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions, an empty or a non-contiguous tensor.
    """

    weight: Tensor

    def __post_init__(self) -> None:
        _check("DenseMatrix.weight", self.weight, torch.bfloat16)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.weight,)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.weight.shape
        return n, k

    @property
    def kind(self) -> Kind:
        return Kind.BF16

    @property
    def operands(self) -> Operands:
        return self.weight, None, None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in dtype; exact in fp32 and fp64."""
        return self.weight.to(dtype)

    def rows(self, start: int, stop: int) -> DenseMatrix:
        return DenseMatrix(self.weight[start:stop])


@dataclass(frozen=True, eq=False)
class Fp8Matrix(Matrix):
    """An e4m3 matrix: value = code * scale.

    Attributes:
        codes: [N, K] float8_e4m3fn or float8_e4m3fnuz, contiguous (K-major). NaN codes are the caller's to exclude, as
            loading does: looking for them here would wait for the GPU, and the kernels decode them to numbers.
        scale: contiguous, and one of
            fp32 [ceil(N/128), ceil(K/128)], for blocks of 128x128 (DeepSeek-V3's `weight_scale_inv`);
            fp32 [N, 1], for rows;
            float8_e8m0fnu [N, ceil(K/32)], for 32 values along K (MXFP8).

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not fit each other, an empty or a non-contiguous tensor, tensors on two devices.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        _check("Fp8Matrix.codes", self.codes, torch.float8_e4m3fn, torch.float8_e4m3fnuz)
        _check("Fp8Matrix.scale", self.scale, torch.float32, torch.float8_e8m0fnu)
        n, _ = self.shape
        grid = scale_shape(self.shape, *self.group)
        if tuple(self.scale.shape) != grid:
            rows = f" or {[n, 1]}" if self.scale.dtype == torch.float32 else ""
            expected, found = f"{list(grid)}{rows} for codes {list(self.shape)}", list(self.scale.shape)
            raise ValueError(f"Fp8Matrix.scale: expected {expected}, got {found}")
        _check_devices("Fp8Matrix", self.codes, self.scale)

    @property
    def group(self) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        if self.scale.dtype == torch.float8_e8m0fnu:
            return 1, MX_GROUP
        n, k = self.shape
        # A matrix of one row and one block has the same scale either way.
        return (1, k) if tuple(self.scale.shape) == (n, 1) else (SCALE_BLOCK, SCALE_BLOCK)

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, k

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale

    @property
    def kind(self) -> Kind:
        is_fnuz = self.codes.dtype == torch.float8_e4m3fnuz
        if self.scale.dtype == torch.float8_e8m0fnu:
            return Kind.MXFP8_FNUZ if is_fnuz else Kind.MXFP8
        if self.group[0] == 1:
            return Kind.FP8_FNUZ if is_fnuz else Kind.FP8
        return Kind.FP8_BLOCK_FNUZ if is_fnuz else Kind.FP8_BLOCK

    @property
    def operands(self) -> Operands:
        codes = self.codes.view(torch.uint8)
        if self.scale.dtype == torch.float8_e8m0fnu:
            return codes, self.scale.view(torch.uint8), None
        return (codes, None, self.scale) if self.group[0] == 1 else (codes, self.scale, None)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in dtype. fp64 is exact; fp32 rounds each product code * scale once; narrower ones twice."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (self.codes.to(wide) * spread(self.scale.to(wide), self.group, self.shape)).to(dtype)

    def rows(self, start: int, stop: int) -> Fp8Matrix:
        height = self.group[0]
        if start % height:
            raise ValueError(f"Fp8Matrix.rows: row {start} does not begin a block of {height} rows with one scale")
        return Fp8Matrix(self.codes[start:stop], self.scale[start // height : -(-stop // height)])

    def to_fnuz(self) -> Fp8Matrix:
        """The same values in e4m3fnuz, gfx942's own FP8; exact, but for minus zero, which becomes zero.

        The bits of a code mean half as much there, so the scale doubles: e4m3fn's 448 is 2 * 224.
        """
        if self.codes.dtype == torch.float8_e4m3fnuz:
            return self
        bits = self.codes.view(torch.uint8)
        codes = bits.masked_fill(bits == 0x80, 0).view(torch.float8_e4m3fnuz)  # 0x80 is NaN there
        if self.scale.dtype == torch.float32:
            return Fp8Matrix(codes, self.scale * 2)
        return Fp8Matrix(codes, (self.scale.view(torch.uint8) + 1).view(torch.float8_e8m0fnu))


@dataclass(frozen=True, eq=False)
class Fp4Matrix(Matrix):
    """An e2m1 matrix: value = code * scale * global_scale.

    Attributes:
        codes: [N, K/2] uint8, contiguous (K-major): two codes to a byte, that of the even column in the low half.
        scale: contiguous, and one of
            float8_e4m3fn [N, ceil(K/16)], for 16 values along K (NVFP4);
            float8_e8m0fnu [N, ceil(K/32)], for 32 values along K (MXFP4).
        global_scale: [N, 1] fp32 with an e4m3fn scale, one per row so that matrices can be put together; None with an
            e8m0fnu one.

    Raises:
        TypeError: another dtype, or a global_scale where there should be none, or none where there should be one.
        ValueError: shapes that do not fit each other, an empty or a non-contiguous tensor, tensors on two devices.
    """

    codes: Tensor
    scale: Tensor
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        _check("Fp4Matrix.codes", self.codes, torch.uint8)
        _check("Fp4Matrix.scale", self.scale, torch.float8_e4m3fn, torch.float8_e8m0fnu)
        grid = scale_shape(self.shape, *self.group)
        if tuple(self.scale.shape) != grid:
            raise ValueError(
                f"Fp4Matrix.scale: expected {list(grid)} for codes {list(self.codes.shape)}, "
                f"got {list(self.scale.shape)}"
            )
        if (self.global_scale is None) != (self.scale.dtype == torch.float8_e8m0fnu):
            raise TypeError("Fp4Matrix.global_scale: expected one with an e4m3fn scale, and none with an e8m0fnu one")
        if self.global_scale is not None:
            _check("Fp4Matrix.global_scale", self.global_scale, torch.float32)
            expected, found = [self.shape[0], 1], list(self.global_scale.shape)
            if found != expected:
                raise ValueError(f"Fp4Matrix.global_scale: expected {expected}, got {found}")
        _check_devices("Fp4Matrix", *self.tensors)

    @property
    def group(self) -> tuple[int, int]:
        """(rows, columns) that share a scale."""
        return 1, MX_GROUP if self.scale.dtype == torch.float8_e8m0fnu else NVFP4_GROUP

    @property
    def shape(self) -> tuple[int, int]:
        n, k = self.codes.shape
        return n, 2 * k

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.codes, self.scale) if self.global_scale is None else (self.codes, self.scale, self.global_scale)

    @property
    def kind(self) -> Kind:
        return Kind.MXFP4 if self.global_scale is None else Kind.NVFP4

    @property
    def operands(self) -> Operands:
        return self.codes, self.scale.view(torch.uint8), self.global_scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in dtype. fp64 is exact; fp32 rounds once, and only for the global scale; narrower ones once more."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        halves = torch.stack((self.codes & 0xF, self.codes >> 4), -1).view(self.shape)
        codes = torch.tensor(E2M1, dtype=wide, device=self.device)[halves.int()]
        values = codes * spread(self.scale.to(wide), self.group, self.shape)
        return (values if self.global_scale is None else values * self.global_scale.to(wide)).to(dtype)

    def rows(self, start: int, stop: int) -> Fp4Matrix:
        return Fp4Matrix(*(tensor[start:stop] for tensor in self.tensors))


@dataclass(frozen=True, eq=False)
class ProjectionWeights:
    """The two matrices of one indexer projection, in any pair of encodings.

    Attributes:
        wk: [D, K], the index key projection.
        gate: [H, K], `weights_proj`.

    Raises:
        ValueError: different K, or two devices.
    """

    wk: Matrix
    gate: Matrix

    def __post_init__(self) -> None:
        if self.wk.shape[1] != self.gate.shape[1]:
            raise ValueError(
                f"ProjectionWeights: wk {list(self.wk.shape)} and gate {list(self.gate.shape)} differ in K"
            )
        if self.wk.device != self.gate.device:
            raise ValueError(f"ProjectionWeights: wk is on {self.wk.device}, gate is on {self.gate.device}")

    @classmethod
    def pack(cls, wk: Matrix, gate: Matrix) -> ProjectionWeights:
        """Pairs two matrices; two dense ones are copied into one [D + H, K] buffer, unless they share one."""
        pair = cls(wk, gate)
        if isinstance(wk, DenseMatrix) and isinstance(gate, DenseMatrix) and pair.fused_weight is None:
            return cls._split(torch.cat((wk.weight, gate.weight)), wk.shape[0])
        return pair

    @classmethod
    def _split(cls, fused: Tensor, d: int) -> ProjectionWeights:
        return cls(DenseMatrix(fused[:d]), DenseMatrix(fused[d:]))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, K)."""
        return self.wk.shape[0], self.gate.shape[0], self.wk.shape[1]

    @property
    def kinds(self) -> tuple[int, int]:
        """How the kernels have to read wk and gate."""
        return int(self.wk.kind), int(self.gate.kind)

    @property
    def device(self) -> torch.device:
        return self.wk.device

    @property
    def nbytes(self) -> int:
        return self.wk.nbytes + self.gate.nbytes

    @property
    def fused_weight(self) -> Tensor | None:
        """[D + H, K] bf16, the buffer that packed dense matrices share; None for any other pair."""
        if not (isinstance(self.wk, DenseMatrix) and isinstance(self.gate, DenseMatrix)):
            return None
        return joined((self.wk.weight, self.gate.weight), 0)

    def map(self, fn: Callable[[Tensor], Tensor]) -> ProjectionWeights:
        """The same weights with fn applied to every tensor, a shared buffer once."""
        fused = self.fused_weight
        if fused is not None:
            return self._split(fn(fused), self.shape[0])
        return dataclasses.replace(self, wk=self.wk.map(fn), gate=self.gate.map(fn))

    def to_bf16(self) -> ProjectionWeights:
        """Both matrices decoded and rounded to bf16, in one buffer; the same memory if they are that already."""
        return self.pack(*(DenseMatrix(matrix.dequantize(torch.bfloat16)) for matrix in (self.wk, self.gate)))

    def matches(self, other: ProjectionWeights) -> bool:
        """True if the two differ in nothing but values."""
        return self.wk.matches(other.wk) and self.gate.matches(other.gate)

    def copy_(self, other: ProjectionWeights) -> None:
        """Takes the values of weights that match, into the memory at hand: whoever holds a pointer sees them.

        Raises:
            ValueError: the two do not match.
        """
        if not self.matches(other):
            raise ValueError("ProjectionWeights.copy_: the weights differ in encoding, shape or device")
        for matrix, source in ((self.wk, other.wk), (self.gate, other.gate)):
            for tensor, values in zip(matrix.tensors, source.tensors, strict=True):
                with torch.inference_mode():  # in which memory of either kind can be written
                    tensor.copy_(values)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor whose consecutive slices along dim the parts are; None if there is none."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        is_next = part.storage_offset() == place and part.stride() == first.stride() and part.dtype == first.dtype
        if not is_next or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        place += part.shape[dim] * part.stride(dim)
    size = list(first.shape)
    size[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(size, first.stride())


def operand_specs(kind: int, n: int, k: int) -> tuple[Spec | None, ...]:
    """(dtype, shape) of each of the operands of a matrix [N, K] of that kind; None where there is none."""
    row = (torch.float32, (n, 1))
    if kind == Kind.BF16:
        return (torch.bfloat16, (n, k)), None, None
    if kind in (Kind.NVFP4, Kind.MXFP4):
        group, last = (NVFP4_GROUP, row) if kind == Kind.NVFP4 else (MX_GROUP, None)
        return (torch.uint8, (n, k // 2)), (torch.uint8, scale_shape((n, k), 1, group)), last
    codes = (torch.uint8, (n, k))
    if kind in (Kind.FP8, Kind.FP8_FNUZ):
        return codes, None, row
    if kind in (Kind.FP8_BLOCK, Kind.FP8_BLOCK_FNUZ) or kind >= Kind.W8A8:
        return codes, (torch.float32, scale_shape((n, k))), None
    return codes, (torch.uint8, scale_shape((n, k), 1, MX_GROUP)), None


def scale_shape(shape: tuple[int, ...], rows: int = SCALE_BLOCK, columns: int = SCALE_BLOCK) -> tuple[int, int]:
    """The grid of blocks over a matrix [N, K], counting ragged ones: (ceil(N/rows), ceil(K/columns))."""
    return -(-shape[0] // rows), -(-shape[1] // columns)


def spread(scale: Tensor, group: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """[N, K] with every scale at each of the places that share it."""
    return scale.repeat_interleave(group[0], 0)[: shape[0]].repeat_interleave(group[1], 1)[:, : shape[1]]


def _check(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise ValueError(f"{name}: expected a non-empty 2-D tensor, got shape {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got strides {tensor.stride()} for shape {list(tensor.shape)}; "
            "call .contiguous()"
        )


def _check_devices(name: str, *tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors}) > 1:
        raise ValueError(f"{name}: its tensors are on {' and '.join(str(tensor.device) for tensor in tensors)}")
