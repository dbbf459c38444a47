"""The grammar of an indexer's tensor names."""

from __future__ import annotations

import re
from dataclasses import dataclass

MATRICES = ("wk", "weights_proj")

_NAME = re.compile(
    r"(?P<stem>(?:[\w-]+\.)*layers\.(?P<layer>\d{1,6})\.self_attn\.indexer\.)"
    r"(?:(?P<matrix>wk|weights_proj|wk_weights_proj)(?:\.(?P<role>.*))?|.+)",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True)
class IndexerTensor:
    """A name `<prefix>layers.<layer>.self_attn.indexer.<matrix>.<role>`, or another one under `.indexer.`.

    Attributes:
        stem: everything up to and with "indexer.".
        matrix: "wk", "weights_proj" or "wk_weights_proj"; None for a tensor outside the projection (wq_b, k_norm).
        role: what follows, unjudged: "weight", "weight_scale_inv", ...; "" where nothing does.
    """

    name: str
    stem: str
    layer: int
    matrix: str | None
    role: str


def parse(name: str) -> IndexerTensor | None:
    """The parts of an indexer tensor's name; None for every other tensor."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return IndexerTensor(name, match["stem"], int(match["layer"]), match["matrix"], match["role"] or "")


def is_projection(name: str) -> bool:
    """True for the tensors that the projection consists of."""
    tensor = parse(name)
    return tensor is not None and tensor.matrix is not None
