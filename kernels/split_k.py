"""Decode and small batches: K divided over programs, partial sums reduced in the same launch.

With few rows, one round trip to memory dominates, so the weights are spread over as many programs as the GPU holds.
A program owns BLOCK_N rows of one matrix and 1/SPLIT_K of K, for BLOCK_M rows of x. Inside the program, the warps
multiply SLICES of its K side by side as one 3-D dot. The last program to arrive at a tile sums the splits.

With LOOP_SPLITS one program computes all splits of its tile, in the same order and without the workspace: the same
bits, which keeps batch-invariant results affordable for many rows.
"""

import triton
import triton.language as tl

from . import tile
from .tile import FP8_BLOCK, SCALE_BLOCK, UNCHANGED


@triton.jit
def _load_x(
    x_ptr, rows, first, M, stride_xm,
    K: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """[SLICES, BLOCK_K, BLOCK_M], transposed blocks of K from block first on, and [GROUPS, 1, BLOCK_M] scales of it.

    Without scales, x stands in their place, as callers unpack two tensors.
    """
    BLOCK_M: tl.constexpr = rows.shape[0]
    offs_k = ((first + tl.arange(0, SLICES)) * BLOCK_K)[:, None, None] + tl.arange(0, BLOCK_K)[None, :, None]
    inside = (rows < M)[None, None, :] & (offs_k < K)
    x = tl.load(x_ptr + rows[None, None, :].to(tl.int64) * stride_xm + offs_k, mask=inside, other=0.0)
    if ACTIVATION == UNCHANGED:
        x = x.to(DOT)
        return x, x
    else:
        groups = tl.reshape(x, (SLICES * BLOCK_K // SCALE_BLOCK, SCALE_BLOCK, BLOCK_M))
        values, scales = tile.quantize(groups, 1, ACTIVATION)
        return tl.reshape(values, (SLICES, BLOCK_K, BLOCK_M)).to(DOT), scales


@triton.jit
def _dot_step(
    x_ptr, w, cols, rows, first, M, stride_xm,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
    DOT: tl.constexpr, AMD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """w @ x.T of one tile over each of SLICES blocks of K, from block first on: [SLICES, BLOCK_N, BLOCK_M] fp32."""
    # Load x first where possible: weights pass through shared memory, whose barrier would delay later loads.
    if not PDL:
        x, x_scales = _load_x(x_ptr, rows, first, M, stride_xm, K, ACTIVATION, BLOCK_K, SLICES, DOT)
    # load_codes takes one row per slice and column.
    w_cols = tl.reshape(tl.broadcast_to(cols[None, :], (SLICES, BLOCK_N)), (SLICES * BLOCK_N,))
    w_slices = tl.reshape(tl.broadcast_to(tl.arange(0, SLICES)[:, None], (SLICES, BLOCK_N)), (SLICES * BLOCK_N,))
    start_k = (first + w_slices) * BLOCK_K
    if FORMAT == FP8_BLOCK:  # before the weights, to arrive with them
        scales = tile.load_block_scales(w, w_cols, start_k, N, K)
    codes, group_scales = tile.load_codes(w, w_cols, start_k, N, K, BLOCK_K, FORMAT)
    if PDL:
        tl.extra.cuda.gdc_wait()
        x, x_scales = _load_x(x_ptr, rows, first, M, stride_xm, K, ACTIVATION, BLOCK_K, SLICES, DOT)
    weights = tl.reshape(tile.decode(codes, group_scales, FORMAT, DOT), (SLICES, BLOCK_N, BLOCK_K))
    product = tile.dot(weights, x, AMD)
    if FORMAT == FP8_BLOCK:
        product *= tl.reshape(scales, (SLICES, BLOCK_N))[:, :, None]
    if ACTIVATION != UNCHANGED:
        GROUPS: tl.constexpr = x_scales.shape[0]
        x_scales = tl.broadcast_to(x_scales, (GROUPS, SLICES // GROUPS, BLOCK_M))
        product *= tl.reshape(x_scales, (SLICES, BLOCK_M))[:, None, :]
    return product


@triton.jit
def _dot_split(
    x_ptr, w, cols, rows, split, M, stride_xm,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
    SPLIT_K: tl.constexpr, DOT: tl.constexpr, AMD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """w @ x.T of one tile over one split of K: [BLOCK_N, BLOCK_M] fp32."""
    STEPS: tl.constexpr = (K + SPLIT_K * SLICES * BLOCK_K - 1) // (SPLIT_K * SLICES * BLOCK_K)
    # Pipelining moves loads above a wait inside a loop. With one step there is no loop.
    if PDL and STEPS > 1:
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for step in range(STEPS):
        acc += _dot_step(
            x_ptr, w, cols, rows, (split * STEPS + step) * SLICES, M, stride_xm, N, K, FORMAT, ACTIVATION,
            BLOCK_M, BLOCK_N, BLOCK_K, SLICES, DOT, AMD, PDL and STEPS == 1,
        )  # fmt: skip
    return tl.sum(acc, 0)


@triton.jit
def _split_k_tile(
    x_ptr, w, out_ptr, partial_ptr, arrived_ptr, start_n, M, stride_xm, stride_om,
    N: tl.constexpr, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, FACTOR: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
    SPLIT_K: tl.constexpr, LOOP_SPLITS: tl.constexpr, DOT: tl.constexpr, AMD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Columns of one output from start_n on: one split of K, and the sum of all if this program arrives last."""
    split, tile_m = tl.program_id(1), tl.program_id(2)
    rows, cols = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    row_scales = tile.load_row_scales(w, cols, N)[:, None] * FACTOR
    total = _dot_split(
        x_ptr, w, cols, rows, split, M, stride_xm,
        N, K, FORMAT, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, SLICES, SPLIT_K, DOT, AMD, PDL,
    )  # fmt: skip
    if LOOP_SPLITS:
        for later in range(1, SPLIT_K):
            total += _dot_split(
                x_ptr, w, cols, rows, later, M, stride_xm,
                N, K, FORMAT, ACTIVATION, BLOCK_M, BLOCK_N, BLOCK_K, SLICES, SPLIT_K, DOT, AMD, False,
            )  # fmt: skip
        tile.store(out_ptr, total * row_scales, rows[None, :], cols[:, None], M, N, stride_om)
    else:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        tile_id = tile_m * tl.num_programs(0) + tl.program_id(0)
        partial_ptr += tile_id.to(tl.int64) * (SPLIT_K * SIZE)
        tl.store(partial_ptr + split * SIZE + tile.offsets(BLOCK_N, BLOCK_M), total)
        if tile.last_to_arrive(arrived_ptr + tile_id, SPLIT_K, AMD):
            total = tile.sum_splits(partial_ptr, SIZE, total, split, SPLIT_K)
            tile.store(out_ptr, total * row_scales, rows[None, :], cols[:, None], M, N, stride_om)
            tl.store(arrived_ptr + tile_id, 0)


@triton.jit(do_not_specialize=["M"])
def split_k_kernel(
    x_ptr,  # [M, K] bf16 or fp16
    matrices,  # per matrix its three pointers, see tile.py
    outs,  # per matrix its output [M, N]
    partial_ptr,  # [tiles, SPLIT_K, BLOCK_N, BLOCK_M] fp32, None with LOOP_SPLITS
    arrived_ptr,  # [tiles] int32, all zero between launches, None with LOOP_SPLITS
    M, stride_xm, strides_om,
    NS: tl.constexpr, FORMATS: tl.constexpr, ACTIVATIONS: tl.constexpr, FACTORS: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
    SPLIT_K: tl.constexpr, LOOP_SPLITS: tl.constexpr, DOT: tl.constexpr, AMD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (sum of cdiv(N, BLOCK_N) over the matrices, 1 if LOOP_SPLITS else SPLIT_K, cdiv(M, BLOCK_M))."""
    tile_n = tl.program_id(0)
    first = 0  # tile of matrix i
    for i in tl.static_range(len(NS)):
        tiles = tl.cdiv(NS[i], BLOCK_N)
        if (tile_n >= first) & (tile_n < first + tiles):
            _split_k_tile(
                x_ptr, matrices[i], outs[i], partial_ptr, arrived_ptr, (tile_n - first) * BLOCK_N,
                M, stride_xm, strides_om[i], NS[i], FORMATS[i], ACTIVATIONS[i], FACTORS[i], K,
                BLOCK_M, BLOCK_N, BLOCK_K, SLICES, SPLIT_K, LOOP_SPLITS, DOT, AMD, PDL,
            )  # fmt: skip
        first += tiles
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
