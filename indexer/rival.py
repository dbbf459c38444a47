"""vLLM's own Triton GEMM for block-scaled FP8, compiled by the same compiler, to stand beside our kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from types import FunctionType

import torch
import triton
import triton.language as tl

from ..kernels import TARGETS
from ..kernels.compiled import Binary, compile_kernel
from ..kernels.dispatch import cdiv
from ..kernels.gates import Row, nbytes
from ..kernels.matrix import Kind

_MODULE, _NAME = "vllm.model_executor.layers.quantization.utils.fp8_utils", "_w8a8_triton_block_scaled_mm"
# What vLLM runs where it has no tuned table for a shape, and it has none for N=128: see w8a8_triton_block_scaled_mm.
_BLOCKS = {"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 128, "GROUP_SIZE_M": 32}
_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def block_scaled_gemm(target: str, ms: Iterable[int]) -> list[Row]:
    """For wk [128, 7168] alone, with contiguous FP8 activations and bf16 output; nothing where vLLM is not installed.

    Raises:
        RuntimeError: vLLM is there, but not this kernel with these arguments.
    """
    if find_spec("vllm") is None:
        return []
    try:
        with redirect_stdout(sys.stderr):  # vLLM logs to stdout, which is for the report
            found = getattr(import_module(_MODULE), _NAME)
    except (ImportError, AttributeError) as error:
        raise RuntimeError(f"vLLM's block-scaled GEMM is not where it was: {error}") from error
    # Where vLLM finds no GPU, it leaves its kernels plain functions that know only stand-ins of Triton.
    plain = getattr(found, "fn", found)
    function = FunctionType(plain.__code__, plain.__globals__ | {"tl": tl, "triton": triton}, plain.__name__)
    function.__annotations__ = dict.fromkeys(_BLOCKS, "tl.constexpr")
    function.__module__ = plain.__module__
    kernel = triton.jit(function)
    fp8, fp32 = (torch.empty(0, dtype=dtype) for dtype in (torch.float8_e4m3fn, torch.float32))
    tensors = {"A": fp8, "B": fp8, "C": torch.empty(0, dtype=torch.bfloat16), "As": fp32, "Bs": fp32}
    ones = dict.fromkeys(("stride_ak", "stride_bk", "stride_cn", "stride_As_k", "stride_Bs_k"), 1)
    aligned = dict.fromkeys(("N", "K", "group_n", "group_k", "stride_am", "stride_bn", "stride_cm"), 16)
    given = tensors | _BLOCKS | ones | aligned
    if not given.keys() <= set(kernel.arg_names):
        raise RuntimeError(f"vLLM's block-scaled GEMM takes other arguments than it did: {kernel.arg_names}")
    others = dict.fromkeys(set(kernel.arg_names) - given.keys(), 7)  # neither 1 nor a multiple of 16
    compiled = compile_kernel(kernel, TARGETS[target], **given, **others, **_OPTIONS)
    binary = Binary.of(compiled, TARGETS[target])
    return [
        Row.of(
            binary,
            TARGETS[target],
            shape="deepseek-v3.2",
            pair="FP8 128x128, none",
            gate="none",
            kernel="vLLM block-scaled GEMM",
            m=m,
            programs=cdiv(m, _BLOCKS["BLOCK_SIZE_M"]),
            weight_reads=cdiv(m, _BLOCKS["BLOCK_SIZE_M"]),
            x_reads=1,
            bytes_per_program=nbytes(Kind.FP8_BLOCK, 128, 7168) + 64 * 7168,
        )
        for m in ms
    ]
