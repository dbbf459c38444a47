"""The projections of one model in an engine: sorts what load_weights gets. Independent of the engine."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...loading import CheckpointError
from ...loading.names import UNUSED, parse
from ...loading.plan import ranges
from .layer import IndexerLayer, State

LOGGER = logging.getLogger("vllm.indexproj")


class IndexerModel:
    """All projections of one model: layers is layer index -> IndexerLayer."""

    def __init__(
        self, model: Any, names: Mapping[int, str], num_hidden_layers: int | None, to_bf16: bool, batch_invariant: bool
    ) -> None:
        """Wraps load_weights of the model.

        Args:
            names: layer index -> name of its wk_weights_proj in the model.
            to_bf16: decode all weights to bf16, so that reloads accept any encoding.
        """
        self.state, self.batch_invariant, self._class = State.EMPTY, batch_invariant, type(model).__name__
        self.layers: dict[int, IndexerLayer] = {}
        for number, name in sorted(names.items()):
            module = model.get_submodule(name)
            self.layers[number] = IndexerLayer(name, number, module, num_hidden_layers, to_bf16)
        self.compile_key: dict[str, Any] = {}  # of the engine's cache; gets the formats
        self._num_hidden_layers = num_hidden_layers
        self._reload: Tensor | None = None  # a meta parameter of the last reload
        self._load_weights, model.load_weights = model.load_weights, self.load_weights

    def load_weights(self, weights: Iterable[tuple[Any, ...]], *args: Any, **kwargs: Any) -> Any:
        """Takes the tensors of the projections, and passes all others to the engine's own load_weights.

        Raises CheckpointError for complete layers with wrong tensors if nothing ends this update, else `finish` does.
        """
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
        if not has_end:
            for layer in self.layers.values():
                layer.settle()
        if loaded is not None:
            for layer in self._in_state(State.UPDATED):
                loaded.update(f"{layer.name}.{name}" for name, _ in layer.module.named_parameters(recurse=False))
        if not has_end:
            self.take_updated()
            self._raise_problems()
            if waiting := [layer.number for layer in self._in_state(State.COLLECTING)]:
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

    def take_updated(self) -> list[Any]:
        """Makes all UPDATED layers READY, and returns their modules."""
        updated = self._in_state(State.UPDATED)
        for layer in updated:
            layer.state = State.READY
        return [layer.module for layer in updated]

    def _in_state(self, state: State) -> list[IndexerLayer]:
        return [layer for layer in self.layers.values() if layer.state is state]

    def _others(self, weights: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        for item in weights:
            name, tensor = item[:2]
            part = parse(name) if ".indexer." in name else None
            if part is None or part.matrix is None:
                yield item
                continue
            # Passed over: layers of other pipeline ranks or models (MTP), and layers that share another one's choice.
            number = part.layer(self._num_hidden_layers)
            if number is not None and number in self.layers and part.role != UNUSED:
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
