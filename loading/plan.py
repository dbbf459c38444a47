"""Plans which layers own an indexer and how each is stored, from headers alone, and loads them."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..kernels.weights import ProjectionWeights
from .checkpoint import Checkpoint
from .config import CONFIG, Config
from .headers import parse
from .layer import Collector, LayerPlan, number_of, own, plan_layers, real_device
from .problems import CheckpointError, Problem, log, ranges


@dataclass(frozen=True)
class Plan:
    """The projection in a checkpoint."""

    layers: Mapping[int, LayerPlan]  # by layer index, ascending, for layers that own an indexer
    config: Config
    file_problems: tuple[Problem, ...]  # these concern any load from these files
    # These concern the model, but no layer that loads: a layer that is missing, a schedule that says nothing.
    model_problems: tuple[Problem, ...]

    @classmethod
    def of(cls, checkpoint: Checkpoint, index_head_dim: int | None = None) -> "Plan":
        """Plans a load and collects problems. Raises only TypeError, for an index_head_dim that is not an integer.

        index_head_dim: D, to split `wk_weights_proj`; from config.json by default.
        """
        config = checkpoint.config
        if index_head_dim is not None:
            if isinstance(index_head_dim, bool) or not hasattr(index_head_dim, "__index__"):
                raise TypeError(f"index_head_dim: expected an integer, got {index_head_dim!r}")
            config = replace(config, index_head_dim=index_head_dim)
        collectors: dict[int, Collector] = {}
        model_problems: list[Problem] = []
        file_problems: list[Problem] = []
        faults = [(problem, parse(problem.subject)) for problem in checkpoint.problems]
        others = {*checkpoint.neighbours, *(problem.subject for problem, _ in faults)} - checkpoint.headers.keys()
        for part in filter(None, map(parse, (*sorted(checkpoint.headers), *sorted(others)))):
            if (number := number_of(part, config, model_problems)) is not None:
                collector = collectors.setdefault(number, Collector(number, part, config))
                collector.add(part, checkpoint.headers.get(part.name))
        for problem, fault in faults:
            number = number_of(fault, config, model_problems) if fault else None
            at_fault = model_problems if fault else file_problems
            (at_fault if number is None else collectors[number].problems).append(problem)
        layers = plan_layers(collectors)
        model_problems += config.schedule_problems
        if not layers and not file_problems and not model_problems:
            expected = "tensors named ...layers.<L>.self_attn.indexer.wk.weight"
            found, advice = f"none of {checkpoint.tensors} tensors", "is this a model with an indexer?"
            file_problems.append(Problem(str(checkpoint.path), "", expected, found, advice))
        gaps = [layer for layer, runs in enumerate(config.schedule) if runs and layer not in layers]
        if checkpoint.is_whole and layers and gaps:
            expected = f"weights for the indexers of layers {ranges(gaps)}, which run by {next(iter(config.schedules))}"
            found = f"an indexer in layers {ranges(layers)} only"
            model_problems.append(Problem(CONFIG, "", expected, found))
        return cls(layers, config, tuple(file_problems), tuple(model_problems))

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Every problem of the files, of the model and of the layers."""
        layers = (problem for plan in self.layers.values() for problem in plan.problems)
        return (*self.file_problems, *self.model_problems, *layers)

    @property
    def warnings(self) -> tuple[Problem, ...]:
        """Schedules in config.json that contradict each other, which does not affect what loads."""
        warnings, schedules = [], self.config.schedules
        for source, schedule in schedules.items():
            if differing := [layer for layer, runs in enumerate(schedule) if runs != self.config.schedule[layer]]:
                first, found = next(iter(schedules)), f"a difference in layers {ranges(differing)}"
                advice = f"indexproj uses {first}; other engines may not"
                warnings.append(Problem(CONFIG, "", f"{first} and {source} to agree", found, advice))
        return tuple(warnings)

    def runs(self, layer: int) -> bool:
        """True if the model runs that layer's indexer, False if it reuses the tokens that an earlier layer picked.

        The config decides for hidden layers; without a schedule, and for other layers, having weights does.
        """
        schedule = self.config.schedule
        return schedule[layer] if 0 <= layer < len(schedule) else layer in self.layers


def load(
    checkpoint: str | Path | Checkpoint,
    layers: Iterable[int] | None = None,
    device: str | torch.device = "cpu",
    *,
    index_head_dim: int | None = None,
) -> dict[int, ProjectionWeights]:
    """Loads the projection of some layers, or of all that own an indexer. Reads only its own bytes.

    Logs one warning with `Plan.warnings`, problems of layers that were not asked for, values that are odd, and values
    that were rounded.

    Args:
        checkpoint: a directory, a .safetensors file, or a Checkpoint.
        index_head_dim: D, to split `wk_weights_proj`; from config.json by default.

    Returns:
        layer -> weights.

    Raises:
        CheckpointError: nothing is loaded. Lists every problem of these layers and of the files; without `layers`, of
            the model too.
        TypeError: a layer index that is not an integer.
    """
    device = real_device(device)
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = Checkpoint(checkpoint)
    plan = Plan.of(checkpoint, index_head_dim)
    wanted = sorted(set(plan.layers if layers is None else map(operator.index, layers)))
    problems = [*plan.file_problems, *(plan.model_problems if layers is None else ())]
    for number in wanted:
        if number in plan.layers:
            problems += plan.layers[number].problems
        else:
            expected = f"one of the layers with an indexer, {ranges(plan.layers) or 'none'}"
            problems.append(Problem(f"layer {number}", "", expected, "no indexer in it"))
    if problems:
        raise CheckpointError(problems)
    warnings = [*plan.warnings, *plan.problems]
    loaded: dict[int, ProjectionWeights] = {}
    for number in wanted:
        layer = plan.layers[number]
        tensors = {name: own(checkpoint.read(name), device) for name in layer.tensors}
        if weights := layer.bind(tensors, problems, warnings):
            loaded[number] = weights
    if problems:
        raise CheckpointError(problems)
    log(warnings)
    return loaded
