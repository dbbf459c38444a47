"""Which layers own an indexer, and how each of them is stored: read from headers alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from .checkpoint import Checkpoint
from .config import CONFIG, Config
from .headers import Header
from .layer import MatrixPlan, Pair, plan_pair, unlike_most
from .names import UNUSED, IndexerTensor, integer, parse
from .problems import CheckpointError, Problem

DEFAULT_HEAD_DIM = 128  # D of every model so far


@dataclass(frozen=True)
class LayerPlan:
    """The projection of one layer.

    Attributes:
        layer: index in the checkpoint's own numbering; `mtp_layers` come behind the hidden ones.
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
        config: what config.json says.
        file_problems: what is wrong beyond any one layer.
    """

    layers: Mapping[int, LayerPlan]
    config: Config
    file_problems: tuple[Problem, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Plan:
        """Plans from headers; never raises, but collects problems."""
        faults: defaultdict[int | None, list[Problem]] = defaultdict(list)
        names: defaultdict[int, list[IndexerTensor]] = defaultdict(list)
        hidden = checkpoint.config.num_hidden_layers
        for problem in checkpoint.problems:
            tensor = parse(problem.subject)
            faults[tensor.layer(hidden) if tensor else None].append(problem)
        subjects = (problem.subject for problem in checkpoint.problems)
        unnumbered = []
        for name in sorted({*checkpoint.headers, *checkpoint.neighbours, *subjects}):
            if tensor := parse(name):
                layer = tensor.layer(hidden)
                if layer is None:
                    unnumbered.append(name)
                else:
                    names[layer].append(tensor)
        layers = {layer: _plan_layer(layer, names[layer], checkpoint, faults[layer]) for layer in sorted(names)}
        _check_alike(layers)
        file_problems = faults[None]
        if unnumbered:
            expected = f"num_hidden_layers in {CONFIG}, behind which mtp_layers are counted"
            file_problems.append(Problem(unnumbered[0], "", expected, "none"))
        elif not layers and not file_problems:
            expected = "tensors named ...layers.<L>.self_attn.indexer.wk.weight"
            found = f"none of {checkpoint.tensors} tensors"
            advice = "is this a model with an indexer?"
            file_problems.append(Problem(str(checkpoint.path), "", expected, found, advice))
        if checkpoint.is_whole and layers:
            file_problems += _check_schedules(checkpoint.config, layers)
        return cls(layers, checkpoint.config, tuple(file_problems))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem of the files and of the layers."""
        return (*self.file_problems, *(problem for plan in self.layers.values() for problem in plan.problems))

    def has_weights(self, layer: int) -> bool:
        """True if the checkpoint has tensors of that layer's indexer, whether or not the model ever runs it."""
        return layer in self.layers

    def runs(self, layer: int) -> bool:
        """True if the model runs that layer's indexer, instead of sharing the choice of an earlier layer.

        The config says so of hidden layers; of others, and where it says nothing, it is whether there are weights.
        """
        schedule = self.config.schedule
        return schedule[layer] if 0 <= layer < len(schedule) else self.has_weights(layer)

    def select(self, layers: Iterable[int] | None = None) -> dict[int, LayerPlan]:
        """The plans of some layers, or of all.

        Raises:
            CheckpointError: a problem in any of them, or a layer without an indexer.
            TypeError: a layer that is no integer.
        """
        wanted = set(self.layers if layers is None else map(integer, layers))
        problems = list(self.file_problems)
        for layer in sorted(wanted):
            if layer in self.layers:
                problems += self.layers[layer].problems
            else:
                expected = f"one of the layers with an indexer, {ranges(self.layers) or 'none'}"
                problems.append(Problem(f"layer {layer}", "", expected, "no indexer in it"))
        if problems:
            raise CheckpointError(problems)
        return {layer: self.layers[layer] for layer in sorted(wanted)}


def _plan_layer(
    layer: int, tensors: list[IndexerTensor], checkpoint: Checkpoint, file_faults: list[Problem]
) -> LayerPlan:
    config = checkpoint.config
    present = [tensor for tensor in tensors if tensor.matrix and tensor.name in checkpoint.headers]
    stem = (present or tensors)[0].stem
    headers: dict[str, dict[str, Header]] = {tensor.matrix: {} for tensor in tensors if tensor.matrix}
    problems = list(file_faults)
    for tensor in present:
        assert tensor.matrix is not None
        header = checkpoint.headers[tensor.name]
        first = headers[tensor.matrix].setdefault(tensor.role, header)
        if tensor.stem != stem:
            problems.append(Problem(tensor.name, header.file, f"all of layer {layer} under {stem}", str(header)))
        elif first is not header:
            problems.append(Problem(tensor.name, header.file, f"one tensor in the role of {first.name}", str(header)))
    pair = plan_pair(stem, headers, config.index_head_dim or DEFAULT_HEAD_DIM)
    # What a file should hold and does not is already there, with the file's name.
    missing = {(tensor.matrix, tensor.role) for tensor in tensors if tensor.name not in checkpoint.headers}
    problems += [fault for fault in pair.problems if _part(fault.subject) not in missing]
    problems += _check_sizes(pair, config)
    is_mtp = config.num_hidden_layers is not None and layer >= config.num_hidden_layers
    names = tuple(tensor.name for tensor in present if tensor.role != UNUSED)
    return LayerPlan(layer, is_mtp, names, pair.wk, pair.gate, tuple(problems))


def _part(name: str) -> tuple[str | None, str] | None:
    tensor = parse(name)
    return (tensor.matrix, tensor.role) if tensor else None


def _check_sizes(pair: Pair, config: Config) -> list[Problem]:
    problems = []
    for plan, axis, key in (
        (pair.wk, 0, "index_head_dim"), (pair.wk, 1, "hidden_size"), (pair.gate, 0, "index_n_heads"),
    ):  # fmt: skip
        value = getattr(config, key)
        if plan.shape and value not in (None, plan.shape[axis]):
            header = plan.headers["weight"]
            expected = f"{value} in dimension {axis} of the matrix ({CONFIG}: {key})"
            problems.append(Problem(header.name, header.file, expected, f"{header}, a matrix {list(plan.shape)}"))
    return problems


def _check_alike(layers: dict[int, LayerPlan]) -> None:
    """Gives a problem to every layer whose shape, or prefix if it is a hidden one, is not that of most layers."""
    sound = {layer: plan for layer, plan in layers.items() if not plan.problems}
    hidden = {layer: plan.wk.name.rpartition("layers.")[0] for layer, plan in sound.items() if not plan.is_mtp}
    for layer, prefix in unlike_most(hidden).items():
        plan = layers[layer]
        header = plan.wk.headers["weight"]
        expected = f"hidden layers under {prefix}layers, as most are"
        advice = "an MTP layer is numbered from num_hidden_layers on, or called mtp_layers"
        layers[layer] = replace(plan, problems=(Problem(header.name, header.file, expected, str(header), advice),))
    for layer, usual in unlike_most({layer: plan.shape for layer, plan in sound.items()}).items():
        plan = layers[layer]
        d_or_k_differs = (plan.shape[0], plan.shape[2]) != (usual[0], usual[2])
        header = (plan.wk if d_or_k_differs else plan.gate).headers["weight"]
        expected = f"(D, H, K) = {usual}, as in most layers"
        problem = Problem(header.name, header.file, expected, f"{plan.shape}")
        layers[layer] = replace(plan, problems=(*plan.problems, problem))


def _check_schedules(config: Config, layers: Mapping[int, LayerPlan]) -> list[Problem]:
    """Holds what the config says of layers against the layers that there are, and against itself."""
    problems = []
    sources = list(config.schedules)
    if sources:
        gaps = [layer for layer, runs in enumerate(config.schedule) if runs and layer not in layers]
        if gaps:
            expected = f"weights for the indexers of layers {ranges(gaps)}, which run by {sources[0]}"
            problems.append(Problem(CONFIG, "", expected, f"an indexer in layers {ranges(layers)} only"))
    for source in sources[1:]:
        pairs = zip(config.schedule, config.schedules[source], strict=True)
        differing = [layer for layer, (first, second) in enumerate(pairs) if first != second]
        if differing:
            expected = f"{sources[0]} and {source} to say the same"
            advice = "engines differ in which of them they read"
            problems.append(Problem(CONFIG, "", expected, f"a difference in layers {ranges(differing)}", advice))
    if config.num_hidden_layers is not None and config.num_nextn_predict_layers is not None:
        end = config.num_hidden_layers + config.num_nextn_predict_layers
        beyond = [layer for layer, plan in layers.items() if layer >= end and ".mtp_layers." not in f".{plan.wk.name}"]
        if beyond:
            expected = f"layers below {end} (num_hidden_layers + num_nextn_predict_layers)"
            problems.append(Problem(CONFIG, "", expected, f"an indexer in layers {ranges(beyond)}"))
    return problems


def ranges(layers: Iterable[int]) -> str:
    """1, 2, 3, 7 as "1-3, 7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
