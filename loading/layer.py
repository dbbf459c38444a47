"""Layers: collects their headers, from files or a stream, plans their two matrices and binds them."""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..kernels.matrix import Matrix
from ..kernels.weights import ProjectionWeights
from .config import CONFIG, Config
from .encodings import Encoding, Tensors
from .headers import DTYPES, FUSED, GATE, WK, Header, IndexerTensor, parse
from .problems import Problem
from .recognition import explain, recognize
from .values import judge, nan_codes

BAD_VALUES = "the file is damaged or its export went wrong"


def real_device(device: str | torch.device) -> torch.device:
    """Raises ValueError for the meta device."""
    device = torch.device(device)
    if device.type == "meta":
        raise ValueError("expected a device that holds values, got meta; Plan has shapes and bytes without loading")
    return device


def own(tensor: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy on the device."""
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix [N, K] on disk."""

    name: str  # of its tensors without the role; ends in "wk_weights_proj" if both matrices are stored as one
    encoding: Encoding | None  # None if no encoding fits; the layer's problems say why
    headers: Mapping[str, Header]  # by role
    layout: Matrix | None = field(repr=False)  # the matrix it becomes, on the meta device; None without an encoding

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K); empty without an encoding."""
        return self.layout.shape if self.layout else ()

    def bind(self, tensors: Tensors, problems: list[Problem], warnings: list[Problem]) -> Matrix | None:
        """The matrix from name -> contiguous tensor; None, and problems, for bad values."""
        assert self.encoding is not None
        roles, matrix = self._roles(tensors), None
        faults, oddities = self.encoding.check(roles)
        if not faults:
            matrix = self.encoding.bind(roles)
            faults, others = judge(matrix)
            faults |= nan_codes(roles["weight"])
            oddities += others
        for role, (expected, found) in faults.items():
            header = self.headers[next(r for r in (role, "scale_2", "row_scale") if r in self.headers)]
            problems.append(Problem(header.name, header.file, expected, found, BAD_VALUES))
        if matrix is None or faults:
            return None
        if oddities:
            expected, found = "no rows or blocks of zeros and no negative scales", ", ".join(oddities)
            warnings.append(self.wrong(expected, found, "loaded nevertheless"))
        if self.encoding.exact and not torch.equal(self.encoding.exact(roles), matrix.dequantize(torch.float64)):
            warnings.append(self.wrong("values that BF16 holds", f"{self.headers['weight']}", "rounded to BF16"))
        return matrix

    def exact(self, tensors: Tensors) -> Tensor:
        """The values [N, K] on disk in fp64, from name -> contiguous tensor."""
        assert self.encoding is not None
        roles = self._roles(tensors)
        exact = self.encoding.exact
        return exact(roles) if exact else self.encoding.bind(roles).dequantize(torch.float64)

    def _roles(self, tensors: Tensors) -> dict[str, Tensor]:
        return {role: tensors[header.name] for role, header in self.headers.items()}

    def wrong(self, expected: str, found: str = "", advice: str = "") -> Problem:
        """A problem with the weight; without `found`, with its header."""
        weight = self.headers["weight"]
        return Problem(weight.name, weight.file, expected, found or str(weight), advice)


@dataclass(frozen=True)
class LayerPlan:
    """The projection of one layer."""

    layer: int  # layer index; `mtp_layers` are numbered after the hidden layers
    is_mtp: bool  # a multi-token-prediction layer (layer >= num_hidden_layers)
    wk: MatrixPlan
    gate: MatrixPlan
    problems: tuple[Problem, ...] = field(repr=False)  # why the layer does not load; empty if it does

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors to read."""
        return tuple(dict.fromkeys(header.name for plan in (self.wk, self.gate) for header in plan.headers.values()))

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, K) of a layer without problems."""
        (d, k), (h, _) = self.wk.shape, self.gate.shape
        return d, h, k

    def bind(self, tensors: Tensors, problems: list[Problem], warnings: list[Problem]) -> ProjectionWeights | None:
        """The weights of a sound layer from name -> contiguous tensor; None, and problems, for bad values."""
        wk = self.wk.bind(tensors, problems, warnings)
        gate = wk if self.gate.name == self.wk.name else self.gate.bind(tensors, problems, warnings)
        if wk is None or gate is None:
            return None
        if wk is gate:
            d = self.wk.shape[0]
            wk, gate = wk.rows(0, d), wk.rows(d, wk.shape[0])
        return ProjectionWeights.pack(wk, gate)

    def exact(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """The values of wk and weights_proj on disk in fp64, from name -> contiguous tensor."""
        wk = self.wk.exact(tensors)
        if self.gate.name == self.wk.name:
            return wk[: self.wk.shape[0]], wk[self.wk.shape[0] :]
        return wk, self.gate.exact(tensors)


class Collector:
    """Collects the tensors of one layer, or only their headers, and plans its weights."""

    def __init__(self, number: int, first: IndexerTensor, config: Config) -> None:
        self.problems: list[Problem] = []  # of tensors that do not belong here
        self.tensors: dict[str, Tensor] = {}  # by name
        self._number, self._first, self._config = number, first, config
        self._headers: defaultdict[str, dict[str, Header]] = defaultdict(dict)  # matrix -> role -> header
        self._absent: set[tuple[str | None, str]] = set()

    def offer(self, part: IndexerTensor, tensor: Tensor, file: str, device: torch.device) -> None:
        """Takes a copy of a tensor."""
        header = Header.of(part.name, tensor, file)
        if header.dtype in DTYPES.values():
            self.tensors[part.name] = own(tensor, device)
        self.add(part, header)  # last: if memory ran out before, the same offer can be made again

    def add(self, part: IndexerTensor, header: Header | None) -> None:
        """Takes a header. Without one: a tensor outside the projection, or absent, which the caller reports."""
        if part.matrix is None:
            return
        if header is None:
            self._headers.setdefault(part.matrix, {})  # a fused matrix counts even if all of it is absent
            self._absent.add((part.matrix, part.role))
            return
        if part.stem != self._first.stem:
            expected = f"all tensors of layer {self._number} under {self._first.stem}"
        elif (first := self._headers[part.matrix].setdefault(part.role, header)) is not header:
            expected = f"one tensor in the role of {first.name}"
        else:
            return
        self.problems.append(Problem(header.name, header.file, expected, str(header)))

    @property
    def is_complete(self) -> bool:
        """True if both matrices are recognized and no tensor can follow. Cheap: asked once per tensor."""
        names = [FUSED] if FUSED in self._headers else [WK, GATE]
        found = [recognize(*self._headers.get(name, {}).items()) for name in names]
        return all(each and not each[0].optional for each in found)

    def plan(self) -> LayerPlan:
        """The plan of the layer, from the headers so far."""
        problems: list[Problem] = []
        matrices, first, number = self._headers, self._first, self._number
        if FUSED in matrices:
            wk, gate = self._split(_plan_matrix(first.stem + FUSED, matrices[FUSED], problems), problems)
            if apart := [header for name in (WK, GATE) for header in matrices.get(name, {}).values()]:
                expected = f"either {FUSED} or {WK} and {GATE} in a layer"
                problems.append(Problem(wk.name, apart[0].file, expected, f"{apart[0].name} as well"))
        else:
            wk, gate = (_plan_matrix(first.stem + name, matrices.get(name, {}), problems) for name in (WK, GATE))
        problems += self._check(wk, gate)
        parts = [(problem, parse(problem.subject)) for problem in problems]
        problems = [p for p, part in parts if not part or (part.matrix, part.role) not in self._absent]
        hidden, mtp = self._config.num_hidden_layers, self._config.num_nextn_predict_layers
        if not first.is_mtp and hidden is not None and mtp is not None and number >= hidden + mtp:
            expected = f"layers below {hidden + mtp} (num_hidden_layers + num_nextn_predict_layers)"
            problems.append(Problem(f"layer {number}", "", expected, "an indexer in it"))
        is_mtp = hidden is not None and number >= hidden
        return LayerPlan(number, is_mtp, wk, gate, (*self.problems, *problems))

    def _check(self, wk: MatrixPlan, gate: MatrixPlan) -> list[Problem]:
        """Checks recognized matrices against the model's sizes and quantization_config."""
        problems = []
        if wk.shape and gate.shape and wk.shape[1] != gate.shape[1]:
            problems.append(gate.wrong(f"wk's K = {wk.shape[1]}"))
        for plan, axis, key in (wk, 0, "index_head_dim"), (wk, 1, "hidden_size"), (gate, 0, "index_n_heads"):
            value = getattr(self._config, key)
            if plan.shape and value not in (None, plan.shape[axis]):
                found = f"{plan.headers['weight']}, a matrix {list(plan.shape)}"
                problems.append(plan.wrong(f"{value} in dimension {axis} of the matrix ({key})", found))
        for plan in (wk, gate)[: 1 if wk.name == gate.name else 2]:
            vetoes = (veto for veto in self._config.vetoes if plan.encoding and veto.concerns(plan.name, plan.headers))
            advice = "dequantize it with its own tool"
            problems += dict.fromkeys(plan.wrong(veto.expected, veto.found, advice) for veto in vetoes)
        return problems

    def _split(self, both: MatrixPlan, problems: list[Problem]) -> tuple[MatrixPlan, MatrixPlan]:
        if both.layout is None:
            return both, both
        d, n = self._config.index_head_dim, both.layout.shape[0]
        if d is None:
            expected = f"index_head_dim, in {CONFIG} or as an argument, to split {FUSED}"
        elif not 0 < d < n or d % both.layout.group[0]:
            expected = f"{d} rows of wk (index_head_dim), in whole blocks of scales, followed by those of weights_proj"
        else:
            return replace(both, layout=both.layout.rows(0, d)), replace(both, layout=both.layout.rows(d, n))
        problems.append(both.wrong(expected))
        return (replace(both, layout=None),) * 2


def _plan_matrix(name: str, headers: Mapping[str, Header], problems: list[Problem]) -> MatrixPlan:
    encoding, layout = recognize(*headers.items()) or (None, None)
    if encoding is None:
        problems += explain(name, headers)
    return MatrixPlan(name, encoding, headers, layout)


def number_of(part: IndexerTensor, config: Config, problems: list[Problem]) -> int | None:
    """Layer index of a tensor; None, and once a problem, if `mtp_layers` cannot be numbered."""
    number = part.layer(config.num_hidden_layers)
    if number is None and not problems:
        expected = "num_hidden_layers (config.json), after which mtp_layers are numbered"
        problems.append(Problem(part.name, "", expected, "none"))
    return number


def plan_layers(collectors: Mapping[int, Collector]) -> dict[int, LayerPlan]:
    """Plans of all layers, ascending. Those whose shape, or prefix, differs from most have a problem."""
    plans = {number: collectors[number].plan() for number in sorted(collectors)}
    sound = {number: plan for number, plan in plans.items() if not plan.problems}
    prefixes = {number: plan.wk.name.rpartition("layers.")[0] for number, plan in sound.items() if not plan.is_mtp}
    shapes = {number: plan.shape for number, plan in sound.items()}
    mtp = "MTP layers are numbered from num_hidden_layers or called mtp_layers"
    for values, what, advice in ((prefixes, "hidden layers under {}layers", mtp), (shapes, "(D, H, K) = {}", "")):
        usual = Counter(values.values()).most_common(1)
        for number, value in values.items():
            if value != usual[0][0]:
                problem = sound[number].wk.wrong(f"{what.format(usual[0][0])}, like most layers", f"{value}", advice)
                plans[number] = replace(plans[number], problems=(*plans[number].problems, problem))
    return plans
