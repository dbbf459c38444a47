"""Safetensors headers: the names of indexer tensors, and the name, dtype and shape of a tensor."""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

WK, GATE, FUSED = "wk", "weights_proj", "wk_weights_proj"

# Last part of the name -> role of the tensor. The spelling does not determine the encoding: Quark calls
# `weight_scale` what DeepSeek calls `weight_scale_inv`.
ROLES = {
    "weight": "weight",
    "weight_packed": "weight",  # compressed-tensors
    "weight_scale_inv": "scale",  # DeepSeek; a factor, despite its name
    "weight_scale": "scale",  # compressed-tensors, ModelOpt, Quark
    "scale": "scale",  # DeepSeek's own inference code
    "weight_scale_2": "scale_2",  # ModelOpt
    "weight_global_scale": "global_scale",  # compressed-tensors; a divisor
    "weight_shape": "shape",  # compressed-tensors
    "weight_zero_point": "zero_point",  # compressed-tensors
    "weight_g_idx": "g_idx",  # compressed-tensors
    "_weight_qdata": "weight",  # torchao
    "_weight_scale": "row_scale",  # torchao; its MX scales may be in a GEMM library's order, so this is another role
}
SPELLINGS = {role: spelling for spelling, role in reversed(ROLES.items())}  # the first spelling of each role
UNUSED = "unused"  # role of scales of activations: accepted beside any weight and not read
_ACTIVATION = re.compile(r"(input|output|act|activation)_(global_)?(scale|zero_point|amax)(_inv|_\d+)?", re.ASCII)

_NAME = re.compile(
    r"(?P<stem>(?:[\w-]+\.)*(?:(?P<mtp>mtp_layers|mtp)|layers)\.(?P<number>\d{1,6})\.(?:self_)?attn\.indexer\.)"
    rf"(?:(?P<matrix>{WK}|{GATE}|{FUSED})(?:\.(?P<leaf>.*))?|.+)",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True)
class IndexerTensor:
    """A name `<prefix>layers.<number>.self_attn.indexer.<matrix>.<leaf>`, or another name under `.indexer.`.

    DeepSeek's own inference code writes `layers.<number>.attn.indexer.` and `mtp.<number>.attn.indexer.`.
    """

    name: str
    stem: str  # everything up to and including "indexer."
    number: int
    is_mtp: bool  # True for `mtp_layers` and `mtp`, which are numbered from 0, after the hidden layers
    matrix: str | None  # WK, GATE or FUSED; None for UNUSED tensors and those outside the projection (wq_b, k_norm)
    role: str  # a value of ROLES, or UNUSED; for an unknown leaf, a dot and the leaf

    def layer(self, num_hidden_layers: int | None) -> int | None:
        """Layer index in the model; None for `mtp_layers` and `mtp` if num_hidden_layers is unknown."""
        if not self.is_mtp:
            return self.number
        return None if num_hidden_layers is None else num_hidden_layers + self.number


def parse(name: str) -> IndexerTensor | None:
    """Splits the name of an indexer tensor; returns None for any other tensor."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    leaf = match["leaf"] or ""
    role = UNUSED if _ACTIVATION.fullmatch(leaf) else ROLES.get(leaf, f".{leaf}")
    matrix = None if role == UNUSED else match["matrix"]
    return IndexerTensor(name, match["stem"], int(match["number"]), match["mtp"] is not None, matrix, role)


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
    def of(cls, name: str, tensor: Tensor, file: str) -> "Header":
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
