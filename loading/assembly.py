"""Turns a stream of tensors into weights, all or nothing."""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernels.weights import ProjectionWeights
from .headers import DTYPES, Header
from .layer import DEFAULT_HEAD_DIM, Collector, LayerPlan, check_alike, own
from .names import GATE, WK, parse
from .problems import CheckpointError, Problem


class Assembly:
    """Collects tensors in any order and over any number of calls: begin(), offer() each tensor, finish().

    finish() returns the weights of all layers or raises; only then do the weights of the last load change. Tensors are
    copied, so a streamer may reuse its buffers. A layer is bound once it is complete, and with INT4, where optional
    tensors may follow, by finish(). Not thread-safe.

    Attributes:
        passed_over: layer -> number of its projection tensors in this load, for layers outside `layers`.
    """

    def __init__(
        self,
        layers: Iterable[int],
        device: str | torch.device = "cpu",
        *,
        index_head_dim: int = DEFAULT_HEAD_DIM,
        num_hidden_layers: int | None = None,
    ) -> None:
        """
        Args:
            layers: layers to load; tensors of other layers are counted and ignored.
            device: device of the weights.
            index_head_dim: D, to split `wk_weights_proj`.
            num_hidden_layers: index of the first MTP layer; needed for tensors named `mtp_layers`.
        """
        self.passed_over: Counter[int] = Counter()
        self._wanted = frozenset(map(operator.index, layers))
        self._device = torch.device(device)
        self._index_head_dim = index_head_dim
        self._num_hidden_layers = num_hidden_layers
        self._live: dict[int, ProjectionWeights] = {}
        self._collector: Collector | None = None
        self._tensors: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)  # layer -> name -> tensor, until bound
        self._bound: dict[int, ProjectionWeights | None] = {}  # None for bad layers
        self._problems: list[Problem] = []  # bad values

    def begin(self) -> None:
        """Opens a load and drops an unfinished one."""
        self._collector = Collector(self._index_head_dim, self._num_hidden_layers)
        self._tensors.clear()
        self._bound, self._problems = {}, []
        self.passed_over.clear()

    def offer(self, name: str, tensor: Tensor, file: str = "") -> bool:
        """Takes a tensor if it belongs to the projection.

        Args:
            name: full name in the checkpoint.
            tensor: on any device; may be overwritten afterwards.
            file: where it came from, for messages.

        Returns:
            True if the name is one of the projection, in any layer: no one else needs it.

        Raises:
            RuntimeError: no load is open.
        """
        collector = self._open_load("offer")
        parsed = parse(name)
        if parsed is None or parsed.matrix is None:
            return False
        number = collector.number(parsed)
        if number not in self._wanted:
            if number is not None:
                self.passed_over[number] += 1
            return True
        header = Header.of(name, tensor, file)
        # Nothing needs a tensor that comes once its layer is bound; finish() says if it is an error.
        is_bound = number in self._bound
        is_needed = not is_bound and header.dtype in DTYPES.values()
        # Copy first: if memory runs out, the load is as it was before the offer.
        copy = own(tensor, self._device) if is_needed else None
        collector.add(number, parsed, header)
        if copy is not None:
            self._tensors[number][name] = copy
        if not is_bound and collector.is_complete(number):
            self._bind(collector.plan(number))
        return True

    def _bind(self, plan: LayerPlan) -> None:
        tensors = self._tensors.pop(plan.layer, {})
        self._bound[plan.layer] = None if plan.problems else plan.bind(tensors, self._problems)

    @property
    def is_complete(self) -> bool:
        """True if a load is open that needs no more tensors."""
        return self._collector is not None and self._wanted <= self._bound.keys()

    def finish(self) -> dict[int, ProjectionWeights]:
        """Closes the load.

        Returns:
            layer -> weights. If encodings and shapes are those of the previous load, its objects and memory are reused
            and the new values are copied in on the current stream; nothing may read them meanwhile.

        Raises:
            CheckpointError: lists all tensors that are missing, duplicate, unknown, misshapen or with bad values.
            RuntimeError: no load is open.
        """
        collector = self._open_load("finish")
        self._collector = None
        plans, problems = collector.plans(), collector.problems[None]
        check_alike(plans)
        for number in sorted(self._wanted):
            if number not in plans:
                problems.append(Problem(f"layer {number}", "", f"{WK} and {GATE} of its indexer", "no tensor of them"))
                continue
            problems += plans[number].problems
            if number not in self._bound:
                self._bind(plans[number])
        problems += self._problems
        if problems:
            raise CheckpointError(problems)
        for number in sorted(self._wanted):
            new, live = self._bound.pop(number), self._live.get(number)
            assert new is not None
            if live is not None and live.matches(new):
                live.copy_(new)
            else:
                self._live[number] = new
        return dict(self._live)

    def _open_load(self, call: str) -> Collector:
        if self._collector is None:
            raise RuntimeError(f"Assembly.{call}: no load is open; call begin() first")
        return self._collector
