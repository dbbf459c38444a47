"""Safetensors headers: the name, dtype and shape of a tensor."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

# torch dtype -> its name in a safetensors header.
DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.uint8: "U8", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.int8: "I8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64",
    torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip
_TORCH = {name: dtype for dtype, name in DTYPES.items()}


@dataclass(frozen=True)
class Header:
    """Header of one tensor. Headers with the same dtype and shape compare equal, whatever their names.

    Attributes:
        name: full name of the tensor.
        dtype: as safetensors spells it: "BF16", "F8_E4M3", "F32", ...
        file: name of the shard.
    """

    name: str = field(compare=False)
    dtype: str
    shape: tuple[int, ...]
    file: str = field(compare=False)

    @classmethod
    def of(cls, name: str, tensor: Tensor, file: str) -> Header:
        """Header of a tensor in memory. Subclasses, sparse and meta tensors get a dtype that no encoding accepts."""
        dtype = DTYPES.get(tensor.dtype, str(tensor.dtype))
        storage = _unusual_storage(tensor)
        return cls(name, f"{storage} of {dtype}" if storage else dtype, tuple(tensor.shape), file)

    @property
    def is_plain(self) -> bool:
        """True if the dtype is one that safetensors and torch both have."""
        return self.dtype in _TORCH

    def meta(self) -> Tensor:
        """A tensor of this dtype, which must be plain, and shape on the meta device."""
        return torch.empty(self.shape, dtype=_TORCH[self.dtype], device="meta")

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


def _unusual_storage(tensor: Tensor) -> str:
    """ "DTensor", "meta", "sparse_coo", ...; "" for an ordinary strided tensor."""
    inner = tensor.detach()  # unwraps a Parameter
    if type(inner) is not Tensor:
        return type(inner).__name__
    if inner.is_meta:
        return "meta"
    return "" if inner.layout is torch.strided else str(inner.layout).removeprefix("torch.")
