"""vLLM's side of a projection: the linear method of wk_weights_proj. Imports vLLM, so it is imported with a model."""

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.linear import LinearMethodBase

from ...kernels import project
from .model import IndexerLayer, IndexerModel


class IndexerMethod(LinearMethodBase):  # type: ignore[misc]
    """The linear method of one wk_weights_proj."""

    def __init__(self, layer: IndexerLayer, model: IndexerModel) -> None:
        self._layer, self._model = layer, model

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `layer.weight` exists already."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] bf16 or fp16 -> [..., D + H] in x's dtype: k, then the gate."""
        out = x.new_empty((*x.shape[:-1], sum(self._layer.shape[:2])))
        project(x, self._layer.operands, out=out, batch_invariant=self._model.batch_invariant)
        return out

    def k_and_gate(self, layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., K] -> k [..., D] in x's dtype and gate [..., H] fp32, in one launch."""
        return project(x, self._layer.operands, batch_invariant=self._model.batch_invariant)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Ends the load of the whole model, see `IndexerModel.finish`. vLLM calls this for every layer."""
        if self._model.is_loading:
            self._model.finish()
