"""Implementations of the projection to compare: ours, torch's, and vLLM's and DeepGEMM's where they are installed.

A contender takes x [M, K] bf16 and weights, and returns a call that computes k and gate. Preparing the weights is not
timed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels import Fp8Matrix, ProjectionWeights, project

Call = Callable[[], tuple[Tensor, ...]]

FP8_UTILS = "vllm.model_executor.layers.quantization.utils.fp8_utils"
SKINNY = "vllm.model_executor.kernels.linear.cute_dsl.skinny_gemm"
DEEP_GEMM = "vllm.utils.deep_gemm"


class UnavailableError(Exception):
    """A contender that is not installed, or that does not support these inputs."""


def ours(x: Tensor, weights: ProjectionWeights) -> Call:
    """k in bf16, gate in fp32."""
    return lambda: project(x, weights)


def ours_in_vllm(x: Tensor, weights: ProjectionWeights) -> Call:
    """Both in bf16 in one tensor, which vLLM's forward slices."""
    out = x.new_empty(len(x), sum(weights.shape[:2]))
    return lambda: project(x, weights, out=out)


def torch_linear(x: Tensor, weights: ProjectionWeights) -> Call:
    """What vLLM does: one GEMM of weights that were upcast to bf16 and fused at load; bf16 outputs."""
    fused, (d, h, _) = _fused_bf16(weights), weights.shape
    return lambda: torch.split(linear(x, fused), [d, h], 1)


def torch_mm_fp32(x: Tensor, weights: ProjectionWeights) -> Call:
    """The same with fp32 outputs."""
    fused, (d, h, _) = _fused_bf16(weights), weights.shape
    return lambda: torch.split(torch.mm(x, fused.T, out_dtype=torch.float32), [d, h], 1)


def vllm_block_scaled(x: Tensor, weights: ProjectionWeights) -> Call:
    """W8A8 for FP8 wk by vLLM's Triton GEMM, which quantizes activations per 128 values; gate by torch."""
    wk, gate = _fp8_wk_and_gate(weights)
    quantize = _installed(FP8_UTILS, "per_token_group_quant_fp8")
    multiply = _installed(FP8_UTILS, "w8a8_triton_block_scaled_mm")

    def call() -> tuple[Tensor, Tensor]:
        codes, scale = quantize(x, 128)
        return multiply(codes, wk.codes, scale, wk.scale, [128, 128], x.dtype), linear(x, gate)

    return call


def deep_gemm(x: Tensor, weights: ProjectionWeights) -> Call:
    """The same by DeepGEMM, as vLLM calls it."""
    wk, gate = _fp8_wk_and_gate(weights)
    if not _installed(DEEP_GEMM, "is_deep_gemm_supported")():
        raise UnavailableError("DeepGEMM is not installed or does not support this GPU")
    quantize, multiply = _installed(FP8_UTILS, "per_token_group_quant_fp8"), _installed(DEEP_GEMM, "fp8_gemm_nt")

    def call() -> tuple[Tensor, Tensor]:
        codes, scale = quantize(x, 128, column_major_scales=True)
        k = x.new_empty(len(x), len(wk.codes))
        multiply((codes, scale), (wk.codes, wk.scale), k)
        return k, linear(x, gate)

    return call


def vllm_skinny(x: Tensor, weights: ProjectionWeights) -> Call:
    """vLLM's CuTe GEMM for up to 16 rows, in bf16."""
    fused, (d, h, _) = _fused_bf16(weights), weights.shape
    multiply = _installed(SKINNY, "shape_dynamic_skinny_gemm")
    if not multiply.is_available():
        raise UnavailableError("vLLM's skinny GEMM needs nvidia-cutlass-dsl")
    if len(x) > 16:
        raise UnavailableError("vLLM's skinny GEMM takes up to 16 rows")
    return lambda: multiply(x, fused).split((d, h), 1)


OURS = {"indexproj": ours, "indexproj, bf16": ours_in_vllm}
OTHERS = {
    "torch linear": torch_linear,
    "torch mm, fp32": torch_mm_fp32,
    "vLLM block-scaled": vllm_block_scaled,
    "vLLM skinny": vllm_skinny,
    "DeepGEMM": deep_gemm,
}


def _installed(module: str, name: str) -> Any:
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"not installed: {error}") from error


def _fused_bf16(weights: ProjectionWeights) -> Tensor:
    """[D + H, K] bf16."""
    fused = weights.to_bf16().fused_weight
    assert fused is not None
    return fused


def _fp8_wk_and_gate(weights: ProjectionWeights) -> tuple[Fp8Matrix, Tensor]:
    if not (isinstance(weights.wk, Fp8Matrix) and weights.wk.group == (128, 128)):
        raise UnavailableError("takes wk in FP8 with 128x128 blocks")
    return weights.wk, weights.gate.dequantize(torch.bfloat16)
