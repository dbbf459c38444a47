"""What a safetensors header says of a tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# torch dtype -> what a safetensors header calls it.
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """One tensor.

    Attributes:
        name: in full.
        dtype: in the format's spelling: "BF16", "F8_E4M3", "F32", ...
        file: name of the shard.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str

    @classmethod
    def of(cls, name: str, tensor: Tensor, file: str) -> Header:
        """The header that a tensor in memory would have; that of one without plain data has no dtype of the format."""
        dtype = DTYPES.get(tensor.dtype, str(tensor.dtype))
        kind = _kind(tensor)
        return cls(name, f"{kind} of {dtype}" if kind else dtype, tuple(tensor.shape), file)

    @property
    def is_plain(self) -> bool:
        """True if torch has plain tensors of that dtype."""
        return self.dtype in _TORCH

    def meta(self) -> Tensor:
        """A tensor of that dtype and shape without content.

        Raises:
            KeyError: torch has no such dtype.
        """
        return torch.empty(self.shape, dtype=_TORCH[self.dtype], device="meta")

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _kind(tensor: Tensor) -> str:
    """What a tensor is, other than its elements in memory: "DTensor", "meta", "sparse_coo"; "" for a plain one."""
    inner = tensor.detach()  # of a Parameter, its tensor
    if type(inner) is not Tensor:
        return type(inner).__name__
    if inner.is_meta:
        return "meta"
    return "" if inner.layout is torch.strided else str(inner.layout).removeprefix("torch.")
