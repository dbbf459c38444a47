"""Decode of very few rows: a program owns one row of one matrix and all of K, multiplies in fp32 and needs no other.

Tensor cores would spend most of their width on rows of x that are not there. What counts is that all of the weights are
asked for at once and that nothing comes after them: no second round trip, no counter, no workspace.
"""

import triton
import triton.language as tl

from .tile import (
    has_block_scales,
    launch_dependents,
    load_block_scales,
    load_weights,
    quantize,
    quantizes_x,
    store_tile,
    wait_for_dependencies,
)


@triton.jit
def _one_row(
    x_ptr, w, out_ptr, row_n, M, stride_xm, stride_om,
    N: tl.constexpr, KIND: tl.constexpr, FACTOR: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One column of one output. K is a grid of [SLICES, BLOCK_K] per step, which the threads share out."""
    STEPS: tl.constexpr = (K + SLICES * BLOCK_K - 1) // (SLICES * BLOCK_K)
    slices = tl.arange(0, SLICES)
    cols = row_n + tl.zeros_like(slices)
    weights = ()
    for step in tl.static_range(STEPS):
        start_k = (step * SLICES + slices) * BLOCK_K
        values = load_weights(w, cols, start_k, N, K, BLOCK_K, KIND, tl.float32)
        if has_block_scales(KIND):
            values *= load_block_scales(w, cols, start_k, N, K)[:, None]
        weights = weights + (values,)

    wait_for_dependencies(PDL)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    acc = tl.zeros((BLOCK_M, SLICES, BLOCK_K), tl.float32)
    for step in tl.static_range(STEPS):
        offs_k = ((step * SLICES + slices) * BLOCK_K)[:, None] + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(
            x_ptr + rows[:, None, None].to(tl.int64) * stride_xm + offs_k[None, :, :],
            mask=(rows < M)[:, None, None] & (offs_k < K)[None, :, :],
            other=0.0,
        )
        if quantizes_x(KIND):
            codes, scale = quantize(x, 2, KIND)
            x = codes * scale
        acc += x.to(tl.float32) * weights[step][None, :, :]
    launch_dependents(PDL)
    total = tl.sum(tl.sum(acc, 2), 1)
    store_tile(out_ptr, total[None, :], w, row_n + tl.arange(0, 1), rows, M, N, stride_om, FACTOR)


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x_ptr,  # [M, K] bf16 or fp16
    matrices,  # of each matrix its pointers, see tile.py
    outs,  # of each matrix its output [M, N]
    M, stride_xm, strides_om,
    NS: tl.constexpr, KINDS: tl.constexpr, FACTORS: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (sum of N over the matrices, cdiv(M, BLOCK_M))."""
    row_n = tl.program_id(0)
    first = 0  # row of the matrix
    for i in tl.static_range(len(NS)):
        if (row_n >= first) & (row_n < first + NS[i]):
            _one_row(
                x_ptr, matrices[i], outs[i], row_n - first, M, stride_xm, strides_om[i],
                NS[i], KINDS[i], FACTORS[i], K, BLOCK_M, BLOCK_K, SLICES, PDL,
            )  # fmt: skip
        first += NS[i]
