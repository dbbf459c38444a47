"""Names of indexer tensors in a checkpoint."""

import re
from dataclasses import dataclass

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
    matrix, role = match["matrix"], ROLES.get(leaf, f".{leaf}")
    if _ACTIVATION.fullmatch(leaf):
        matrix, role = None, UNUSED
    return IndexerTensor(name, match["stem"], int(match["number"]), match["mtp"] is not None, matrix, role)
