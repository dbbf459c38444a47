"""The two weight matrices of one projection."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import Format
from .matrix import Matrix


@dataclass(frozen=True, eq=False)
class ProjectionWeights:
    """The two matrices of one indexer projection, in any pair of formats. Raises ValueError for different K or devices.

    Attributes:
        wk: [D, K], projects to index keys.
        gate: [H, K], `weights_proj`, projects to head weights.
    """

    wk: Matrix
    gate: Matrix

    def __post_init__(self) -> None:
        if self.wk.shape[1] != self.gate.shape[1]:
            shapes = f"wk {list(self.wk.shape)} and gate {list(self.gate.shape)}"
            raise ValueError(f"ProjectionWeights: {shapes} differ in K")
        if self.wk.device != self.gate.device:
            raise ValueError(f"ProjectionWeights: wk is on {self.wk.device}, gate is on {self.gate.device}")

    @classmethod
    def pack(cls, wk: Matrix, gate: Matrix) -> "ProjectionWeights":
        """Pairs two matrices. Copies two dense ones into one [D + H, K] buffer unless they share one already."""
        pair = cls(wk, gate)
        if pair.formats == (Format.BF16, Format.BF16) and pair.fused_weight is None:
            return cls.split(torch.cat((wk.values, gate.values)), wk.shape[0])
        return pair

    @classmethod
    def split(cls, fused: Tensor, d: int) -> "ProjectionWeights":
        """Two dense matrices as views of one buffer [D + H, K] bf16."""
        return cls(Matrix(Format.BF16, fused[:d]), Matrix(Format.BF16, fused[d:]))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, K)."""
        return self.wk.shape[0], self.gate.shape[0], self.wk.shape[1]

    @property
    def formats(self) -> tuple[Format, Format]:
        """Of wk and gate."""
        return self.wk.format, self.gate.format

    @property
    def device(self) -> torch.device:
        return self.wk.device

    @property
    def nbytes(self) -> int:
        return self.wk.nbytes + self.gate.nbytes

    @property
    def fused_weight(self) -> Tensor | None:
        """[D + H, K] bf16, the buffer that two packed dense matrices share; None for any other pair."""
        is_dense = self.formats == (Format.BF16, Format.BF16)
        return joined((self.wk.values, self.gate.values), 0) if is_dense else None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "ProjectionWeights":
        """The same weights with fn applied to every tensor, once to a shared buffer."""
        if (fused := self.fused_weight) is not None:
            return self.split(fn(fused), self.shape[0])
        return ProjectionWeights(self.wk.map(fn), self.gate.map(fn))

    def to_bf16(self) -> "ProjectionWeights":
        """Both matrices decoded and rounded to bf16, in one buffer. Returns dense weights unchanged, without a copy."""
        return self.pack(*(Matrix(Format.BF16, each.dequantize(torch.bfloat16)) for each in (self.wk, self.gate)))

    def matches(self, other: "ProjectionWeights") -> bool:
        """True if the two have the same formats, shapes and device."""
        return self.wk.matches(other.wk) and self.gate.matches(other.gate)

    def copy_(self, other: "ProjectionWeights") -> None:
        """Copies values in place, so that pointers to these weights (CUDA graphs) stay valid.

        Raises ValueError if the two do not match.
        """
        if not self.matches(other):
            expected, got = (f"{each.formats} {each.shape} on {each.device}" for each in (self, other))
            raise ValueError(f"ProjectionWeights.copy_: expected {expected}, got {got}")
        sources = (*other.wk.tensors, *other.gate.tensors)
        with torch.inference_mode():  # may write both inference tensors and others
            for tensor, values in zip((*self.wk.tensors, *self.gate.tensors), sources, strict=True):
                tensor.copy_(values)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor | None:
    """The tensor that the parts are consecutive slices of, along dim; None if there is none."""
    first, place = parts[0], parts[0].storage_offset()
    for part in parts:
        is_next = part.storage_offset() == place and part.stride() == first.stride()
        if not is_next or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        place += part.shape[dim] * part.stride(dim)
    size = list(first.shape)
    size[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(size, first.stride())
