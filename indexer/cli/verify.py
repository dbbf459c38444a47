"""Runs the kernels on the weights of a checkpoint and compares them with fp64 products of the values on disk."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from triton import next_power_of_2

from ...kernels import project, reference
from ...kernels.launch import Signature, plan_of
from ...loading import Checkpoint, Plan, load
from .audit import new_table

# fp32 sums of 7168 products stay well below this; a wrong scale, mask or decode exceeds it.
MAX_ERROR = 2e-6


class Measurement(NamedTuple):
    """One projection of one layer.

    Errors are max |difference| / max |reference| of the outputs, the larger of k and gate. The reference is the fp64
    product with the values on disk.
    """

    layer: int
    encodings: tuple[str, ...]  # of wk and weights_proj, on disk
    m: int
    regime: str  # the kernel that ran
    error: float  # of the kernel's fp32 outputs
    load_error: float  # of fp64 products with the loaded weights: what loading rounded
    kernel_error: float  # of the kernel's fp32 outputs against these products
    bf16_error: float  # of fp64 products with weights rounded to bf16, as an upcast at load leaves them

    @property
    def passed(self) -> bool:
        return self.kernel_error <= MAX_ERROR  # False for NaN


def verify(
    path: Path, ms: Iterable[int], device: torch.device, layers: list[int] | None = None, head_dim: int | None = None
) -> Iterator[Measurement]:
    """Yields one measurement per layer and m; the other arguments are those of `load`.

    Raises CheckpointError before the first measurement if a layer does not load.
    """
    checkpoint = Checkpoint(path)
    loaded = load(checkpoint, layers, device, index_head_dim=head_dim)
    plans = Plan.of(checkpoint, head_dim).layers
    for layer in list(loaded):
        weights, plan = loaded.pop(layer), plans[layer]
        on_disk = [matrix.to(device) for matrix in plan.exact({name: checkpoint.read(name) for name in plan.tensors})]
        encodings = tuple(matrix.encoding.name for matrix in (plan.wk, plan.gate) if matrix.encoding)
        for m in dict.fromkeys(ms):
            x = _activations(m, weights.shape[2]).to(device)
            exact = x.double() @ on_disk[0].T, x.double() @ on_disk[1].T
            as_loaded = reference(x, weights)
            outputs = project(x, weights, k_dtype=torch.float32)
            pairs = (outputs, exact), (as_loaded, exact), (outputs, as_loaded), (reference(x, weights.to_bf16()), exact)
            launched = plan_of(Signature.of(weights.shape, weights.formats, device=device), next_power_of_2(m)).config
            yield Measurement(layer, encodings, m, launched.regime, *(_error(*pair) for pair in pairs))


def verify_table(measurements: Iterable[Measurement]) -> Table:
    table = new_table("layer", "wk", "weights_proj", "M", "kernel", "error", "of loading", "if BF16", "verdict")
    for found in measurements:
        errors = (f"{error:.1e}" for error in (found.error, found.load_error, found.bf16_error))
        verdict = "ok" if found.passed else "WRONG"
        table.add_row(f"{found.layer}", *found.encodings, f"{found.m}", found.regime, *errors, verdict)
    return table


def _activations(m: int, k: int) -> Tensor:
    """[m, k] bf16 with a few large channels, like hidden states; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(m, k, generator=generator)
    x[:, torch.randperm(k, generator=generator)[: k // 512]] *= 20
    return x.bfloat16()


def _error(outputs: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> float:
    pairs = zip(outputs, exact, strict=True)
    errors = [(output.double() - truth).abs().max() / truth.abs().max() for output, truth in pairs]
    return torch.stack(errors).max().item()  # NaN if either is NaN
