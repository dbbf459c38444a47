"""Weight matrices in kernel-ready layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SCALE_BLOCK = 128
MAX_ROWS = 256  # of a matrix, D or H: one program of the tiled kernel holds them all


@dataclass(frozen=True, eq=False)
class DenseMatrix:
    """A bf16 matrix.

    Attributes:
        weight: [N, K] bf16, contiguous (K-major).

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions, an empty or a non-contiguous tensor.
    """

    weight: Tensor

    def __post_init__(self) -> None:
        _check("DenseMatrix.weight", self.weight, torch.bfloat16, ndim=2)

    @property
    def shape(self) -> torch.Size:
        return self.weight.shape

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    @property
    def operands(self) -> tuple[Tensor, None]:
        """What the kernels take: the values, and no scale."""
        return self.weight, None

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in dtype; exact in fp32 and fp64."""
        return self.weight.to(dtype)

    def map(self, fn: Callable[[Tensor], Tensor]) -> DenseMatrix:
        """The same matrix with fn applied to its tensor."""
        return DenseMatrix(fn(self.weight))


@dataclass(frozen=True, eq=False)
class Fp8Matrix:
    """An e4m3fn matrix with one fp32 scale per 128x128 block: value = code * scale.

    This is how DeepSeek-V3 and its descendants publish FP8 weights (`weight_scale_inv`); codes and scales are
    kept as they are in the checkpoint.

    Attributes:
        codes: [N, K] float8_e4m3fn, contiguous (K-major). NaN codes are the caller's to exclude, as loading does:
            looking for them here would wait for the GPU, and the kernels decode them to 480.
        scale: [ceil(N/128), ceil(K/128)] fp32, contiguous.

    Raises:
        TypeError: another dtype.
        ValueError: shapes that do not fit each other, an empty or a non-contiguous tensor, tensors on two devices.
    """

    codes: Tensor
    scale: Tensor

    def __post_init__(self) -> None:
        _check("Fp8Matrix.codes", self.codes, torch.float8_e4m3fn, ndim=2)
        _check("Fp8Matrix.scale", self.scale, torch.float32, ndim=2)
        expected = scale_shape(self.codes.shape)
        if tuple(self.scale.shape) != expected:
            raise ValueError(
                f"Fp8Matrix.scale: expected {list(expected)} for codes {list(self.codes.shape)}, "
                f"got {list(self.scale.shape)}"
            )
        if self.scale.device != self.codes.device:
            raise ValueError(f"Fp8Matrix: codes are on {self.codes.device}, scale is on {self.scale.device}")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    @property
    def operands(self) -> tuple[Tensor, Tensor]:
        """What the kernels take: the codes as uint8, and the scale."""
        return self.codes.view(torch.uint8), self.scale

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] in dtype. fp64 is exact; fp32 rounds each product code * scale once; narrower ones twice."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        n, k = self.shape
        scale = self.scale.to(wide).repeat_interleave(SCALE_BLOCK, 0)[:n].repeat_interleave(SCALE_BLOCK, 1)[:, :k]
        return (self.codes.to(wide) * scale).to(dtype)

    def map(self, fn: Callable[[Tensor], Tensor]) -> Fp8Matrix:
        """The same matrix with fn applied to its tensors."""
        return Fp8Matrix(fn(self.codes), fn(self.scale))


Matrix = DenseMatrix | Fp8Matrix


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
        """Pairs two matrices; two dense ones are copied into one contiguous [D + H, K] buffer."""
        if isinstance(wk, DenseMatrix) and isinstance(gate, DenseMatrix):
            cls(wk, gate)  # so that a mismatch is reported in these terms, not in torch.cat's
            return cls._split(torch.cat((wk.weight, gate.weight)), wk.shape[0])
        return cls(wk, gate)

    @classmethod
    def _split(cls, fused: Tensor, d: int) -> ProjectionWeights:
        return cls(DenseMatrix(fused[:d]), DenseMatrix(fused[d:]))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, K)."""
        return self.wk.shape[0], self.gate.shape[0], self.wk.shape[1]

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
        wk, gate = self.wk.weight, self.gate.weight
        if wk.untyped_storage().data_ptr() != gate.untyped_storage().data_ptr():
            return None
        if gate.storage_offset() != wk.storage_offset() + wk.numel():
            return None
        d, h, k = self.shape
        return wk.as_strided((d + h, k), (k, 1))

    def map(self, fn: Callable[[Tensor], Tensor]) -> ProjectionWeights:
        """The same weights with fn applied to every tensor, a shared buffer once."""
        fused = self.fused_weight
        if fused is not None:
            return self._split(fn(fused), self.shape[0])
        return dataclasses.replace(self, wk=self.wk.map(fn), gate=self.gate.map(fn))


def scale_shape(shape: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
    """The scale grid of 128x128 blocks over a matrix, counting ragged blocks: [ceil(N/128), ceil(K/128)]."""
    return tuple(-(-size // SCALE_BLOCK) for size in shape)


def _check(name: str, tensor: Tensor, dtype: torch.dtype, ndim: int) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.ndim != ndim or 0 in tensor.shape:
        raise ValueError(f"{name}: expected a non-empty {ndim}-D tensor, got shape {list(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name}: expected a contiguous tensor, got strides {tensor.stride()} for shape {list(tensor.shape)}; "
            "call .contiguous()"
        )
