"""Turns a stream of tensors into weights, all or nothing."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..kernels.weights import ProjectionWeights
from .config import Config
from .headers import GATE, UNUSED, WK, parse
from .layer import Collector, number_of, plan_layers, real_device
from .problems import CheckpointError, Problem, log


class Assembly:
    """Collects tensors in any order and over any number of calls: begin(), offer() each tensor, finish().

    finish() returns the weights of all layers or raises; only then do the weights of the last load change. Tensors are
    copied, so a streamer may reuse its buffers. Not thread-safe.

    Args:
        layers: layers to load; tensors of other layers are ignored.
        device: device of the weights.
        config: content of config.json: its sizes, among them index_head_dim, to split `wk_weights_proj`, and
            num_hidden_layers, to number `mtp_layers` and `mtp`; and its quantization_config, which can refuse a load.

    Attributes:
        warnings: of the current or last load: odd or rounded values, and layers whose weights are new objects.
    """

    def __init__(
        self, layers: Iterable[int], device: str | torch.device = "cpu", config: Mapping[str, Any] | None = None
    ) -> None:
        self.warnings: list[Problem] = []
        self._wanted = sorted(set(map(operator.index, layers)))
        self._device = real_device(device)
        self._config = Config.of({} if config is None else config)
        self._live: dict[int, ProjectionWeights] = {}
        self._collectors: dict[int, Collector] | None = None  # by layer; None if no load is open
        self._bound: dict[int, ProjectionWeights] = {}
        self._problems: list[Problem] = []  # tensors of no layer, and bad values

    def begin(self) -> None:
        """Opens a load and drops an unfinished one."""
        self._collectors, self._bound, self._problems, self.warnings = {}, {}, [], []

    def offer(self, name: str, tensor: Tensor, file: str = "") -> bool:
        """Takes a tensor, on any device, if it belongs to the projection. file is where it came from, for messages.

        Returns True if the full name is one of the projection, in any layer: no one else needs it. Raises RuntimeError
        if no load is open, and TypeError for anything but a tensor.
        """
        collectors = self._open_load("offer")
        parsed = parse(name)
        if parsed is None or parsed.matrix is None:
            return parsed is not None and parsed.role == UNUSED
        number = number_of(parsed, self._config, self._problems)
        if number is not None and number in self._wanted:
            collector = collectors.get(number) or Collector(number, parsed, self._config)
            collector.offer(parsed, tensor, file, self._device)
            collectors[number] = collector  # unless the offer failed
        return True

    def finish(self) -> dict[int, ProjectionWeights]:
        """Closes the load, and logs `warnings` as one.

        Returns:
            layer -> weights. If encodings and shapes are those of the previous load, its objects and memory are reused
            and the new values are copied in on the current stream; nothing may read them meanwhile. Otherwise they are
            new objects, and a warning names their layers: CUDA graphs that hold the old ones must be captured again.

        Raises:
            CheckpointError: lists all tensors that are missing, duplicate, unknown or misshapen, and in layers without
                these, all with bad values.
            RuntimeError: no load is open.
        """
        collectors = self._open_load("finish")
        plans, problems = plan_layers(collectors), [*self._config.problems, *self._problems]
        for number in self._wanted:
            if number not in plans:
                problems.append(Problem(f"layer {number}", "", f"{WK} and {GATE} of its indexer", "no tensor of them"))
                continue
            problems += plans[number].problems
            tensors = collectors[number].tensors
            if not plans[number].problems and tensors:
                faults: list[Problem] = []
                warnings: list[Problem] = []
                if weights := plans[number].bind(tensors, faults, warnings):
                    self._bound[number] = weights
                tensors.clear()  # before the next layer, to save memory
                problems += faults
                self._problems += faults  # only now: if memory ran out, they come again
                self.warnings += warnings
        self._collectors = None  # only now: if memory ran out before, finish() can be called again
        if problems:
            raise CheckpointError(problems)
        for number, new in self._bound.items():
            live = self._live.get(number)
            if live is not None and live.matches(new):
                live.copy_(new)
                continue
            self._live[number] = new
            if live is not None:
                expected, found = (f"{', '.join(map(str, each.formats))} {each.shape}" for each in (live, new))
                advice = "the weights are new objects: capture CUDA graphs again"
                self.warnings.append(Problem(f"layer {number}", "", f"{expected} as before", found, advice))
        log(self.warnings)
        self._bound = {}
        return dict(self._live)

    def _open_load(self, call: str) -> dict[int, Collector]:
        if self._collectors is None:
            raise RuntimeError(f"Assembly.{call}: no load is open; call begin() first")
        return self._collectors
