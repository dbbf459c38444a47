"""The projections of one vLLM model: the linear method that computes them and the load_weights that loads them.

Imports vLLM, so it is imported only when a model with an indexer is created.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from vllm import envs
from vllm.model_executor.layers.linear import LinearMethodBase

from ...kernels import project
from ...loading import CheckpointError
from ...loading.names import UNUSED, parse
from ...loading.problems import ranges, summarize
from .layer import IndexerLayer, State

LOGGER = logging.getLogger("vllm.indexproj")


class IndexerMethod(LinearMethodBase):  # type: ignore[misc]
    """The linear method of one wk_weights_proj."""

    def __init__(self, layer: IndexerLayer, model: IndexerModel) -> None:
        self._layer, self._model = layer, model

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `layer.weight` exists already."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] bf16 or fp16 -> [..., D + H] in x's dtype: k, then the gate."""
        d, h, _ = self._layer.shape
        out = x.new_empty((*x.shape[:-1], d + h))
        project(x, self._layer.operands, out=out, batch_invariant=self._model.batch_invariant)
        return out

    def k_and_gate(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., K] -> k [..., D] in x's dtype and gate [..., H] fp32, in one launch."""
        return project(x, self._layer.operands, batch_invariant=self._model.batch_invariant)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Ends the load of the whole model, see `IndexerModel.finish`. vLLM calls this for every layer."""
        if self._model.state is not State.READY:
            self._model.finish()
            self._model.take_updated()


class IndexerModel:
    """All projections of one model. `layers` maps a layer index to its IndexerLayer."""

    def __init__(
        self, model: Any, names: Mapping[int, str], vllm_config: Any, model_config: Any, to_bf16: bool
    ) -> None:
        """Replaces the linear methods of the projections and wraps load_weights, after reading all configs.

        Args:
            names: layer index -> name of its wk_weights_proj in the model.
            to_bf16: decode all weights to bf16, so that reloads accept any encoding.
        """
        self.state = State.EMPTY
        self.batch_invariant: bool = envs.VLLM_BATCH_INVARIANT
        self.layers: dict[int, IndexerLayer] = {}
        self._class = type(model).__name__
        self._additional_config: dict[str, Any] = vllm_config.additional_config  # part of vLLM's compile cache key
        self._num_hidden_layers = getattr(model_config.hf_text_config, "num_hidden_layers", None)
        config = {"num_hidden_layers": self._num_hidden_layers, **_quantization(model_config)}
        # A rank that joins gets dummy weights, then the tensors of another rank in order: both need the same layout.
        to_bf16 = to_bf16 or vllm_config.parallel_config.enable_elastic_ep
        for number, name in sorted(names.items()):
            module = model.get_submodule(name)
            layer = self.layers[number] = IndexerLayer(name, number, module, config, to_bf16)
            module.quant_method = IndexerMethod(layer, self)
        self._load_weights = model.load_weights
        model.load_weights = self.load_weights

    def load_weights(self, weights: Iterable[tuple[Any, ...]], *args: Any, **kwargs: Any) -> Any:
        """Takes the tensors of the projections, and passes all others to vLLM's own load_weights.

        Raises CheckpointError for complete layers with wrong tensors if nothing ends this update, else `finish` does.
        """
        # vLLM ends first loads, and reloads for which it puts the parameters on the meta device.
        parameters = (p for layer in self.layers.values() for p in layer.module.parameters(recurse=False))
        has_end = self.state is State.EMPTY or any(parameter.is_meta for parameter in parameters)
        if self.state is State.READY:
            self.state = State.COLLECTING
        try:
            with self._parameters_hidden():
                loaded = self._load_weights(self._others(weights), *args, **kwargs)
        except BaseException:
            self._abandon()
            self.take_updated()
            raise
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
            version = importlib.metadata.version("indexproj")
            self._additional_config.setdefault("indexproj", {})[self._class] = f"{version}: {layouts}"
            what = f"{len(self.layers)} indexer projections of {self._class}"
            LOGGER.info("indexproj %s runs %s: %s", version, what, layouts)
            if lines := summarize(warning for layer in self.layers.values() for warning in layer.warnings):
                LOGGER.warning("%s", "\n".join(lines))
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
            parsed = parse(name) if ".indexer." in name else None
            if parsed is None or parsed.matrix is None:
                yield item
                continue
            # Passed over: layers of other pipeline ranks or models (MTP), and layers that share another one's choice.
            number = parsed.layer(self._num_hidden_layers)
            if number is not None and number in self.layers and parsed.role not in UNUSED:
                self.layers[number].offer(name, tensor)

    def _raise_problems(self) -> None:
        if problems := [problem for layer in self.layers.values() for problem in layer.problems]:
            self._abandon()
            raise CheckpointError(problems)

    def _abandon(self) -> None:
        for layer in self.layers.values():
            layer.abandon()

    @contextmanager
    def _parameters_hidden(self) -> Iterator[None]:
        """Hides the parameters from vLLM's load_weights, which would write to them or report them as not loaded."""
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


def _quantization(model_config: Any) -> dict[str, Any]:
    """The quantization_config of a model, from config.json or its text_config."""
    for name in ("hf_config", "hf_text_config"):
        value = getattr(getattr(model_config, name, None), "quantization_config", None)
        if value is not None:
            return {"quantization_config": value.to_dict() if hasattr(value, "to_dict") else value}
    return {}
