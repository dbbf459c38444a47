"""The weights of one indexer projection in an engine, through loads and reloads. Independent of the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels import DenseMatrix, ProjectionWeights
from ...loading import Assembly, CheckpointError, Problem
from ...loading.headers import Header
from ...loading.names import GATE, WK
from ...loading.values import judge


class State(Enum):
    """The state of a layer, and the state that each call leaves.

    | state      | computes with          | offer      | finish  | abandon        | take_updated |
    |------------|------------------------|------------|---------|----------------|--------------|
    | EMPTY      | raises                 | COLLECTING | READY   | EMPTY          | EMPTY        |
    | COLLECTING | old weights, or raises | COLLECTING | UPDATED | READY or EMPTY | COLLECTING   |
    | UPDATED    | new weights            | a problem  | UPDATED | UPDATED        | READY        |
    | READY      | its weights            | COLLECTING | READY   | READY          | READY        |

    COLLECTING goes back to READY if the layer has older weights, else to EMPTY. `offer` also finishes once no other
    tensor can follow. If `finish` finds a problem, it leaves the state that `abandon` leaves.
    A model is EMPTY until its first load ends, COLLECTING from load_weights to the end of a later load, else READY.
    """

    EMPTY = auto()
    COLLECTING = auto()
    UPDATED = auto()
    READY = auto()


class IndexerLayer:
    """The weights of one wk_weights_proj, whose module stays the engine's own.

    Weights come through `offer`. Loaders that do not read checkpoints (dummy, sharded state) write to `module.weight`,
    which is NaN before. Once loaded, two dense matrices are in `module.weight` [D + H, K] bf16; otherwise their tensors
    are parameters in its place. Layout and memory then stay, because CUDA graphs and compiled code hold pointers.

    Attributes:
        layout: the formats in words, None before the first load. `operands` reads this and not the state, because
            compiled code guards on what it reads.
        weights: the matrices, unless they are in `module.weight`.
        problems: what is wrong with the current load.
        warnings: odd or rounded values of the last load.
    """

    def __init__(self, name: str, number: int, module: Any, config: Mapping[str, Any], to_bf16: bool) -> None:
        d, h = module.output_sizes
        self.name, self.number, self.module = name, number, module
        self.shape: tuple[int, int, int] = (d, h, module.weight.shape[1])  # (D, H, K)
        self.state = State.EMPTY
        self.layout: str | None = None
        self.weights: ProjectionWeights | None = None
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []
        self._config, self._to_bf16 = config, to_bf16
        self._assembly: Assembly | None = None
        self._device = module.weight.device
        self._dense: nn.Parameter = module.weight  # during a reload, vLLM puts another one into the module
        self._dense.data.fill_(torch.nan)

    @property
    def operands(self) -> ProjectionWeights:
        """The two matrices. Raises RuntimeError if nothing has been loaded."""
        if self.layout is None:
            raise RuntimeError(f"{self.name}: no weights have been loaded")
        return self.weights or self._split(self.module.weight.data)  # not cached: offloading moves the parameter

    def offer(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor of the checkpoint. Finishes if no other can follow."""
        if self.state is State.UPDATED:
            header = Header.of(name, tensor, "")
            self.problems.append(Problem(name, "", "no more tensors for a complete layer", str(header)))
            return
        if self._assembly is None:
            self._assembly = Assembly([self.number], self._device, index_head_dim=self.shape[0], config=self._config)
            self._assembly.begin()
            self.state = State.COLLECTING
        self._assembly.offer(name, tensor)
        if self._assembly.is_complete:
            self.finish()

    def finish(self) -> None:
        """Ends a load: uses the collected tensors, or checks the values that the layer holds if none came."""
        assembly, self._assembly = self._assembly, None
        try:
            if assembly is not None:
                self.state = self._idle()
                self._use(assembly.finish(log_warnings=False)[self.number])
                self.state, self.warnings = State.UPDATED, assembly.warnings
            elif self.state is not State.UPDATED and not self.problems:
                held = self.weights or self._split(self._dense.data)
                if judge(held.wk)[0] or judge(held.gate)[0]:  # nobody wrote to it, or a sleep discarded it
                    expected, found = f"tensors of {WK} and {GATE}", "none of them, and uninitialized memory"
                    raise CheckpointError([Problem(self.name, "", expected, found)])
                self.layout, self.state = describe(held), State.READY
        except CheckpointError as error:
            self.problems += error.problems

    def abandon(self) -> None:
        """Drops the tensors and problems of the current load."""
        self.problems, self._assembly = [], None
        if self.state is State.COLLECTING:
            self.state = self._idle()

    def _idle(self) -> State:
        return State.EMPTY if self.layout is None else State.READY

    def _split(self, weight: Tensor) -> ProjectionWeights:
        d = self.shape[0]
        return ProjectionWeights(DenseMatrix(weight[:d]), DenseMatrix(weight[d:]))

    def _use(self, new: ProjectionWeights) -> None:
        if new.shape != self.shape:
            expected = f"(D, H, K) = {self.shape}, the model's shape"
            raise CheckpointError([Problem(self.name, "", expected, f"{new.shape}")])
        if self._to_bf16 or (self.layout is not None and self.weights is None):
            new = new.to_bf16()
        if self.weights is not None:
            if not self.weights.matches(new):
                expected = f"{self.layout} as in the first load, whose memory CUDA graphs and compiled code use"
                advice = "send that, or start vLLM with INDEXPROJ_VLLM=bf16 to accept any encoding in reloads"
                raise CheckpointError([Problem(self.name, "", expected, describe(new), advice)])
            self.weights.copy_(new)
        elif new.fused_weight is not None:
            self._dense.data.copy_(new.fused_weight)
        else:
            self._replace_parameter(new)
        self.layout = describe(new)

    def _replace_parameter(self, new: ProjectionWeights) -> None:
        self.module._parameters.pop("weight", None)
        del self._dense  # frees its memory
        self.weights = new.map(lambda tensor: nn.Parameter(tensor, requires_grad=False))
        for prefix, matrix in ((WK, self.weights.wk), (GATE, self.weights.gate)):
            for attribute, tensor in zip(fields(matrix), matrix.tensors, strict=False):  # type: ignore[arg-type]
                # vLLM's LoRA layers read the device of a quantized layer from its `qweight`.
                is_first = tensor is self.weights.wk.tensors[0]
                self.module.register_parameter("qweight" if is_first else f"{prefix}_{attribute.name}", tensor)


def describe(weights: ProjectionWeights) -> str:
    """The formats of the two matrices, for messages."""
    return f"wk in {weights.wk.format}, weights_proj in {weights.gate.format}"
