"""Prefill: many rows. Reading x and decoding weights dominate, so a program decodes its weights once for many rows.

A program owns BLOCK_M rows of x and either all columns of all outputs, which reads x once, or BLOCK_N columns of one
output, which gives more programs. If these tiles do not fill the GPU, K is divided over SPLIT_K programs, and the last
one to arrive sums the splits.

Tiles are [rows of x, columns of the output]: x is the first operand of the dot, and the decoded weights go to shared
memory as the second one, where all warps read them.
"""

import triton
import triton.language as tl

from . import tile
from .tile import FP8_BLOCK, UNCHANGED


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # Triton 3.6 takes no element of a tuple in a shape
    return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def _dot_step(
    x, w, cols, start_k,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PACKED: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """x @ w.T over BLOCK_K of K, which lies inside one scale block: [rows, cols] fp32."""
    start_k += tl.zeros_like(cols)
    if FORMAT == FP8_BLOCK:
        scales = tile.load_block_scales(w, cols, start_k, N, K)
    codes, group_scales = tile.load_codes(w, cols, start_k, N, K, BLOCK_K, FORMAT)
    if ACTIVATION != UNCHANGED:
        x, x_scales = tile.quantize(x, 1, ACTIVATION)
    product = tile.dot(x.to(DOT), tl.trans(tile.decode(codes, group_scales, FORMAT, DOT, PACKED)), AMD)
    if FORMAT == FP8_BLOCK:
        product *= scales[None, :]
    if ACTIVATION != UNCHANGED:
        product *= x_scales
    return product


@triton.jit
def _project_tile(
    x_ptr, matrices, outs, partial_ptr, arrived_ptr, start_n, M, stride_xm, strides_om,
    FIRST: tl.constexpr, END: tl.constexpr,
    NS: tl.constexpr, FORMATS: tl.constexpr, ACTIVATIONS: tl.constexpr, FACTORS: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_NS: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    ACC_SIZE: tl.constexpr, DOT: tl.constexpr, PACKED: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """BLOCK_NS columns from start_n on of the outputs FIRST to END: one split of K, and the sum if it arrives last."""
    split, tile_m = tl.program_id(1), tl.program_id(2)
    SPLIT_SIZE: tl.constexpr = tl.cdiv(K, SPLIT_K * BLOCK_K) * BLOCK_K
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    accs = ()
    for i in tl.static_range(FIRST, END):
        accs = accs + (_zeros(BLOCK_M, BLOCK_NS[i]),)
    # With an end known at compile time, the compiler would unroll a short loop until it spills.
    for start_k in range(split * SPLIT_SIZE, tl.minimum((split + 1) * SPLIT_SIZE, K), BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        inside = (rows < M)[:, None] & (offs_k < K)[None, :]
        x = tl.load(x_ptr + rows[:, None].to(tl.int64) * stride_xm + offs_k[None, :], mask=inside, other=0.0)
        sums = ()
        for i in tl.static_range(FIRST, END):
            product = _dot_step(
                x, matrices[i], start_n + tl.arange(0, BLOCK_NS[i]), start_k,
                NS[i], K, FORMATS[i], ACTIVATIONS[i], BLOCK_K, DOT, PACKED, AMD,
            )  # fmt: skip
            sums = sums + (accs[i - FIRST] + product,)
        accs = sums

    is_last = True
    tile_id = tile_m * tl.num_programs(0) + tl.program_id(0)
    if SPLIT_K > 1:
        partial_ptr += tile_id.to(tl.int64) * (SPLIT_K * ACC_SIZE)
        own_ptr = partial_ptr + split * ACC_SIZE
        for i in tl.static_range(FIRST, END):
            tl.store(own_ptr + tile.offsets(BLOCK_M, BLOCK_NS[i]), accs[i - FIRST])
            own_ptr += BLOCK_M * BLOCK_NS[i]
        is_last = tile.last_to_arrive(arrived_ptr + tile_id, SPLIT_K, AMD)
    if is_last:
        for i in tl.static_range(FIRST, END):
            total = accs[i - FIRST]
            if SPLIT_K > 1:
                total = tile.sum_splits(partial_ptr, ACC_SIZE, total, split, SPLIT_K)
                partial_ptr += BLOCK_M * BLOCK_NS[i]
            cols = start_n + tl.arange(0, BLOCK_NS[i])
            total *= tile.load_row_scales(matrices[i], cols, NS[i])[None, :] * FACTORS[i]
            tile.store(outs[i], total, rows[:, None], cols[None, :], M, NS[i], strides_om[i])
        if SPLIT_K > 1:
            tl.store(arrived_ptr + tile_id, 0)


@triton.jit(do_not_specialize=["M"])
def prefill_kernel(
    x_ptr,  # [M, K] bf16 or fp16
    matrices,  # per matrix its three pointers, see tile.py
    outs,  # per matrix its output [M, N]
    partial_ptr,  # [tiles, SPLIT_K, ACC_SIZE] fp32, None if SPLIT_K is 1
    arrived_ptr,  # [tiles] int32, all zero between launches, None if SPLIT_K is 1
    M, stride_xm, strides_om,
    NS: tl.constexpr, FORMATS: tl.constexpr, ACTIVATIONS: tl.constexpr, FACTORS: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_NS: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr, ACC_SIZE: tl.constexpr, DOT: tl.constexpr, PACKED: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of columns, SPLIT_K, cdiv(M, BLOCK_M)).

    BLOCK_N: columns per program, 0 for all. BLOCK_NS: columns of each matrix in a program.
    ACC_SIZE: elements of all accumulators.
    """
    tile_n = tl.program_id(0)
    first = 0  # tile of matrix i
    for i in tl.static_range(len(NS) if BLOCK_N else 1):
        tiles = tl.cdiv(NS[i], BLOCK_N) if BLOCK_N else 1
        if (tile_n >= first) & (tile_n < first + tiles):
            _project_tile(
                x_ptr, matrices, outs, partial_ptr, arrived_ptr, (tile_n - first) * BLOCK_N, M, stride_xm, strides_om,
                i, i + 1 if BLOCK_N else len(NS), NS, FORMATS, ACTIVATIONS, FACTORS, K,
                BLOCK_M, BLOCK_NS, BLOCK_K, SPLIT_K, ACC_SIZE, DOT, PACKED, AMD,
            )  # fmt: skip
        first += tiles
