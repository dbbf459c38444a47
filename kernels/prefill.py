"""Prefill: many rows. Reading x takes the time, and it is read exactly once.

A program owns BLOCK_M rows of x and all rows of all matrices, with one accumulator each. If the tiles of x alone do
not fill the GPU, K is divided over SPLIT_K programs, and the last one to arrive sums the splits.
"""

import triton
import triton.language as tl

from .tile import (
    FP8_BLOCK,
    UNCHANGED,
    dot,
    last_to_arrive,
    load_block_scales,
    load_weights,
    quantize,
    store_tile,
    sum_splits,
    tile_offsets,
)


@triton.jit
def _columns(N: tl.constexpr):
    """Columns of an accumulator for N output columns: a power of two, at least 16."""
    return tl.arange(0, triton.next_power_of_2(N) if N > 16 else 16)


@triton.jit
def _zeros(N: tl.constexpr, BLOCK_M: tl.constexpr):
    return tl.zeros((triton.next_power_of_2(N) if N > 16 else 16, BLOCK_M), tl.float32)


@triton.jit
def _dot_add(
    acc, x, w, start_k,
    N: tl.constexpr, K: tl.constexpr, FORMAT: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_K: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + w @ x over BLOCK_K of K, which lies inside one scale block."""
    cols = _columns(N)
    start_k += tl.zeros_like(cols)
    if ACTIVATION != UNCHANGED:
        x, x_scales = quantize(x, 0, ACTIVATION)
        x = x.to(DOT)
    product = dot(load_weights(w, cols, start_k, N, K, BLOCK_K, FORMAT, DOT), x, PRECISION)
    if FORMAT == FP8_BLOCK:
        product *= load_block_scales(w, cols, start_k, N, K)[:, None]
    if ACTIVATION != UNCHANGED:
        product *= x_scales
    return acc + product


@triton.jit(do_not_specialize=["M"])
def prefill_kernel(
    x_ptr,  # [M, K] bf16 or fp16
    matrices,  # per matrix its three pointers, see tile.py
    outs,  # per matrix its output [M, N]
    partial_ptr,  # [tiles, SPLIT_K, ACC_SIZE] fp32, None if SPLIT_K is 1
    arrived_ptr,  # [tiles] int32, all zero between launches, None if SPLIT_K is 1
    M, stride_xm, strides_om,
    NS: tl.constexpr, FORMATS: tl.constexpr, ACTIVATIONS: tl.constexpr, FACTORS: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, ACC_SIZE: tl.constexpr,
    DOT: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(M, BLOCK_M), SPLIT_K). ACC_SIZE: elements of all accumulators of a program."""
    tile, split = tl.program_id(0), tl.program_id(1)
    SPLIT_SIZE: tl.constexpr = tl.cdiv(K, SPLIT_K * BLOCK_K) * BLOCK_K
    PRECISION: tl.constexpr = "ieee" if AMD else "tf32"
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    accs = ()
    for i in tl.static_range(len(NS)):
        accs = accs + (_zeros(NS[i], BLOCK_M),)
    # With an end known at compile time, the compiler would unroll a short loop until it spills.
    for start_k in range(split * SPLIT_SIZE, tl.minimum((split + 1) * SPLIT_SIZE, K), BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[None, :].to(tl.int64) * stride_xm + offs_k[:, None],
            mask=(rows < M)[None, :] & (offs_k < K)[:, None],
            other=0.0,
        ).to(DOT)
        sums = ()
        for i in tl.static_range(len(NS)):
            acc = _dot_add(
                accs[i], x, matrices[i], start_k, NS[i], K, FORMATS[i], ACTIVATIONS[i], BLOCK_K, DOT, PRECISION
            )
            sums = sums + (acc,)
        accs = sums

    if SPLIT_K == 1:
        for i in tl.static_range(len(NS)):
            store_tile(outs[i], accs[i], matrices[i], _columns(NS[i]), rows, M, NS[i], strides_om[i], FACTORS[i])
    else:
        partials = partial_ptr + tile.to(tl.int64) * (SPLIT_K * ACC_SIZE)
        own = partials + split * ACC_SIZE
        for i in tl.static_range(len(NS)):
            tl.store(own + tile_offsets(accs[i].shape[0], BLOCK_M), accs[i])
            own += accs[i].shape[0] * BLOCK_M
        if last_to_arrive(arrived_ptr + tile, SPLIT_K, AMD):
            for i in tl.static_range(len(NS)):
                total = sum_splits(partials, ACC_SIZE, SPLIT_K, accs[i].shape[0], BLOCK_M)
                store_tile(outs[i], total, matrices[i], _columns(NS[i]), rows, M, NS[i], strides_om[i], FACTORS[i])
                partials += accs[i].shape[0] * BLOCK_M
            tl.store(arrived_ptr + tile, 0)
