"""The projection as an nn.Module."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ProjectionWeights, project
from ..loading import load


class IndexerProjection(nn.Module):
    """(k, gate) = (x @ wk.T, x @ weights_proj.T) of one indexer, in one launch.

    The weights keep the checkpoint's format, so the module has no parameters and no state_dict entries; reload them
    from the checkpoint. `.to(device)` moves the weights; dtype conversions such as `model.half()` do not change them.
    """

    def __init__(self, weights: ProjectionWeights, **options: Any) -> None:
        super().__init__()
        if not isinstance(weights, ProjectionWeights):
            raise TypeError(f"IndexerProjection: expected ProjectionWeights, got {type(weights).__name__}")
        self.weights = weights
        inspect.signature(project).bind(None, weights, **options)  # raises TypeError for an unknown option
        self.options = options  # keyword arguments of `project`

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        *,
        layer: int,
        device: str | torch.device = "cpu",
        index_head_dim: int | None = None,
        **options: Any,
    ) -> "IndexerProjection":
        """Loads one layer from a checkpoint directory or .safetensors file. Reads only that layer's tensors.

        index_head_dim is that of `load`; options are those of `project`. Raises CheckpointError with every problem if
        the layer does not load.
        """
        return cls(load(path, [layer], device, index_head_dim=index_head_dim)[layer], **options)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., K] bf16 or fp16 -> k [..., D], gate [..., H]. Raises the same errors as `project`."""
        return project(x, self.weights, **self.options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "IndexerProjection":
        def move(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.weights = self.weights.map(move)
        return self

    def extra_repr(self) -> str:
        d, h, k = self.weights.shape
        return f"K={k}, D={d}, H={h}, {self.weights.wk.format} and {self.weights.gate.format} on {self.weights.device}"
