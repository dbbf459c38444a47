"""Prefill: many rows, so the time goes into reading x, which happens exactly once.

A program owns BLOCK_M rows of x and both matrices, in two accumulators. Where the rows alone do not fill the GPU, K is
divided over SPLIT_K programs, and the last one to arrive adds up the splits.
"""

import triton
import triton.language as tl

from .tile import SCALE_BLOCK, decode_e4m3, dot, last_to_arrive, store_tile, sum_splits, tile_offsets


@triton.jit
def _dot_add(
    acc, x, w_ptr, sf_ptr, cols, start_k,
    N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + w @ x over BLOCK_K of K, which lies inside one scale block."""
    offs_k = start_k + tl.arange(0, BLOCK_K)
    w = tl.load(w_ptr + cols[:, None] * K + offs_k[None, :], mask=(cols < N)[:, None] & (offs_k < K)[None, :], other=0)
    if sf_ptr is None:
        return acc + dot(w.to(DOT), x, PRECISION)
    else:
        block = cols // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK) + start_k // SCALE_BLOCK
        sf = tl.load(sf_ptr + block, mask=cols < N, other=0.0)
        return acc + dot(decode_e4m3(w, DOT), x, PRECISION) * sf[:, None]


@triton.jit(do_not_specialize=["M"])
def tiled_kernel(
    x_ptr,  # [M, K] bf16 or fp16
    wk_ptr, wk_sf_ptr,  # [D, K] bf16 and None, or uint8 and fp32 [cdiv(D, 128), cdiv(K, 128)]
    wg_ptr, wg_sf_ptr,  # [H, K], likewise
    k_ptr,  # [M, D] out
    gate_ptr,  # [M, H] out
    partial_ptr,  # [tiles, SPLIT_K, (BLOCK_D + BLOCK_H) * BLOCK_M] fp32, None where SPLIT_K is 1
    arrived_ptr,  # [tiles] int32, all zero between launches, None where SPLIT_K is 1
    M, stride_xm, stride_km, stride_gm,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, DOT: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(M, BLOCK_M), SPLIT_K)."""
    tile, split = tl.program_id(0), tl.program_id(1)
    BLOCK_D: tl.constexpr = triton.next_power_of_2(D) if D > 16 else 16
    BLOCK_H: tl.constexpr = triton.next_power_of_2(H) if H > 16 else 16
    LENGTH: tl.constexpr = tl.cdiv(K, SPLIT_K * BLOCK_K) * BLOCK_K  # of K, per split
    PRECISION: tl.constexpr = "ieee" if AMD else "tf32"
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    cols_k, cols_g = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_H)
    acc_k = tl.zeros((BLOCK_D, BLOCK_M), tl.float32)
    acc_g = tl.zeros((BLOCK_H, BLOCK_M), tl.float32)
    # An end that is not known at compile time keeps the compiler from unrolling a short loop until it spills.
    for start_k in range(split * LENGTH, tl.minimum((split + 1) * LENGTH, K), BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + rows[None, :].to(tl.int64) * stride_xm + offs_k[:, None],
            mask=(rows < M)[None, :] & (offs_k < K)[:, None],
            other=0.0,
        ).to(DOT)
        acc_k = _dot_add(acc_k, x, wk_ptr, wk_sf_ptr, cols_k, start_k, D, K, BLOCK_K, DOT, PRECISION)
        acc_g = _dot_add(acc_g, x, wg_ptr, wg_sf_ptr, cols_g, start_k, H, K, BLOCK_K, DOT, PRECISION)

    if SPLIT_K == 1:
        store_tile(k_ptr, acc_k, cols_k, rows, M, D, stride_km)
        store_tile(gate_ptr, acc_g, cols_g, rows, M, H, stride_gm)
    else:
        SIZE_K: tl.constexpr = BLOCK_D * BLOCK_M
        SIZE: tl.constexpr = SIZE_K + BLOCK_H * BLOCK_M
        partial_k = partial_ptr + tile.to(tl.int64) * (SPLIT_K * SIZE)
        partial_g = partial_k + SIZE_K
        tl.store(partial_k + split * SIZE + tile_offsets(BLOCK_D, BLOCK_M), acc_k)
        tl.store(partial_g + split * SIZE + tile_offsets(BLOCK_H, BLOCK_M), acc_g)
        if last_to_arrive(arrived_ptr + tile, SPLIT_K, AMD):
            total_k = sum_splits(partial_k, SIZE, SPLIT_K, BLOCK_D, BLOCK_M)
            store_tile(k_ptr, total_k, cols_k, rows, M, D, stride_km)
            total_g = sum_splits(partial_g, SIZE, SPLIT_K, BLOCK_H, BLOCK_M)
            store_tile(gate_ptr, total_g, cols_g, rows, M, H, stride_gm)
            tl.store(arrived_ptr + tile, 0)
