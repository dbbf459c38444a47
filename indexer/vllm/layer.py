"""What runs in place of vLLM's wk_weights_proj, and how vLLM's loading reaches it.

Imports vLLM, and is imported only when a model with an indexer is created.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from ...kernels import DenseMatrix, Fp4Matrix, Fp8Matrix, Matrix, ProjectionWeights, project
from ...loading import Assembly, CheckpointError, Problem
from ...loading.headers import Header
from ...loading.names import GATE, UNUSED, WK, parse
from ...loading.plan import ranges
from ...loading.values import unusable
from .plugin import LOGGER, layer_of


class IndexerMethod(LinearMethodBase):  # type: ignore[misc]
    """The linear method of one wk_weights_proj: what it holds and computes, while the module stays vLLM's own.

    Weights come through `offer`, or, where a loader knows nothing of checkpoints (dummy, sharded state), by being
    written to `layer.weight`, which is NaN until then. After loading, `layer.weight` [D + H, K] bf16 holds them if both
    matrices are dense; otherwise the layer has the tensors of the two matrices as parameters in its place. From then
    on the layout and the memory stay, whatever is loaded again: CUDA graphs and compiled code hold on to them.

    Attributes:
        name: of the module in its model.
        number: index of its layer, MTP layers behind the hidden ones.
        layer: the module.
        shape: (D, H, K).
        weights: the matrices, where they are not `layer.weight`.
        is_ready: True once there are values to compute with.
        is_fresh: True once a load has brought new values, until `IndexerModel.reloaded` asks.
    """

    def __init__(self, name: str, layer: Any, model: IndexerModel) -> None:
        d, h = layer.output_sizes
        self.name = name
        self.number = layer_of(name)
        self.shape: tuple[int, int, int] = (d, h, layer.input_size)
        self.weights: ProjectionWeights | None = None
        self.is_ready = self.is_fresh = False
        self.layer = layer
        self._model = model
        self._dense: nn.Parameter = layer.weight
        self._device = layer.weight.device
        self._dense.data.fill_(torch.nan)
        self._assembly: Assembly | None = None

    @property
    def is_waiting(self) -> bool:
        """True while some tensors of a load have come and others have to follow."""
        return self._assembly is not None

    @property
    def is_reloading(self) -> bool:
        """True while vLLM has put its parameters aside, from the beginning of a reload to its end."""
        return any(parameter.is_meta for parameter in self.layer.parameters(recurse=False))

    @property
    def parameter_names(self) -> list[str]:
        """Names of its parameters in the model."""
        return [f"{self.name}.{name}" for name, _ in self.layer.named_parameters(recurse=False)]

    @property
    def operands(self) -> ProjectionWeights:
        """The two matrices.

        Raises:
            RuntimeError: nothing has been loaded.
        """
        if not self.is_ready:
            raise RuntimeError(f"{self.name}: no weights have been loaded into it")
        if self.weights is not None:
            return self.weights
        # Made anew for every call, as offloading gives the parameter new memory.
        return self._split(self.layer.weight.data)

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: vLLM's own method has created `layer.weight`."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] bf16 or fp16 -> [..., D + H] in its dtype: k, and behind it the gate."""
        d, h, _ = self.shape
        out = x.new_empty((*x.shape[:-1], d + h))
        project(x, self.operands, out=out, batch_invariant=self._model.batch_invariant)
        return out

    def k_and_gate(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., K] -> k [..., D] in its dtype and gate [..., H] fp32, from one launch."""
        return project(x, self.operands, batch_invariant=self._model.batch_invariant)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Ends a load; vLLM calls this for one layer after the other.

        Raises:
            CheckpointError: layers of this model that lack tensors or hold bad ones, all of them at once.
        """
        if not self._model.is_finished:
            self._model.finish()
            self._model.reloaded()

    def offer(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor of the checkpoint; all that have come are put to use as soon as no other can follow.

        Raises:
            CheckpointError: no other can follow, and they are not right, or they had come already.
        """
        if self.is_fresh:
            header = Header.of(name, tensor, "")
            raise CheckpointError([Problem(name, "", "nothing more of a layer that is complete", str(header))])
        if self._assembly is None:
            d, hidden = self.shape[0], self._model.num_hidden_layers
            self._assembly = Assembly([self.number], self._device, index_head_dim=d, num_hidden_layers=hidden)
            self._assembly.begin()
        self._assembly.offer(name, tensor)
        if self._assembly.is_complete:
            self.commit()

    def commit(self) -> None:
        """Ends the load of this layer, of which tensors have come: its new weights come into use, or the old ones stay.

        Raises:
            CheckpointError: a tensor is missing or not right.
        """
        assert self._assembly is not None
        try:
            self._use(self._assembly.finish()[self.number])
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drops what has come of a load."""
        self._assembly = None

    def settle(self) -> None:
        """Ends a load in which no tensor of this layer has come: what it holds already stays.

        Raises:
            CheckpointError: those are no weights: nobody has filled `layer.weight`, or a sleep has discarded them.
        """
        held = self.weights or self._split(self._dense.data)  # vLLM has put `layer.weight` aside during a reload
        if unusable(held.wk) or unusable(held.gate):
            found = "none of them, and memory that nobody has filled"
            raise CheckpointError([Problem(self.name, "", f"tensors of {WK} and {GATE}", found)])
        self.is_ready = True

    def _split(self, weight: Tensor) -> ProjectionWeights:
        d = self.shape[0]
        return ProjectionWeights(DenseMatrix(weight[:d]), DenseMatrix(weight[d:]))

    def _use(self, new: ProjectionWeights) -> None:
        if new.shape != self.shape:
            expected = f"(D, H, K) = {self.shape}, as the model has it"
            raise CheckpointError([Problem(self.name, "", expected, f"{new.shape}")])
        if self._model.to_bf16 or (self.is_ready and self.weights is None):
            new = new.to_bf16()
        if self.weights is not None:
            if not self.weights.matches(new):
                raise self._another_layout(new)
            self.weights.copy_(new)
        elif new.fused_weight is not None:
            self._dense.data.copy_(new.fused_weight)
        else:
            self._replace_parameter(new)
        self.is_ready = self.is_fresh = True

    def _replace_parameter(self, new: ProjectionWeights) -> None:
        self.layer._parameters.pop("weight", None)
        del self._dense  # and with it the memory
        self.weights = new.map(lambda tensor: nn.Parameter(tensor, requires_grad=False))
        for prefix, matrix in ((WK, self.weights.wk), (GATE, self.weights.gate)):
            for attribute, tensor in zip(fields(matrix), matrix.tensors, strict=False):  # type: ignore[arg-type]
                # vLLM's LoRA layers ask a quantized layer for a tensor of that name, to learn the device.
                is_first = tensor is self.weights.wk.tensors[0]
                name = "qweight" if is_first else f"{prefix}_{attribute.name}"
                self.layer.register_parameter(name, tensor)

    def _another_layout(self, new: ProjectionWeights) -> CheckpointError:
        assert self.weights is not None
        expected = f"{describe(self.weights)}, as loaded first, whose memory CUDA graphs and compiled code hold on to"
        advice = "send that, or start vLLM with INDEXPROJ_VLLM=bf16, which takes any encoding later"
        return CheckpointError([Problem(self.name, "", expected, describe(new), advice)])


class IndexerModel:
    """The projections of one model, and its load_weights without their tensors.

    Attributes:
        methods: layer index -> method.
        num_hidden_layers: behind which HY-V4's `mtp_layers` count.
        is_loaded: True once a load has ended well.
        is_finished: True from the end of a load to the beginning of the next one.
        to_bf16: True to decode all weights to bf16, so that later loads may bring any encoding.
        batch_invariant: True if a row has to have the same bits in any batch.
    """

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, Any],
        additional_config: dict[str, Any],
        num_hidden_layers: int | None,
        *,
        to_bf16: bool,
        batch_invariant: bool,
    ) -> None:
        """Takes over.

        Args:
            model: as vLLM has created it.
            layers: name in the model -> its wk_weights_proj.
            additional_config: vLLM's, by which it tells apart the compiled code that it keeps on disk.
        """
        self.num_hidden_layers = num_hidden_layers
        self.to_bf16 = to_bf16
        self.batch_invariant = batch_invariant
        self.methods: dict[int, IndexerMethod] = {}
        self._kind = type(model).__name__
        self.is_loaded = False
        self.is_finished = False
        self._additional_config = additional_config
        self._problems: dict[int, list[Problem]] = {}
        for name, layer in layers.items():
            method = layer.quant_method = IndexerMethod(name, layer, self)
            self.methods[method.number] = method
        self._load_weights = model.load_weights
        model.load_weights = self.load_weights

    def load_weights(self, weights: Iterable[tuple[Any, ...]], *args: Any, **kwargs: Any) -> Any:
        """vLLM's own, for all tensors but those of the projections.

        Raises:
            CheckpointError: a projection's tensors are complete and not right. Those that are incomplete wait for more
                calls, until vLLM processes the weights.
        """
        # Of a load that is neither the first one nor a reload in its own way vLLM does not tell the end.
        has_end = not self.is_loaded or any(method.is_reloading for method in self.methods.values())
        self.is_finished = False
        try:
            with self._parameters_hidden():
                loaded = self._load_weights(self._others(weights), *args, **kwargs)
        except BaseException:
            self._abandon()
            self.reloaded()
            raise
        if loaded is not None:
            loaded.update(
                name for method in self.methods.values() if method.is_fresh for name in method.parameter_names
            )
        if not has_end:
            self.reloaded()
            self._raise_problems()
            if waiting := [number for number, method in self.methods.items() if method.is_waiting]:
                message = (
                    "indexer projections of layers %s keep their old weights until the rest of their tensors comes"
                )
                LOGGER.warning(message, ranges(waiting))
        return loaded

    def finish(self) -> None:
        """Ends a load: what is complete comes into use, what is not is refused.

        Raises:
            CheckpointError: every layer that lacks tensors or holds bad ones.
        """
        for method in self.methods.values():
            with self._problems_kept(method):
                if method.is_waiting:
                    method.commit()
                elif method.number not in self._problems:
                    method.settle()
        self._raise_problems()
        self.is_finished = True
        if not self.is_loaded:
            self.is_loaded = True
            layouts = "; ".join(dict.fromkeys(describe(method.operands) for method in self.methods.values()))
            layouts += ", batch-invariant" * self.batch_invariant
            version = importlib.metadata.version("indexproj")
            self._additional_config.setdefault("indexproj", {})[self._kind] = f"{version}: {layouts}"
            LOGGER.info(
                "indexproj %s runs %d indexer projections of %s: %s", version, len(self.methods), self._kind, layouts
            )

    def reloaded(self) -> list[Any]:
        """The layers that have new values since the last call."""
        fresh = [method for method in self.methods.values() if method.is_fresh]
        for method in fresh:
            method.is_fresh = False
        return [method.layer for method in fresh]

    def _others(self, weights: Iterable[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
        for item in weights:
            name, tensor = item[:2]
            parsed = parse(name) if ".indexer." in name else None
            if parsed is None or parsed.matrix is None:
                yield item
                continue
            # A layer may be another pipeline rank's, another model's (MTP), or without an indexer of its own.
            number = parsed.layer(self.num_hidden_layers)
            if number is not None and number in self.methods and parsed.role != UNUSED:
                with self._problems_kept(self.methods[number]):
                    self.methods[number].offer(name, tensor)

    @contextmanager
    def _problems_kept(self, method: IndexerMethod) -> Iterator[None]:
        """Lets a load go on after an error, so that all of them are told at once."""
        try:
            yield
        except CheckpointError as error:
            self._problems.setdefault(method.number, []).extend(error.problems)

    def _raise_problems(self) -> None:
        if self._problems:
            problems = [problem for number in sorted(self._problems) for problem in self._problems[number]]
            self._abandon()
            raise CheckpointError(problems)

    def _abandon(self) -> None:
        self._problems = {}
        for method in self.methods.values():
            method.abandon()

    @contextmanager
    def _parameters_hidden(self) -> Iterator[None]:
        """Keeps vLLM from waiting for parameters that it does not load, and from writing to them."""
        layers = [method.layer for method in self.methods.values()]
        hidden = [layer._parameters for layer in layers]
        for layer in layers:
            layer._parameters = {}
        try:
            yield
        finally:
            for layer, parameters in zip(layers, hidden, strict=True):
                if layer._parameters:  # registered meanwhile, in place of `weight`
                    parameters.pop("weight")
                layer._parameters = {**parameters, **layer._parameters}


def describe(weights: ProjectionWeights) -> str:
    """The layouts of the two matrices, for messages."""
    return f"wk in {_layout(weights.wk)}, weights_proj in {_layout(weights.gate)}"


def _layout(matrix: Matrix) -> str:
    if isinstance(matrix, Fp8Matrix | Fp4Matrix):
        return (
            f"{'FP8' if isinstance(matrix, Fp8Matrix) else 'FP4'} with a scale per {'x'.join(map(str, matrix.group))}"
        )
    return "BF16"
