"""Runs the kernels on a checkpoint's own weights and compares them with the fp64 reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import ProjectionWeights, project, reference
from ...kernels.launch import decide, signature_of
from ...kernels.target import INTERPRETED
from ...loading import Checkpoint, LayerPlan, load

# fp32 sums of 7168 products stay well below this; a wrong scale, mask or decode does not.
MAX_ERROR = 2e-6


@dataclass(frozen=True)
class Measurement:
    """One projection of one layer.

    Attributes:
        regime: of the kernel that ran, or "torch".
        error: of our fp32 outputs against fp64 of the exactly decoded weights: max |difference| / max |reference|, the
            larger one of k and gate.
        upcast_error: the same of fp64 arithmetic on weights rounded to bf16, which is what upcasting at load keeps.
    """

    plan: LayerPlan
    m: int
    regime: str
    error: float
    upcast_error: float

    @property
    def passed(self) -> bool:
        return self.error <= MAX_ERROR  # False for NaN


def verify(
    checkpoint: Checkpoint, plans: dict[int, LayerPlan], ms: Iterable[int], device: torch.device
) -> Iterator[Measurement]:
    """Yields one measurement per layer and m.

    Raises:
        CheckpointError: a layer does not load; raised before anything is run.
    """
    loaded = load(checkpoint, plans, device)
    for layer, plan in plans.items():
        weights = loaded.pop(layer)
        for m in ms:
            x = _activations(m, weights.shape[2], seed=layer).to(device)
            ours = project(x, weights, k_dtype=torch.float32)
            exact = reference(x, weights)
            config = decide(m, signature_of(weights, torch.float32, torch.float32))
            regime = config if isinstance(config, str) else config.regime
            yield Measurement(plan, m, regime, _error(ours, exact), _error(_upcast(x, weights), exact))


def where(device: torch.device) -> str:
    """What the kernels run on, in a sentence."""
    if INTERPRETED:
        return "The kernels run in Triton's interpreter, without a GPU, configured as for an H100 (sm_90)."
    return f"The kernels run on {torch.cuda.get_device_name(device)}."


def _activations(m: int, k: int, seed: int) -> Tensor:
    """[m, k] bf16 with a few large channels, as hidden states have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    x[:, torch.randperm(k, generator=generator)[: k // 512]] *= 20
    return x.bfloat16()


def _upcast(x: Tensor, weights: ProjectionWeights) -> tuple[Tensor, Tensor]:
    wk, gate = (matrix.dequantize(torch.bfloat16).double() for matrix in (weights.wk, weights.gate))
    return x.double() @ wk.T, x.double() @ gate.T


def _error(outputs: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    errors = []
    for output, truth in zip(outputs, exact, strict=True):
        difference, size = (output.double() - truth).abs().max().item(), truth.abs().max().item()
        errors.append(difference / size if size else difference)  # weights may be all zero
    return max(errors, key=lambda error: (error != error, error))  # NaN above all
