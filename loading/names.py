"""The grammar of the projection's tensor names."""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = re.compile(
    r"(?P<prefix>(?:\w+\.)*)layers\.(?P<layer>\d+)\.self_attn\.indexer\."
    r"(?P<matrix>wk|weights_proj|wk_weights_proj)\.(?P<role>.+)"
)
_INDEXER = re.compile(r"(?:\w+\.)*layers\.\d+\.self_attn\.indexer\..+")


@dataclass(frozen=True)
class ProjectionTensor:
    """A name of the form `<prefix>layers.<layer>.self_attn.indexer.<matrix>.<role>`.

    Attributes:
        matrix: "wk", "weights_proj" or "wk_weights_proj".
        role: what follows, unjudged: "weight", "weight_scale_inv", ...
    """

    name: str
    prefix: str
    layer: int
    matrix: str
    role: str


def parse(name: str) -> ProjectionTensor | None:
    """The parts of a projection tensor's name; None for every other tensor."""
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    return ProjectionTensor(name, match["prefix"], int(match["layer"]), match["matrix"], match["role"])


def is_indexer(name: str) -> bool:
    """True for every tensor of an indexer, those outside the projection included (wq_b, k_norm)."""
    return _INDEXER.fullmatch(name) is not None
