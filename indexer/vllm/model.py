"""The projections of a model in an engine, through loads and reloads. Independent of the engine."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from enum import Enum, auto
from functools import partial
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ...kernels import DenseMatrix, ProjectionWeights
from ...loading import CheckpointError, Problem
from ...loading.config import Config
from ...loading.headers import DTYPES, Header
from ...loading.layer import Collector, own
from ...loading.names import GATE, UNUSED, WK, IndexerTensor, parse
from ...loading.problems import log, ranges
from ...loading.values import judge

LOGGER = logging.getLogger("vllm.indexproj")
LAYOUT = "wk in {}, weights_proj in {}"


class State(Enum):
    """The state of a layer. A model is EMPTY until its first load ends, and COLLECTING during later loads."""

    EMPTY = auto()  # raises if it is used
    COLLECTING = auto()  # some tensors have come; computes with its old weights, if it has any
    UPDATED = auto()  # computes with new weights, and refuses more tensors until the load ends
    READY = auto()


class IndexerLayer:
    """The weights of one wk_weights_proj, whose module stays the engine's own.

    Weights come through `offer`. Loaders that do not read checkpoints (dummy, sharded state) write to `module.weight`,
    which is NaN before. Once loaded, two dense matrices are in `module.weight` [D + H, K] bf16; otherwise their tensors
    are parameters in its place. Layout and memory then stay, because CUDA graphs and compiled code hold pointers.
    """

    def __init__(self, name: str, number: int, module: Any, config: Config, to_bf16: bool) -> None:
        self.name, self.number, self.module, self.state = name, number, module, State.EMPTY
        self.shape: tuple[int, int, int] = (*module.output_sizes, module.weight.shape[1])  # (D, H, K)
        self.layout: str | None = None  # compiled code guards on this, which changes less than the state
        self.weights: ProjectionWeights | None = None  # None if they are in module.weight
        self.problems: list[Problem] = []  # of the current load
        self.warnings: list[Problem] = []  # odd or rounded values of the last load
        self._config = replace(config, index_head_dim=self.shape[0])
        self._to_bf16, self._device = to_bf16, module.weight.device
        self._collector: Collector | None = None
        self._tensors: dict[str, Tensor] = {}
        self._gate_copy: Tensor | None = None
        self._saved: Any = lambda: None  # weak reference to what the last state_dict has
        self._dense: nn.Parameter = module.weight  # during a reload, the engine puts another one into the module
        self._dense.data.fill_(torch.nan)

    @property
    def operands(self) -> ProjectionWeights:
        """The two matrices. Raises RuntimeError if nothing has been loaded."""
        if self.layout is None:
            raise RuntimeError(f"{self.name}: no weights have been loaded")
        return self.weights or self._split(self.module.weight.data)  # not cached: offloading moves the parameter

    def offer(self, part: IndexerTensor, tensor: Tensor) -> None:
        """Takes a tensor of the checkpoint, which may be overwritten afterwards. Finishes if no other can follow."""
        header = Header.of(part.name, tensor, "")
        if self.state is State.UPDATED:
            self.problems.append(Problem(part.name, "", "no more tensors for a complete layer", str(header)))
            return
        if self._collector is None:
            self._collector, self.state = Collector(self._config), State.COLLECTING
        if header.dtype in DTYPES.values():
            self._tensors[part.name] = own(tensor, self._device)
        self._collector.add(self.number, part, header)
        if self._collector.is_complete(self.number):
            self.finish()

    def finish(self) -> None:
        """Ends a load: uses the collected tensors, or checks the values that the layer holds if none came."""
        if self._collector is not None:
            plan, tensors = self._collector.plan(self.number), self._tensors
            self._drop()
            self.problems += plan.problems
            if not plan.problems and (new := plan.bind(tensors, self.problems, self.warnings)):
                self._use(new)
        elif self.state is not State.UPDATED and not self.problems:
            held = self.weights or self._split(self._dense.data)
            if judge(held.wk)[0] or judge(held.gate)[0]:  # nobody wrote to it, or a sleep discarded it
                self._refuse(f"tensors of {WK} and {GATE}", "none of them, and uninitialized memory")
            else:
                self._commit(held, State.READY)

    def settle(self) -> None:
        """Ends a call of an update that has no end: uses what is complete, also one matrix, or refuses its layout."""
        if self._collector is None:
            return
        plan = self._collector.plan(self.number)
        if not plan.problems or self._collector.problems[self.number]:  # complete, or a tensor came twice
            self.finish()
            return
        side, other, held = ("wk", plan.gate, self.operands) if plan.wk.headers else ("gate", plan.wk, self.operands)
        one, shape = getattr(plan, side), getattr(held, side).shape
        if other.headers or not one.encoding or one.encoding.optional or one.shape != shape:
            return
        self.problems += [problem for problem in plan.problems if problem.subject.startswith(one.name)]
        matrix = None if self.problems else one.bind(self._tensors, self.problems, self.warnings)
        if matrix:
            self._drop()
            self._use(replace(held, **{side: matrix}))

    def copy_gate(self) -> Tensor:
        """[K, H] fp32, for an engine that computes the gate itself. Every load renews it."""
        self._gate_copy = torch.empty(self.shape[2], self.shape[1], dtype=torch.float32, device=self._device)
        return self._gate_copy.fill_(torch.nan)

    def abandon(self) -> None:
        """Drops the tensors and problems of the current load."""
        self.problems = []
        if self.state is State.COLLECTING:
            self._drop()

    def _drop(self) -> None:
        self._collector, self._tensors = None, {}
        self.state = State.EMPTY if self.layout is None else State.READY

    def _split(self, weight: Tensor) -> ProjectionWeights:
        return ProjectionWeights(*map(DenseMatrix, torch.split(weight, list(self.shape[:2]))))

    def _stored(self, new: ProjectionWeights) -> ProjectionWeights:
        return new.to_bf16() if self._to_bf16 or (self.layout is not None and self.weights is None) else new

    def _use(self, new: ProjectionWeights) -> None:
        if new.shape != self.shape:
            return self._refuse(f"(D, H, K) = {self.shape}, the model's shape", f"{new.shape}")
        new = self._stored(new)
        if self.weights is None and new.fused_weight is not None:
            self._dense.data.copy_(new.fused_weight)
        elif self.weights is None:
            self._replace_parameter(new)
        elif self.weights.matches(new):
            self.weights.copy_(new)
        else:
            expected = f"{self.layout} as in the first load, whose memory CUDA graphs and compiled code use"
            advice = "send that, or start vLLM with INDEXPROJ_VLLM=bf16 to accept any encoding in reloads"
            return self._refuse(expected, LAYOUT.format(*new.formats), advice)
        return self._commit(new, State.UPDATED)

    def _refuse(self, expected: str, found: str, advice: str = "") -> None:
        self.problems.append(Problem(self.name, "", expected, found, advice))

    def _commit(self, held: ProjectionWeights, state: State) -> None:
        self.layout, self.state = LAYOUT.format(*held.formats), state
        if self._gate_copy is not None:
            with torch.inference_mode():  # may write both inference tensors and others
                self._gate_copy.copy_(held.gate.dequantize().t())

    def _replace_parameter(self, new: ProjectionWeights) -> None:
        self.module._parameters.pop("weight", None)
        del self._dense  # frees its memory
        self.weights = new.map(lambda tensor: nn.Parameter(tensor, requires_grad=False))
        for prefix, matrix in ((WK, self.weights.wk), (GATE, self.weights.gate)):
            for attribute, tensor in zip(fields(matrix), matrix.tensors, strict=False):  # type: ignore[arg-type]
                is_first = tensor is self.weights.wk.tensors[0]  # LoRA layers read the device from `qweight`
                self.module.register_parameter("qweight" if is_first else f"{prefix}_{attribute.name}", tensor)
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

    def __init__(
        self, model: Any, names: Mapping[int, str], config: Mapping[str, Any], to_bf16: bool, batch_invariant: bool
    ) -> None:
        """Wraps load_weights of the model. names: layer index -> name of its wk_weights_proj. config: config.json."""
        self.state, self.batch_invariant, self._class = State.EMPTY, batch_invariant, type(model).__name__
        self.layers: dict[int, IndexerLayer] = {}
        parsed = Config.of(config)
        for number, name in sorted(names.items()):
            self.layers[number] = IndexerLayer(name, number, model.get_submodule(name), parsed, to_bf16)
        self.compile_key: dict[str, Any] = {}  # of the engine's cache; gets the formats
        self._num_hidden_layers = config.get("num_hidden_layers")
        self._reload: Tensor | None = None  # a meta parameter of the last reload
        self._load_weights, model.load_weights = model.load_weights, self.load_weights

    def load_weights(self, weights: Iterable[tuple[Any, ...]], *args: Any, **kwargs: Any) -> Any:
        """Takes the tensors of the projections. Raises CheckpointError if nothing ends the update, or finish does."""
        # The engine ends first loads, and reloads for which it puts new parameters on the meta device.
        parameters = (p for layer in self.layers.values() for p in layer.module.parameters(recurse=False))
        reload = next((parameter for parameter in parameters if parameter.is_meta), None)
        if reload is not None and reload is not self._reload:
            self._abandon()  # leftovers of an update
        self._reload = reload
        if self.state is State.READY:
            self.state = State.COLLECTING
        has_end = self.state is State.EMPTY or reload is not None
        try:
            with self._parameters_hidden():
                loaded = self._load_weights(self._others(weights), *args, **kwargs)
        except BaseException:
            self._abandon()
            self.take_updated()
            raise
        for layer in self.layers.values():
            if not has_end:
                layer.settle()
            if loaded is not None and layer.state is State.UPDATED:
                loaded.update(f"{layer.name}.{name}" for name, _ in layer.module.named_parameters(recurse=False))
        if not has_end:
            self.take_updated()
            self._raise_problems()
            self._log_warnings()
            if waiting := [number for number, layer in self.layers.items() if layer.state is State.COLLECTING]:
                LOGGER.warning("indexer layers %s keep their old weights until all tensors arrive", ranges(waiting))
        return loaded

    def finish(self) -> None:
        """Ends a load, and logs what runs after the first. Raises CheckpointError for all problems of all layers."""
        for layer in self.layers.values():
            layer.finish()
        self._raise_problems()
        if self.state is State.EMPTY:
            layouts = "; ".join(dict.fromkeys(str(layer.layout) for layer in self.layers.values()))
            layouts += ", batch-invariant" * self.batch_invariant
            version, count = importlib.metadata.version("indexproj"), len(self.layers)
            self.compile_key.setdefault("indexproj", {})[self._class] = f"{version}: {layouts}"
            LOGGER.info("indexproj %s runs %s indexer projections of %s: %s", version, count, self._class, layouts)
        self.state = State.READY
        self._log_warnings()

    def _log_warnings(self) -> None:
        log((warning for layer in self.layers.values() for warning in layer.warnings), LOGGER)
        for layer in self.layers.values():
            layer.warnings = []

    def take_updated(self) -> list[Any]:
        """Makes all UPDATED layers READY, and returns their modules."""
        updated = [layer for layer in self.layers.values() if layer.state is State.UPDATED]
        for layer in updated:
            layer.state = State.READY
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

    def _raise_problems(self) -> None:
        if problems := [problem for layer in self.layers.values() for problem in layer.problems]:
            self._abandon()
            raise CheckpointError(problems)

    def _abandon(self) -> None:
        for layer in self.layers.values():
            layer.abandon()

    @contextmanager
    def _parameters_hidden(self) -> Iterator[None]:
        """Hides the parameters from the engine, which would write to them or report them as not loaded."""
        hidden = {layer.module: layer.module._parameters for layer in self.layers.values()}
        for module in hidden:
            module._parameters = {}
        try:
            yield
        finally:
            for module, parameters in hidden.items():
                if module._parameters:  # registered meanwhile, to replace `weight`
                    parameters.pop("weight")
                module._parameters = {**parameters, **module._parameters}
