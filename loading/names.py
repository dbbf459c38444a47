"""The grammar of an indexer's tensor names."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

WK, GATE, FUSED = "wk", "weights_proj", "wk_weights_proj"

# What a tensor is to its matrix, by the last part of its name. One role may be spelled in several ways, and a spelling
# says nothing of the encoding: Quark writes `weight_scale` for what DeepSeek calls `weight_scale_inv`.
ROLES = {
    "weight": "weight",
    "weight_packed": "weight",  # compressed-tensors
    "weight_scale_inv": "scale",  # DeepSeek; a factor, its name notwithstanding
    "weight_scale": "scale",  # compressed-tensors, ModelOpt, Quark
    "scale": "scale",  # DeepSeek's own inference code
    "weight_scale_2": "scale_2",  # ModelOpt
    "weight_global_scale": "global_scale",  # compressed-tensors; a divisor
    "weight_shape": "shape",  # compressed-tensors
    "weight_zero_point": "zero_point",  # compressed-tensors
    "weight_g_idx": "g_idx",  # compressed-tensors
    "input_scale": "input_scale",  # of activations: known, and not used
    "input_global_scale": "input_scale",
}

UNUSED = "input_scale"  # the role that has no part in the values

SPELLINGS = {role: spelling for spelling, role in reversed(ROLES.items())}  # the first one of each

_NAME = re.compile(
    r"(?P<stem>(?:[\w-]+\.)*(?P<mtp>mtp_)?layers\.(?P<number>\d{1,6})\.self_attn\.indexer\.)"
    rf"(?:(?P<matrix>{WK}|{GATE}|{FUSED})(?:\.(?P<leaf>.*))?|.+)",
    re.ASCII | re.DOTALL,
)


def integer(layer: int) -> int:
    """A layer's index, also from one of numpy's integers.

    Raises:
        TypeError: it is none.
    """
    try:
        return operator.index(layer)
    except TypeError:
        raise TypeError(f"layers must be integers, got {layer!r}") from None


@dataclass(frozen=True)
class IndexerTensor:
    """A name `<prefix>layers.<number>.self_attn.indexer.<matrix>.<leaf>`, or another one under `.indexer.`.

    Attributes:
        stem: everything up to and with "indexer.".
        number: of the layer, as the name has it.
        is_mtp: True for `mtp_layers`, which HY-V4 counts from 0 behind the hidden layers.
        matrix: WK, GATE or FUSED; None for a tensor outside the projection (wq_b, k_norm).
        role: a value of ROLES; the leaf itself, behind a dot, where it is not a key of ROLES.
    """

    name: str
    stem: str
    number: int
    is_mtp: bool
    matrix: str | None
    role: str

    def layer(self, num_hidden_layers: int | None) -> int | None:
        """Index of the layer in a model of so many hidden layers; None if that has to be known and is not."""
        if not self.is_mtp:
            return self.number
        return None if num_hidden_layers is None else num_hidden_layers + self.number


def parse(name: str) -> IndexerTensor | None:
    """The parts of an indexer tensor's name; None for every other tensor."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    leaf = match["leaf"] or ""
    role = ROLES.get(leaf, f".{leaf}")
    return IndexerTensor(name, match["stem"], int(match["number"]), match["mtp"] is not None, match["matrix"], role)


def is_projection(name: str) -> bool:
    """True for the tensors that the projection consists of."""
    tensor = parse(name)
    return tensor is not None and tensor.matrix is not None
