"""Which layers own an indexer and how each is stored, from headers alone."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .checkpoint import Checkpoint
from .config import CONFIG, Config
from .layer import Collector, LayerPlan, check_alike
from .names import parse
from .problems import CheckpointError, Problem


@dataclass(frozen=True)
class Plan:
    """The projection in a checkpoint.

    Attributes:
        layers: layer index -> LayerPlan, ascending, for layers that own an indexer.
        config: config.json.
        file_problems: problems that belong to no single layer.
    """

    layers: Mapping[int, LayerPlan]
    config: Config
    file_problems: tuple[Problem, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Plan:
        """Plans a load. Collects problems and never raises."""
        config = checkpoint.config
        collector = Collector(config.index_head_dim, config.num_hidden_layers)
        faults = [(problem, parse(problem.subject)) for problem in checkpoint.problems]
        others = {*checkpoint.neighbours, *(problem.subject for problem, _ in faults)} - checkpoint.headers.keys()
        for tensor in filter(None, map(parse, (*sorted(checkpoint.headers), *sorted(others)))):
            if (number := collector.number(tensor)) is not None:
                collector.add(number, tensor, checkpoint.headers.get(tensor.name))
        for problem, part in faults:
            collector.problems[collector.number(part) if part else None].append(problem)
        layers = collector.plans()
        layers = {number: layer.with_problems(*_check_sizes(layer, config)) for number, layer in layers.items()}
        check_alike(layers)
        file_problems = collector.problems[None]
        if not layers and not file_problems:
            expected = "tensors named ...layers.<L>.self_attn.indexer.wk.weight"
            found, advice = f"none of {checkpoint.tensors} tensors", "is this a model with an indexer?"
            file_problems.append(Problem(str(checkpoint.path), "", expected, found, advice))
        if checkpoint.is_whole and layers:
            file_problems += _check_schedule(config, layers)
        return cls(layers, config, tuple(file_problems))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem of the files and of the layers."""
        return (*self.file_problems, *(problem for plan in self.layers.values() for problem in plan.problems))

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Contradictions within config.json that do not affect what loads."""
        warnings, schedules = list(self.config.warnings), self.config.schedules
        for source, schedule in schedules.items():
            if differing := [layer for layer, runs in enumerate(schedule) if runs != self.config.schedule[layer]]:
                first, found = next(iter(schedules)), f"a difference in layers {ranges(differing)}"
                advice = f"indexproj goes by {first}, other engines may not"
                warnings.append(Problem(CONFIG, "", f"{first} and {source} to agree", found, advice))
        return tuple(warnings)

    def has_weights(self, layer: int) -> bool:
        """True if the checkpoint has tensors of that layer's indexer, whether or not the model runs it."""
        return layer in self.layers

    def runs(self, layer: int) -> bool:
        """True if the model runs that layer's indexer, False if it reuses the tokens that an earlier layer picked.

        The config decides for hidden layers; without a schedule, and for other layers, having weights does.
        """
        schedule = self.config.schedule
        return schedule[layer] if 0 <= layer < len(schedule) else self.has_weights(layer)

    def select(self, layers: Iterable[int] | None = None) -> dict[int, LayerPlan]:
        """The plans of some layers, or of all.

        Raises:
            CheckpointError: a problem in any of them, or a layer without an indexer.
            TypeError: a layer index that is not an integer.
        """
        wanted = sorted(set(self.layers if layers is None else map(operator.index, layers)))
        problems = list(self.file_problems)
        for layer in wanted:
            if layer in self.layers:
                problems += self.layers[layer].problems
            else:
                expected = f"one of the layers with an indexer, {ranges(self.layers) or 'none'}"
                problems.append(Problem(f"layer {layer}", "", expected, "no indexer in it"))
        if problems:
            raise CheckpointError(problems)
        return {layer: self.layers[layer] for layer in wanted}


def _check_sizes(layer: LayerPlan, config: Config) -> list[Problem]:
    problems = []
    sizes = (layer.wk, 0, "index_head_dim"), (layer.wk, 1, "hidden_size"), (layer.gate, 0, "index_n_heads")
    for plan, axis, key in sizes:
        value = getattr(config, key)
        if plan.shape and value not in (None, plan.shape[axis]):
            expected = f"{value} in dimension {axis} of the matrix ({CONFIG}: {key})"
            problems.append(plan.wrong(expected, f"{plan.headers['weight']}, a matrix {list(plan.shape)}"))
    return problems


def _check_schedule(config: Config, layers: Mapping[int, LayerPlan]) -> list[Problem]:
    """Checks the layers in the config against those in the files."""
    problems = []
    gaps = [layer for layer, runs in enumerate(config.schedule) if runs and layer not in layers]
    if gaps:
        expected = f"weights for the indexers of layers {ranges(gaps)}, which run by {next(iter(config.schedules))}"
        problems.append(Problem(CONFIG, "", expected, f"an indexer in layers {ranges(layers)} only"))
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
