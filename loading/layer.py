"""The two matrices of one layer: what their headers make of them, and what their tensors become."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from torch import Tensor

from ..kernels.formats import MAX_ROWS
from ..kernels.matrix import Matrix
from ..kernels.weights import ProjectionWeights
from .encodings import Encoding, recognise
from .headers import Header
from .names import FUSED, GATE, UNUSED, WK
from .problems import Problem
from .values import unusable

T = TypeVar("T")

BAD_VALUES = "the file is damaged or its export went wrong"


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix [N, K] on disk.

    Attributes:
        name: of its tensors up to the role; ends in "wk_weights_proj" where the checkpoint keeps both in one.
        encoding: None where the tensors make none; the problems say why.
        headers: role -> header of every tensor of it.
        layout: what it becomes, on the meta device; None without an encoding.
    """

    name: str
    encoding: Encoding | None
    headers: Mapping[str, Header]
    layout: Matrix | None = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K); empty without an encoding."""
        return self.layout.shape if self.layout else ()

    @property
    def kept_bytes(self) -> int:
        """Bytes in memory once loaded; 0 without an encoding."""
        return self.layout.nbytes if self.layout else 0

    @property
    def upcast_bytes(self) -> int:
        """Bytes in memory if it were upcast to bf16; 0 without an encoding."""
        return 2 * math.prod(self.shape) if self.layout else 0


@dataclass(frozen=True)
class Pair:
    """wk and weights_proj of one layer, and why they do not load; no problems where they do."""

    wk: MatrixPlan
    gate: MatrixPlan
    problems: tuple[Problem, ...]

    @property
    def is_open(self) -> bool:
        """True if an optional tensor may still come."""
        return any(plan.encoding is not None and plan.encoding.is_open for plan in (self.wk, self.gate))

    def bind(self, tensors: Mapping[str, Tensor]) -> tuple[ProjectionWeights | None, list[Problem]]:
        """The weights, from name -> contiguous tensor, or what is wrong with their values.

        Only for a pair without problems.
        """
        if self.wk.name == self.gate.name:
            fused, problems = _bind(self.wk, tensors)
            if fused is None:
                return None, problems
            d = self.wk.shape[0]
            return ProjectionWeights.pack(fused.rows(0, d), fused.rows(d, fused.shape[0])), problems
        wk, problems = _bind(self.wk, tensors)
        gate, more = _bind(self.gate, tensors)
        if wk is None or gate is None:
            return None, problems + more
        return ProjectionWeights.pack(wk, gate), problems


def plan_pair(stem: str, headers: Mapping[str, Mapping[str, Header]], index_head_dim: int) -> Pair:
    """What a layer's tensors make.

    Args:
        stem: their name up to the matrix.
        headers: matrix -> role -> header.
        index_head_dim: D, to tell the two matrices apart where they are stored as one.
    """
    if FUSED not in headers:
        wk, problems = _plan(f"{stem}{WK}", headers.get(WK, {}))
        gate, more = _plan(f"{stem}{GATE}", headers.get(GATE, {}))
        problems += more
    else:
        both, problems = _plan(f"{stem}{FUSED}", headers[FUSED])
        wk, gate, more = _split(both, index_head_dim)
        problems += more
        apart = [header for matrix in (WK, GATE) for header in headers.get(matrix, {}).values()]
        if apart:
            expected = f"either {FUSED} or {WK} and {GATE} in a layer"
            problems.append(Problem(f"{stem}{FUSED}", apart[0].file, expected, f"{apart[0].name} beside it"))
    for plan in (wk, gate):
        if plan.shape and plan.shape[0] > MAX_ROWS:
            problems.append(_wrong_shape(plan, f"at most {MAX_ROWS} rows"))
    if wk.shape and gate.shape and wk.shape[1] != gate.shape[1]:
        problems.append(_wrong_shape(gate, f"wk's K = {wk.shape[1]}"))
    return Pair(wk, gate, tuple(problems))


def is_whole(headers: Mapping[str, Mapping[str, Header]]) -> bool:
    """True if the tensors of a layer make its matrices, so that a plan is worth the time: asked for every tensor."""
    matrices = [FUSED] if FUSED in headers else [WK, GATE]
    return all(matrix in headers and _recognised(*_types(headers[matrix])) for matrix in matrices)


def _plan(name: str, headers: Mapping[str, Header]) -> tuple[MatrixPlan, list[Problem]]:
    if recognised := _recognised(*_types(headers)):
        encoding, layout = recognised
        return MatrixPlan(name, encoding, headers, layout), []
    return MatrixPlan(name, None, headers, None), recognise(name, headers)[1]


def _types(headers: Mapping[str, Header]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    return ((role, header.dtype, header.shape) for role, header in headers.items())


@functools.lru_cache(maxsize=256)
def _recognised(*types: tuple[str, str, tuple[int, ...]]) -> tuple[Encoding, Matrix] | None:
    """The encoding of tensors of that role, dtype and shape, and what they become, on the meta device; None if none.

    Names have no part in it, so the layers of a model, which are alike, are looked at once.
    """
    headers = {role: Header("", dtype, shape, "") for role, dtype, shape in types}
    encoding, _ = recognise("", headers)
    if encoding is None:
        return None
    used = {role: header.meta() for role, header in headers.items() if role != UNUSED}  # which may be of any dtype
    return encoding, encoding.bind(used)


def _split(both: MatrixPlan, d: int) -> tuple[MatrixPlan, MatrixPlan, list[Problem]]:
    if both.layout is None:
        return both, both, []
    n = both.layout.shape[0]
    block, _ = both.layout.group
    if not 0 < d < n or d % block:
        expected = f"{d} rows of wk (index_head_dim), in whole blocks of scales, and then those of weights_proj"
        uncut = replace(both, layout=None)
        return uncut, uncut, [_wrong_shape(both, expected)]
    return replace(both, layout=both.layout.rows(0, d)), replace(both, layout=both.layout.rows(d, n)), []


def _wrong_shape(plan: MatrixPlan, expected: str) -> Problem:
    weight = plan.headers["weight"]
    return Problem(weight.name, weight.file, expected, str(weight))


def _bind(plan: MatrixPlan, tensors: Mapping[str, Tensor]) -> tuple[Matrix | None, list[Problem]]:
    assert plan.encoding is not None
    roles = {role: tensors[header.name] for role, header in plan.headers.items() if role != UNUSED}
    faults, matrix = plan.encoding.faults(roles), None
    if not faults:
        matrix = plan.encoding.bind(roles)
        faults = unusable(matrix)
    problems = []
    for role, (expected, found) in faults.items():
        header = plan.headers[role if role in plan.headers else "scale_2"]  # ModelOpt's global scale
        problems.append(Problem(header.name, header.file, expected, found, BAD_VALUES))
    return (None if faults else matrix), problems


def unlike_most(layers: Mapping[int, T]) -> dict[int, T]:
    """Layer -> what most layers have, a shape for instance, for every layer that has another: a model has one."""
    if not layers:
        return {}
    usual = Counter(layers.values()).most_common(1)[0][0]
    return {layer: usual for layer, value in layers.items() if value != usual}
