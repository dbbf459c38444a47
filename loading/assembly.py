"""The transaction that turns the tensors of one load into weights."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.weights import ProjectionWeights
from .headers import Header
from .layer import Pair, is_whole, plan_pair, unlike_most
from .names import GATE, WK, IndexerTensor, integer, parse
from .plan import DEFAULT_HEAD_DIM
from .problems import CheckpointError, Problem


@dataclass
class _Layer:
    """What one load has seen of a layer. The tensors are dropped once they are bound; the headers stay."""

    stem: str
    headers: dict[str, dict[str, Header]] = field(default_factory=lambda: defaultdict(dict))
    tensors: dict[str, Tensor] = field(default_factory=dict)
    is_bound: bool = False
    has_more: bool = False  # a tensor has come since it was bound
    weights: ProjectionWeights | None = None  # None, though bound, where the values are at fault

    def bind(self, pair: Pair) -> list[Problem]:
        self.weights, problems = pair.bind(self.tensors)
        self.is_bound = True
        self.tensors.clear()
        return problems


class Assembly:
    """Collects tensors in any order and over any number of calls: begin(), offer() for each, finish().

    Nothing comes out before finish(), and then everything or an error, in which case the weights of the last load stay
    as they are. What it keeps it copies, so a streamer may reuse its buffers. A layer is bound as soon as it is
    complete, and only INT4, where optional tensors may follow, at the end. One thread at a time may call it.

    Attributes:
        passed_over: layer -> number of its projection tensors in this load, for layers that were not asked for.
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
            layers: indices of the layers to load; tensors of other layers are neither kept nor an error.
            device: where the weights go.
            index_head_dim: D, to split `wk_weights_proj`.
            num_hidden_layers: index of the first of the `mtp_layers`; needed where there are tensors of such names.
        """
        self.passed_over: Counter[int] = Counter()
        self._wanted = frozenset(map(integer, layers))
        self._device = torch.device(device)
        self._index_head_dim = index_head_dim
        self._num_hidden_layers = num_hidden_layers
        self._live: dict[int, ProjectionWeights] = {}
        self._layers: dict[int, _Layer] | None = None
        self._problems: list[Problem] = []

    def begin(self) -> None:
        """Opens a load; of one that was left unfinished nothing stays."""
        self._layers, self._problems = {}, []
        self.passed_over.clear()

    def offer(self, name: str, tensor: Tensor, file: str = "") -> bool:
        """Takes a tensor if it belongs to the projection.

        Args:
            name: the full checkpoint name.
            tensor: its content, on any device; the caller may overwrite it afterwards.
            file: where it came from, for messages.

        Returns:
            True if the name is one of the projection's, of whatever layer: nobody else has to look at it.

        Raises:
            RuntimeError: no load is open.
        """
        layers = self._open_load("offer")
        parsed = parse(name)
        if parsed is None or parsed.matrix is None:
            return False
        number, header = parsed.layer(self._num_hidden_layers), Header.of(name, tensor, file)
        if number is None:
            expected = "num_hidden_layers to be given, behind which mtp_layers are counted"
            self._problems.append(Problem(name, file, expected, "None"))
        elif number not in self._wanted:
            self.passed_over[number] += 1
        else:
            layer = layers.setdefault(number, _Layer(parsed.stem))
            self._take(layer, parsed, header, tensor)
        return True

    @property
    def is_complete(self) -> bool:
        """True if a load is open that has every tensor of every layer asked for, so that none can follow."""
        layers = self._layers
        return layers is not None and all(n in layers and layers[n].is_bound for n in self._wanted)

    def finish(self) -> dict[int, ProjectionWeights]:
        """Closes the load.

        Returns:
            layer index -> weights, for every layer asked for. Where a later load brings weights of the same encoding
            and shapes, it is their values that change: the objects and the memory are those of the first load. They
            are written on the current stream, and nothing may be reading them meanwhile.

        Raises:
            CheckpointError: anything was missing, doubled, unknown, of a shape that does not fit or of values that are
                none; lists all of it.
            RuntimeError: no load is open.
        """
        layers, problems = self._open_load("finish"), self._problems
        self._layers = None
        for number in sorted(self._wanted):
            layer = layers.get(number)
            if layer is None:
                expected = f"{WK} and {GATE} of its indexer"
                problems.append(Problem(f"layer {number}", "", expected, "no tensor of them"))
                continue
            if layer.is_bound and not layer.has_more:
                continue
            pair = self._plan(layer)
            if pair.problems:
                problems += pair.problems
            elif not layer.is_bound:
                problems += layer.bind(pair)
        shapes = {number: layer.weights.shape for number, layer in layers.items() if layer.weights}
        for number, usual in unlike_most(shapes).items():
            expected = f"(D, H, K) = {usual}, as in most layers"
            problems.append(Problem(f"layer {number}", "", expected, f"{shapes[number]}"))
        if problems:
            raise CheckpointError(problems)
        for number in sorted(self._wanted):
            new, live = layers.pop(number).weights, self._live.get(number)
            assert new is not None
            if live is not None and live.matches(new):
                live.copy_(new)
            else:
                self._live[number] = new
        return dict(self._live)

    def _take(self, layer: _Layer, parsed: IndexerTensor, header: Header, tensor: Tensor) -> None:
        assert parsed.matrix is not None
        if parsed.stem != layer.stem:
            expected = f"all of layer {parsed.number} under {layer.stem}"
            self._problems.append(Problem(header.name, header.file, expected, str(header)))
            return
        # What comes to a layer that is bound is too much or of no use, and the headers show which in the end. The copy
        # comes first: nothing is noted of a tensor for which memory ran out.
        own = _own(tensor, self._device) if header.is_plain and not layer.is_bound else None
        first = layer.headers[parsed.matrix].setdefault(parsed.role, header)
        if first is not header:
            expected = f"one tensor in the role of {first.name}"
            self._problems.append(Problem(header.name, header.file, expected, f"a second one, {header}"))
        elif layer.is_bound:  # the headers show, in the end, if this one is too much
            layer.has_more = True
        elif own is not None:
            layer.tensors[header.name] = own
            if is_whole(layer.headers):
                pair = self._plan(layer)
                if not pair.problems and not pair.is_open:
                    self._problems += layer.bind(pair)

    def _plan(self, layer: _Layer) -> Pair:
        return plan_pair(layer.stem, layer.headers, self._index_head_dim)

    def _open_load(self, call: str) -> dict[int, _Layer]:
        if self._layers is None:
            raise RuntimeError(f"Assembly.{call}: no load is open; call begin() first")
        return self._layers


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)
