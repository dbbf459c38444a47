"""The projections of a model in an engine, through loads and reloads. Independent of the engine."""

import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ...kernels import ProjectionWeights
from ...loading import CheckpointError, Problem
from ...loading.config import Config
from ...loading.headers import GATE, UNUSED, WK, Header, IndexerTensor, parse
from ...loading.layer import Collector
from ...loading.problems import log, ranges
from ...loading.values import judge

LOGGER = logging.getLogger("vllm.indexproj")
LAYOUT = "wk in {}, weights_proj in {}"


class IndexerLayer:
    """The weights of one wk_weights_proj, whose module stays the engine's own.

    Weights come through `offer`. Loaders that do not read checkpoints (dummy, sharded state) write to `module.weight`,
    which is NaN before. Once loaded, two dense matrices are in `module.weight` [D + H, K] bf16; otherwise their tensors
    are parameters in its place. Layout and memory then stay, because CUDA graphs and compiled code hold pointers.
    """

    def __init__(self, name: str, number: int, module: Any, config: Config, to_bf16: bool) -> None:
        self.name, self.number, self.module = name, number, module
        self.shape: tuple[int, int, int] = (*module.output_sizes, module.weight.shape[1])  # (D, H, K)
        self.layout: str | None = None  # None before the first load; compiled code guards on this
        self.weights: ProjectionWeights | None = None  # None if they are in module.weight
        d, h, k = self.shape
        self._config = replace(config, index_head_dim=d, index_n_heads=h, hidden_size=k, num_nextn_predict_layers=None)
        self._to_bf16, self._device = to_bf16, module.weight.device
        self._saved: Any = lambda: None  # weak reference to what the last state_dict has
        self._dense: nn.Parameter = module.weight  # during a reload, the engine puts another one into the module
        self._dense.data.fill_(torch.nan)
        self.reset()

    def reset(self) -> None:
        """Forgets the current load. Weights that it has completed stay."""
        self.updated = False  # True: computes with weights of the current load, and refuses more tensors
        self.collector: Collector | None = None  # if some tensors have come and others must follow
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []  # odd or rounded values

    @property
    def operands(self) -> ProjectionWeights:
        """The two matrices. Raises RuntimeError if nothing has been loaded."""
        if self.layout is None:
            raise RuntimeError(f"{self.name}: no weights have been loaded")
        # Not cached: offloading moves the parameter.
        return self.weights or ProjectionWeights.split(self.module.weight.data, self.shape[0])

    def offer(self, part: IndexerTensor, tensor: Tensor) -> None:
        """Takes a tensor of the checkpoint, which may be overwritten afterwards. Finishes if no other can follow."""
        if self.updated:
            found = str(Header.of(part.name, tensor, ""))
            self.problems.append(Problem(part.name, "", "no more tensors for a complete layer", found))
            return
        collector = self.collector or Collector(self.number, part, self._config)
        collector.offer(part, tensor, "", self._device)
        self.collector = collector  # unless the offer failed
        if self.collector.is_complete:
            self.finish()

    def finish(self) -> None:
        """Ends a load: uses the collected tensors, or checks the values that the layer holds if none came."""
        if self.collector is not None:
            plan, tensors = self.collector.plan(), self.collector.tensors
            self.collector = None
            self.problems += plan.problems
            if not plan.problems and (new := plan.bind(tensors, self.problems, self.warnings)):
                self._use(new)
        elif not self.updated and not self.problems:
            held = self.weights or ProjectionWeights.split(self._dense.data, self.shape[0])
            if judge(held.wk)[0] or judge(held.gate)[0]:  # nobody wrote to it, or a sleep discarded it
                found = "none of them, and uninitialized memory"
                self.problems.append(Problem(self.name, "", f"tensors of {WK} and {GATE}", found))
            else:
                self.layout = LAYOUT.format(*held.formats)

    def settle(self) -> None:
        """Ends a call of an update that has no end: uses what is complete, also one matrix, or refuses its layout."""
        if self.collector is None:
            return
        plan, tensors = self.collector.plan(), self.collector.tensors
        if not plan.problems or self.collector.problems:  # complete, or a tensor came twice
            self.finish()
            return
        for side, one, other in ("wk", plan.wk, plan.gate), ("gate", plan.gate, plan.wk):
            if one.encoding and not one.encoding.optional and not other.headers:
                self.collector = None
                self.problems += [problem for problem in plan.problems if problem.subject.startswith(one.name)]
                if not self.problems and (matrix := one.bind(tensors, self.problems, self.warnings)):
                    self._use(replace(self.operands, **{side: matrix}))

    def _use(self, new: ProjectionWeights) -> None:
        if self._to_bf16 or (self.layout and self.weights is None):  # `weight` stays dense
            new = new.to_bf16()
        if self.weights is None and new.fused_weight is not None:
            self._dense.data.copy_(new.fused_weight)
        elif self.weights is None:
            self._replace_parameter(new)
        elif self.weights.matches(new):
            self.weights.copy_(new)
        else:
            expected = f"{self.layout} as in the first load, whose memory CUDA graphs and compiled code use"
            advice = "send that, or start vLLM with INDEXPROJ_VLLM=bf16 to accept any encoding in reloads"
            self.problems.append(Problem(self.name, "", expected, LAYOUT.format(*new.formats), advice))
            return
        self.layout, self.updated = LAYOUT.format(*new.formats), True

    def _replace_parameter(self, new: ProjectionWeights) -> None:
        self.module._parameters.pop("weight", None)
        del self._dense  # frees its memory
        self.weights = new.map(lambda tensor: nn.Parameter(tensor, requires_grad=False))
        for prefix, matrix in ((WK, self.weights.wk), (GATE, self.weights.gate)):
            tensors = {name: tensor for name, tensor in vars(matrix).items() if isinstance(tensor, Tensor)}
            for name, tensor in tensors.items():
                is_first = tensor is self.weights.wk.values  # LoRA layers read the device from `qweight`
                self.module.register_parameter("qweight" if is_first else f"{prefix}_{name}", tensor)
        self.module.register_state_dict_post_hook(partial(self._save_dense))  # not for bound methods

    def _save_dense(self, module: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
        """Saves `weight` in bf16 in place of the parameters: engines load that with indexproj or without."""
        for name in module._parameters:
            state.pop(prefix + name, None)
        dense = self._saved()
        if dense is None or all(dense is not tensor for tensor in state.values()):  # a module may have two names
            dense = self.operands.to_bf16().fused_weight
            self._saved = ref(dense)
        state[f"{prefix}weight"] = dense


class IndexerModel:
    """All projections of one model. `layers` maps a layer index to its IndexerLayer."""

    def __init__(self, model: Any, names: Mapping[int, str], config: Config, to_bf16: bool, invariant: bool) -> None:
        """Wraps load_weights of the model. names: layer index -> name of its wk_weights_proj."""
        self.batch_invariant, self._class = invariant, type(model).__name__
        self.is_serving = False  # the first load has ended
        self.is_loading = True  # a load has begun, and nothing has ended it
        self.layers: dict[int, IndexerLayer] = {}
        for number, name in sorted(names.items()):
            self.layers[number] = IndexerLayer(name, number, model.get_submodule(name), config, to_bf16)
        self._num_hidden_layers = config.num_hidden_layers
        self.compile_key: dict[str, Any] = {}  # of the engine's cache; gets the formats
        self._reload: Tensor | None = None  # a meta parameter of the last reload
        self._load_weights, model.load_weights = model.load_weights, self.load_weights

    def load_weights(self, weights: Iterable[tuple[Any, ...]], *args: Any, **kwargs: Any) -> Any:
        """Takes the tensors of the projections. Raises CheckpointError if nothing ends the update, or finish does."""
        # The engine ends first loads, and reloads for which it puts new parameters on the meta device.
        parameters = (p for layer in self.layers.values() for p in layer.module.parameters(recurse=False))
        reload = next((parameter for parameter in parameters if parameter.is_meta), None)
        if reload is not None and reload is not self._reload:
            self._abandon()  # leftovers of an update
        self._reload, self.is_loading = reload, True
        has_end = not self.is_serving or reload is not None
        try:
            with self._parameters_hidden():
                loaded = self._load_weights(self._others(weights), *args, **kwargs)
        except BaseException:
            self._abandon()
            raise
        for layer in self.layers.values():
            if not has_end:
                layer.settle()
            if loaded is not None and layer.updated:
                loaded.update(f"{layer.name}.{name}" for name, _ in layer.module.named_parameters(recurse=False))
        if not has_end:
            self._end()
            if waiting := [number for number, layer in self.layers.items() if layer.collector]:
                LOGGER.warning("indexer layers %s keep their old weights until all tensors arrive", ranges(waiting))
        return loaded

    def finish(self) -> list[Any]:
        """Ends a load and returns the modules with new weights. Raises CheckpointError for problems of all layers."""
        for layer in self.layers.values():
            layer.finish()
        updated = self._end()
        if not self.is_serving:
            layouts = "; ".join(dict.fromkeys(str(layer.layout) for layer in self.layers.values()))
            layouts += ", batch-invariant" * self.batch_invariant
            version, count = importlib.metadata.version("indexproj"), len(self.layers)
            self.compile_key.setdefault("indexproj", {})[self._class] = f"{version}: {layouts}"
            LOGGER.info("indexproj %s runs %s indexer projections of %s: %s", version, count, self._class, layouts)
        self.is_serving, self.is_loading = True, False
        return updated

    def _end(self) -> list[Any]:
        """Raises all problems, or logs all warnings. Returns the modules with new weights, which then take others."""
        layers = self.layers.values()
        if problems := [problem for layer in layers for problem in layer.problems]:
            self._abandon()
            raise CheckpointError(problems)
        log((warning for layer in layers for warning in layer.warnings), LOGGER)
        updated = [layer for layer in layers if layer.updated]
        for layer in updated:
            layer.reset()
        return [layer.module for layer in updated]

    def _others(self, weights: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        for item in weights:
            name, tensor = item[:2]
            part = parse(name) if ".indexer." in name else None
            if part is None or (part.matrix is None and part.role != UNUSED):
                yield item
                continue
            # Passed over: layers of other pipeline ranks or models (MTP), and layers that share another one's choice.
            number: Any = part.layer(self._num_hidden_layers)
            if number in self.layers and part.matrix:
                self.layers[number].offer(part, tensor)

    def _abandon(self) -> None:
        for layer in self.layers.values():
            layer.reset()

    @contextmanager
    def _parameters_hidden(self) -> Iterator[None]:
        """Hides the parameters from the engine: HY-V4's MTP module would report them as not loaded."""
        hidden = {layer.module: layer.module._parameters for layer in self.layers.values()}
        for module, parameters in hidden.items():
            module._parameters = dict.fromkeys(parameters)
        try:
            yield
        finally:
            for module, parameters in hidden.items():
                if not any(each is not None for each in module._parameters.values()):  # or others have replaced them
                    module._parameters = parameters
