"""Which layers own an indexer, and how each of them is stored: read from headers alone."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .checkpoint import Checkpoint, Header
from .encodings import Encoding, recognise
from .names import MATRICES, IndexerTensor, parse
from .problems import CheckpointError, Problem


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
        """Bytes in memory once loaded; 0 where there is no encoding."""
        return self.encoding.kept_bytes(self.shape) if self.encoding else 0

    @property
    def upcast_bytes(self) -> int:
        """Bytes in memory if it were upcast to bf16; 0 where there is no encoding."""
        return 2 * math.prod(self.shape) if self.encoding else 0


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
        (d, k), (h, _) = self.wk.shape, self.gate.shape
        return d, h, k


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
        names: defaultdict[int, list[IndexerTensor]] = defaultdict(list)
        for problem in checkpoint.problems:
            tensor = parse(problem.subject)
            faults[tensor.layer if tensor else None].append(problem)
        subjects = (problem.subject for problem in checkpoint.problems)
        for name in sorted({*checkpoint.headers, *checkpoint.neighbours, *subjects}):
            if tensor := parse(name):
                names[tensor.layer].append(tensor)
        layers = {layer: _plan_layer(layer, names[layer], checkpoint, faults[layer]) for layer in sorted(names)}
        file_problems = faults[None]
        _check_alike(layers)
        if not layers and not file_problems:
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
            TypeError: a layer that is no integer.
        """
        wanted = set(self.layers if layers is None else layers)
        for layer in wanted:
            if not isinstance(layer, int):
                raise TypeError(f"layers must be integers, got {layer!r}")
        problems = list(self.file_problems)
        for layer in sorted(wanted):
            if layer in self.layers:
                problems += self.layers[layer].problems
            else:
                expected = f"one of the layers with an indexer, {_ranges(self.layers) or 'none'}"
                problems.append(Problem(f"layer {layer}", "", expected, "no indexer in it"))
        if problems:
            raise CheckpointError(problems)
        return {layer: self.layers[layer] for layer in sorted(wanted)}


def _plan_layer(
    layer: int, tensors: list[IndexerTensor], checkpoint: Checkpoint, file_faults: list[Problem]
) -> LayerPlan:
    projection = [tensor for tensor in tensors if tensor.name in checkpoint.headers]
    stem = (projection or tensors)[0].stem
    headers: defaultdict[str, dict[str, Header]] = defaultdict(dict)
    problems = list(file_faults)
    has_fused = False
    for tensor in projection:
        header = checkpoint.headers[tensor.name]
        if tensor.stem != stem:
            problems.append(Problem(tensor.name, header.file, f"all of layer {layer} under {stem}", str(header)))
        elif tensor.matrix not in MATRICES:
            has_fused = True
            advice = "a checkpoint that is already fused is not supported yet"
            problems.append(Problem(tensor.name, header.file, "wk and weights_proj apart", str(header), advice))
        else:
            headers[tensor.matrix][tensor.role] = header
    plans = []
    missing = {problem.subject for problem in file_faults if problem.subject not in checkpoint.headers}
    for matrix in MATRICES:
        encoding, faults = recognise(f"{stem}{matrix}", headers[matrix])
        plans.append(MatrixPlan(f"{stem}{matrix}", encoding, headers[matrix]))
        if headers[matrix] or not has_fused:
            problems += [fault for fault in faults if fault.subject not in missing]
    wk, gate = plans
    problems += _check_shapes(wk, gate, checkpoint)
    num_hidden_layers = checkpoint.config.get("num_hidden_layers")
    is_mtp = num_hidden_layers is not None and layer >= num_hidden_layers
    return LayerPlan(layer, is_mtp, tuple(tensor.name for tensor in projection), wk, gate, tuple(problems))


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
    """Holds the matrices against each other and against the config."""
    problems = []
    if len(wk.shape) == len(gate.shape) == 2 and wk.shape[1] != gate.shape[1]:
        header = gate.headers["weight"]
        problems.append(Problem(f"{gate.stem}.weight", header.file, f"wk's K = {wk.shape[1]}", str(header)))
    for plan, axis, key in ((wk, 0, "index_head_dim"), (wk, 1, "hidden_size"), (gate, 0, "index_n_heads")):
        value = checkpoint.config.get(key)
        if len(plan.shape) == 2 and value not in (None, plan.shape[axis]):
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
