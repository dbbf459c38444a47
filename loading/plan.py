"""Which layers own an indexer, and how each of them is stored: read from headers alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .checkpoint import Checkpoint, Header
from .encodings import Encoding, recognise
from .names import ProjectionTensor, parse
from .problems import CheckpointError, Problem

MATRICES = ("wk", "weights_proj")


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix [N, K] on disk.

    Attributes:
        stem: name of its tensors up to the role.
        encoding: None where the tensors make none; the plan's problems say why.
        headers: role -> header of every tensor of it.
    """

    stem: str
    encoding: Encoding | None
    headers: Mapping[str, Header]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K); empty where there is no weight."""
        weight = self.headers.get("weight")
        return weight.shape if weight else ()

    @property
    def kept_bytes(self) -> int:
        """Bytes in memory once loaded, of a matrix with an encoding: each is kept as it is on disk."""
        return sum(header.nbytes for header in self.headers.values())

    @property
    def upcast_bytes(self) -> int:
        """Bytes in memory if it were upcast to bf16."""
        n, k = self.shape
        return 2 * n * k


@dataclass(frozen=True)
class LayerPlan:
    """The projection of one layer.

    Attributes:
        layer: index in the checkpoint's own numbering.
        is_mtp: True for a multi-token-prediction layer (layer >= num_hidden_layers in the config).
        tensors: names to read.
        wk, gate: the two matrices.
        problems: why it does not load; empty where it does.
    """

    layer: int
    is_mtp: bool
    tensors: tuple[str, ...]
    wk: MatrixPlan
    gate: MatrixPlan
    problems: tuple[Problem, ...] = field(repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, H, K) of a layer without problems."""
        return self.wk.shape[0], self.gate.shape[0], self.wk.shape[1]


@dataclass(frozen=True)
class Plan:
    """What a checkpoint holds of the projection.

    Attributes:
        layers: layer index -> LayerPlan, ascending; layers without an indexer are not in it.
        file_problems: what is wrong beyond any one layer.
    """

    layers: Mapping[int, LayerPlan]
    file_problems: tuple[Problem, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Plan:
        """Plans from headers; never raises, but collects problems."""
        faults: defaultdict[int | None, list[Problem]] = defaultdict(list)
        names: defaultdict[int, list[ProjectionTensor]] = defaultdict(list)
        for problem in checkpoint.problems:
            tensor = parse(problem.subject)
            faults[tensor.layer if tensor else None].append(problem)
        for name in {*checkpoint.headers, *(problem.subject for problem in checkpoint.problems)}:
            if tensor := parse(name):
                names[tensor.layer].append(tensor)
        layers = {layer: _plan_layer(layer, names[layer], checkpoint, faults[layer]) for layer in sorted(names)}
        file_problems = faults[None]
        _check_alike(layers)
        if not layers:
            expected = "tensors named ...layers.<L>.self_attn.indexer.wk.weight"
            found = f"none of {checkpoint.tensors} tensors"
            advice = "is this a model with an indexer?"
            file_problems.append(Problem(str(checkpoint.path), "", expected, found, advice))
        return cls(layers, tuple(file_problems))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem of the files and of the layers."""
        return (*self.file_problems, *(problem for plan in self.layers.values() for problem in plan.problems))

    def select(self, layers: Iterable[int] | None = None) -> dict[int, LayerPlan]:
        """The plans of some layers, or of all.

        Raises:
            CheckpointError: a problem in any of them, or a layer without an indexer.
        """
        wanted = sorted(self.layers if layers is None else set(layers))
        problems = list(self.file_problems)
        for layer in wanted:
            if layer in self.layers:
                problems += self.layers[layer].problems
            else:
                found = f"one in layers {_ranges(self.layers)}" if self.layers else "no indexer in any layer"
                problems.append(Problem(f"layer {layer}", "", "an indexer", found))
        if problems:
            raise CheckpointError(problems)
        return {layer: self.layers[layer] for layer in wanted}


def _plan_layer(
    layer: int, tensors: list[ProjectionTensor], checkpoint: Checkpoint, file_faults: list[Problem]
) -> LayerPlan:
    headers: defaultdict[str, dict[str, Header]] = defaultdict(dict)
    problems = list(file_faults)
    reported = {problem.subject for problem in file_faults}
    tensors = sorted(tensors, key=lambda tensor: (len(tensor.prefix), tensor.name))
    prefix = tensors[0].prefix
    for tensor in tensors:
        header = checkpoint.headers.get(tensor.name)
        if header is None:
            continue
        if tensor.prefix != prefix:
            expected = f"one prefix for layer {layer}, {prefix!r}"
            problems.append(Problem(tensor.name, header.file, expected, repr(tensor.prefix)))
        elif tensor.matrix not in MATRICES:
            advice = "a checkpoint that is already fused is not supported yet"
            problems.append(Problem(tensor.name, header.file, "wk and weights_proj apart", str(header), advice))
        else:
            headers[tensor.matrix][tensor.role] = header
    plans = {}
    for matrix in MATRICES:
        stem = f"{prefix}layers.{layer}.self_attn.indexer.{matrix}"
        encoding, faults = recognise(stem, headers[matrix])
        plans[matrix] = MatrixPlan(stem, encoding, headers[matrix])
        problems += [fault for fault in faults if fault.subject not in reported]
    wk, gate = plans["wk"], plans["weights_proj"]
    if wk.encoding and gate.encoding:
        problems += _check_shapes(wk, gate, checkpoint)
    num_hidden_layers = checkpoint.config.get("num_hidden_layers")
    is_mtp = num_hidden_layers is not None and layer >= num_hidden_layers
    present = tuple(tensor.name for tensor in tensors if tensor.name in checkpoint.headers)
    return LayerPlan(layer, is_mtp, present, wk, gate, tuple(problems))


def _check_alike(layers: dict[int, LayerPlan]) -> None:
    """Gives a problem to every layer whose shape is not that of most layers: one model has one shape."""
    shapes = Counter(plan.shape for plan in layers.values() if not plan.problems)
    if len(shapes) < 2:
        return
    usual = shapes.most_common(1)[0][0]
    for layer, plan in layers.items():
        if not plan.problems and plan.shape != usual:
            header = plan.wk.headers["weight"]
            expected = f"(D, H, K) = {usual}, as in most layers"
            problem = Problem(f"{plan.wk.stem}.weight", header.file, expected, f"{plan.shape}")
            layers[layer] = replace(plan, problems=(problem,))


def _check_shapes(wk: MatrixPlan, gate: MatrixPlan, checkpoint: Checkpoint) -> list[Problem]:
    problems = []
    if wk.shape[1] != gate.shape[1]:
        header = gate.headers["weight"]
        problems.append(Problem(f"{gate.stem}.weight", header.file, f"wk's K = {wk.shape[1]}", str(header)))
    for plan, axis, key in ((wk, 0, "index_head_dim"), (wk, 1, "hidden_size"), (gate, 0, "index_n_heads")):
        value = checkpoint.config.get(key, plan.shape[axis])
        if value != plan.shape[axis]:
            header = plan.headers["weight"]
            expected = f"{value} in dimension {axis} (config.json: {key})"
            problems.append(Problem(f"{plan.stem}.weight", header.file, expected, str(header)))
    return problems


def _ranges(layers: Iterable[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
