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
    """Header of one tensor. Headers with the same dtype and shape compare equal, whatever their names."""

    name: str = field(compare=False)
    dtype: str  # as safetensors spells it: "BF16", "F8_E4M3", "F32", ...
    shape: tuple[int, ...]
    file: str = field(compare=False)  # name of the shard

    @classmethod
    def of(cls, name: str, tensor: Tensor, file: str) -> Header:
        """Header of a tensor in memory. Subclasses, sparse and meta tensors get a dtype that no encoding accepts.

        Raises TypeError for anything but a tensor.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        dtype, inner = DTYPES.get(tensor.dtype, str(tensor.dtype)), tensor.detach()  # unwraps a Parameter
        if type(inner) is not Tensor or inner.is_meta or inner.layout is not torch.strided:
            dtype += f" in a {type(inner).__name__} ({inner.layout}, {inner.device.type})"
        return cls(name, dtype, tuple(tensor.shape), file)

    def meta(self) -> Tensor:
        """A tensor of this dtype and shape on the meta device."""
        return torch.empty(self.shape, dtype=_TORCH[self.dtype], device="meta")

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"
