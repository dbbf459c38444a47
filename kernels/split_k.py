"""Decode: few rows, so the time goes into one round trip to memory for the weights.

The weights are spread over as many programs as the GPU holds: a program owns BLOCK_N rows of one of the two matrices
and 1/SPLIT_K of K, for BLOCK_M rows of x. It cuts its part of K once more into SLICES, which the warps multiply side by
side as one 3-D dot. The last program to arrive adds up the splits.
"""

import triton
import triton.language as tl

from .tile import SCALE_BLOCK, decode_e4m3, dot, last_to_arrive, store_tile, sum_splits, tile_offsets


@triton.jit
def _dot_slices(
    x_ptr, w_ptr, sf_ptr, cols, rows, split, M, stride_xm,
    N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SLICES: tl.constexpr, SPLIT_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w @ x.T for one tile, over one split of K: [BLOCK_N, BLOCK_M] fp32."""
    STEPS: tl.constexpr = tl.cdiv(K, SPLIT_K * SLICES * BLOCK_K)
    acc = tl.zeros((SLICES, BLOCK_N, BLOCK_M), tl.float32)
    for step in range(STEPS):
        slice_k = ((split * STEPS + step) * SLICES + tl.arange(0, SLICES)[:, None, None]) * BLOCK_K
        offs_k = slice_k + tl.arange(0, BLOCK_K)[None, :, None]  # [SLICES, BLOCK_K, 1]
        x = tl.load(
            x_ptr + rows[None, None, :].to(tl.int64) * stride_xm + offs_k,
            mask=(rows < M)[None, None, :] & (offs_k < K),
            other=0.0,
        ).to(DOT)
        offs_k = slice_k + tl.arange(0, BLOCK_K)[None, None, :]  # [SLICES, 1, BLOCK_K]
        w = tl.load(w_ptr + cols[None, :, None] * K + offs_k, mask=(cols < N)[None, :, None] & (offs_k < K), other=0)
        if sf_ptr is None:
            acc += dot(w.to(DOT), x, PRECISION)
        else:
            # Past K the weights are zeros, and the last scale does as well as none.
            block_k = tl.minimum(slice_k, K - 1) // SCALE_BLOCK
            block = cols[None, :, None] // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK) + block_k
            sf = tl.load(sf_ptr + block, mask=(cols < N)[None, :, None], other=0.0)
            acc += dot(decode_e4m3(w, DOT), x, PRECISION) * sf
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["M"])
def split_k_kernel(
    x_ptr,  # [M, K] bf16 or fp16
    wk_ptr, wk_sf_ptr,  # [D, K] bf16 and None, or uint8 and fp32 [cdiv(D, 128), cdiv(K, 128)]
    wg_ptr, wg_sf_ptr,  # [H, K], likewise
    k_ptr,  # [M, D] out
    gate_ptr,  # [M, H] out
    partial_ptr,  # [tiles, SPLIT_K, BLOCK_N, BLOCK_M] fp32
    arrived_ptr,  # [tiles] int32, all zero between launches
    M, stride_xm, stride_km, stride_gm,
    D: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLICES: tl.constexpr,
    SPLIT_K: tl.constexpr, DOT: tl.constexpr, AMD: tl.constexpr,
):  # fmt: skip
    """Grid: (cdiv(D, BLOCK_N) + cdiv(H, BLOCK_N), SPLIT_K, cdiv(M, BLOCK_M))."""
    tile_n, split, tile_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    K_TILES: tl.constexpr = tl.cdiv(D, BLOCK_N)
    PRECISION: tl.constexpr = "ieee" if AMD else "tf32"
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    if tile_n < K_TILES:
        cols += tile_n * BLOCK_N
        acc = _dot_slices(x_ptr, wk_ptr, wk_sf_ptr, cols, rows, split, M, stride_xm,
                          D, K, BLOCK_M, BLOCK_N, BLOCK_K, SLICES, SPLIT_K, DOT, PRECISION)  # fmt: skip
    else:
        cols += (tile_n - K_TILES) * BLOCK_N
        acc = _dot_slices(x_ptr, wg_ptr, wg_sf_ptr, cols, rows, split, M, stride_xm,
                          H, K, BLOCK_M, BLOCK_N, BLOCK_K, SLICES, SPLIT_K, DOT, PRECISION)  # fmt: skip

    SIZE: tl.constexpr = BLOCK_N * BLOCK_M
    tile = tile_m * tl.num_programs(0) + tile_n
    partial_ptr += tile.to(tl.int64) * (SPLIT_K * SIZE)
    tl.store(partial_ptr + split * SIZE + tile_offsets(BLOCK_N, BLOCK_M), acc)
    if last_to_arrive(arrived_ptr + tile, SPLIT_K, AMD):
        total = sum_splits(partial_ptr, SIZE, SPLIT_K, BLOCK_N, BLOCK_M)
        if tile_n < K_TILES:
            store_tile(k_ptr, total, cols, rows, M, D, stride_km)
        else:
            store_tile(gate_ptr, total, cols, rows, M, H, stride_gm)
        tl.store(arrived_ptr + tile, 0)
