"""Decode of very few rows: one program per row of a matrix, fp32 FMA over all of K.

Tensor cores would be mostly idle at this size. What counts is that a program loads its weights and scales in one round
trip to memory and that nothing follows: no partial sums, no counter, no workspace.
"""

import triton
import triton.language as tl

from . import tile
from .tile import FP8_BLOCK, UNCHANGED


@triton.jit
def _gemv_row(
    x_ptr, w, out_ptr, row_n, M, stride_xm, stride_om,
    N: tl.constexpr, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, FACTOR: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One column of one output. A step covers [SLICES, BLOCK_K] of K, divided among the threads."""
    STEPS: tl.constexpr = (K + SLICES * BLOCK_K - 1) // (SLICES * BLOCK_K)
    slices = tl.arange(0, SLICES)
    cols = row_n + tl.zeros_like(slices)
    scales, weights = tile.load_row_scales(w, cols, N), ()
    for step in tl.static_range(STEPS):
        start_k = (step * SLICES + slices) * BLOCK_K
        if FORMAT == FP8_BLOCK:
            scales = tile.load_block_scales(w, cols, start_k, N, K)
        codes, group_scales = tile.load_codes(w, cols, start_k, N, K, BLOCK_K, FORMAT)
        weights = weights + (tile.decode(codes, group_scales, FORMAT, tl.float32) * scales[:, None],)

    if PDL:  # programmatic dependent launch: what earlier kernels wrote is visible from here on
        tl.extra.cuda.gdc_wait()
    first = tl.program_id(2) * BLOCK_M
    # Row by row: the compiler would spread rows of a 3-D tile over warps and pass each weight through shared memory.
    sums = ()
    for m in tl.static_range(BLOCK_M):
        acc = tl.zeros((SLICES, BLOCK_K), tl.float32)
        row = first + m + tl.arange(0, 1)
        for step in tl.static_range(STEPS):
            offs_k = ((step * SLICES + slices) * BLOCK_K)[:, None] + tl.arange(0, BLOCK_K)[None, :]
            inside = (row < M)[:, None] & (offs_k < K)
            x = tl.load(x_ptr + row[:, None].to(tl.int64) * stride_xm + offs_k, mask=inside, other=0.0)
            if ACTIVATION != UNCHANGED:
                x, x_scales = tile.quantize(x, 1, ACTIVATION)
                x *= x_scales
            acc += x.to(tl.float32) * weights[step]
        sums = sums + (acc,)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    stacked = tl.reshape(_stack(sums, BLOCK_M), (SLICES, BLOCK_K, BLOCK_M))
    total = tl.sum(tl.sum(stacked, 1), 0)  # in two stages: the interpreter sums one by one, which loses bits
    tile.store(out_ptr, total * FACTOR, first + tl.arange(0, BLOCK_M), row_n + tl.arange(0, 1), M, N, stride_om)


@triton.jit
def _stack(tiles, COUNT: tl.constexpr):
    """[..., COUNT] from COUNT tiles, a power of two: their sums take one exchange between the warps."""
    HALF: tl.constexpr = COUNT // 2
    if COUNT == 1:
        return tiles[0]
    else:
        joined = ()
        for i in tl.static_range(HALF):
            joined = joined + (tl.join(tiles[i], tiles[i + HALF]),)
        return _stack(joined, HALF)


@triton.jit(do_not_specialize=["M"])
def gemv_kernel(
    x_ptr,  # [M, K] bf16 or fp16
    matrices,  # per matrix its three pointers, see tile.py
    outs,  # per matrix its output [M, N]
    M, stride_xm, strides_om,
    NS: tl.constexpr, FORMATS: tl.constexpr, ACTIVATIONS: tl.constexpr, FACTORS: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (sum of N over the matrices, 1, cdiv(M, BLOCK_M))."""
    row_n = tl.program_id(0)
    first = 0  # row of matrix i
    for i in tl.static_range(len(NS)):
        if (row_n >= first) & (row_n < first + NS[i]):
            _gemv_row(
                x_ptr, matrices[i], outs[i], row_n - first, M, stride_xm, strides_om[i],
                NS[i], FORMATS[i], ACTIVATIONS[i], FACTORS[i], K, BLOCK_M, BLOCK_K, SLICES, PDL,
            )  # fmt: skip
        first += NS[i]
