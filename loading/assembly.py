"""The transaction that turns the tensors of one load into weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.matrix import Matrix, ProjectionWeights
from .checkpoint import Header
from .encodings import recognise
from .names import MATRICES, parse
from .problems import CheckpointError, Problem


@dataclass
class _Load:
    """What one open load has seen. A matrix is keyed by its name up to the role."""

    headers: defaultdict[str, dict[str, Header]] = field(default_factory=lambda: defaultdict(dict))
    pending: defaultdict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    bound: dict[str, Matrix] = field(default_factory=dict)
    stems: dict[int, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


class Assembly:
    """Collects tensors in any order and over any number of calls: begin(), offer() for each, finish().

    Nothing comes out before finish(), and then everything or an error. What it keeps it copies, so a streamer may reuse
    its buffers; a matrix is bound as soon as it is complete.
    """

    def __init__(self, layers: Iterable[int], device: str | torch.device = "cpu") -> None:
        """
        Args:
            layers: indices of the layers to load; tensors of other layers are neither kept nor an error.
            device: where the weights go.
        """
        self._layers = frozenset(layers)
        self._device = torch.device(device)
        self._load: _Load | None = None

    def begin(self) -> None:
        """Opens a load; one that was left unfinished is dropped."""
        self._load = _Load()

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
        load = self._open_load("offer")
        parsed = parse(name)
        if parsed is None or parsed.matrix is None:
            return False
        if parsed.layer not in self._layers:
            return True
        header = Header.of(tensor, file)
        matrix = f"{parsed.stem}{parsed.matrix}"
        if load.stems.setdefault(parsed.layer, parsed.stem) != parsed.stem or parsed.matrix not in MATRICES:
            expected = f"{' or '.join(MATRICES)} under {load.stems[parsed.layer]}"
            load.problems.append(Problem(name, file, expected, str(header)))
        elif parsed.role in load.headers[matrix]:
            load.problems.append(Problem(name, file, "one arrival in a load", "a second one"))
        elif matrix in load.bound:
            load.problems.append(Problem(name, file, "nothing beyond a matrix that is complete", str(header)))
        else:
            load.pending[matrix][parsed.role] = _own(tensor, self._device)
            load.headers[matrix][parsed.role] = header
            _bind_if_complete(load, matrix)
        return True

    def finish(self) -> dict[int, ProjectionWeights]:
        """Closes the load.

        Returns:
            layer index -> weights, for every layer asked for.

        Raises:
            CheckpointError: anything was missing, doubled, unknown, of a shape that does not fit or of values that are
                none; lists all of it.
            RuntimeError: no load is open.
        """
        load = self._open_load("finish")
        self._load = None
        for layer in sorted(self._layers):
            stem = load.stems.get(layer)
            if stem is None:
                found = "no tensor of them"
                load.problems.append(Problem(f"layer {layer}", "", "wk and weights_proj of its indexer", found))
                continue
            wk, gate = f"{stem}wk", f"{stem}weights_proj"
            for matrix in (wk, gate):
                if matrix not in load.bound:
                    load.problems += recognise(matrix, load.headers[matrix])[1]
            k_of = {matrix: load.bound[matrix].shape[1] for matrix in (wk, gate) if matrix in load.bound}
            if len(set(k_of.values())) > 1:
                problem = Problem(f"{gate}.weight", "", f"wk's K = {k_of[wk]}", f"K = {k_of[gate]}")
                load.problems.append(problem)
        if load.problems:
            raise CheckpointError(load.problems)
        weights = {}
        for layer in sorted(self._layers):
            stem = load.stems[layer]
            # Popped, so that dense matrices live on in the packed buffer alone.
            weights[layer] = ProjectionWeights.pack(load.bound.pop(f"{stem}wk"), load.bound.pop(f"{stem}weights_proj"))
        return weights

    def _open_load(self, call: str) -> _Load:
        if self._load is None:
            raise RuntimeError(f"Assembly.{call}: no load is open; call begin() first")
        return self._load


def _bind_if_complete(load: _Load, matrix: str) -> None:
    encoding, _ = recognise(matrix, load.headers[matrix])
    if encoding is None:
        return
    tensors = load.pending.pop(matrix)
    for role, expected in encoding.unusable(tensors).items():
        file = load.headers[matrix][role].file
        advice = "the file is damaged or its export went wrong"
        load.problems.append(Problem(f"{matrix}.{role}", file, expected, "values beyond that", advice))
    load.bound[matrix] = encoding.bind(tensors)


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.detach().to(device, copy=True, memory_format=torch.contiguous_format)
