"""The helpers that both kernels share: decode weights, store an output tile, add up the K splits.

A matrix reaches a kernel as two pointers. The first holds bf16 values, or e4m3 codes as uint8 (sm_80 and gfx942 have
no e4m3fn type), K-major. The second holds the fp32 scale of each 128x128 block; it is None for bf16, so that the
encoding is known at compile time.

Tiles are held transposed, [columns of the output, rows]: the product is w @ x.T. Weights are then the first operand of
the dot, which tensor cores take from registers, where they have just been decoded.
"""

import triton
import triton.language as tl

SCALE_BLOCK = tl.constexpr(128)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def decode_e4m3(codes, DOT: tl.constexpr):
    """e4m3fn codes (uint8, no NaN) to DOT, exactly, subnormals included."""
    bits = codes.to(tl.int32)
    # The exponent biases are 7 and 127: sign, exponent and mantissa, moved to fp32's places, read as value * 2**-120.
    value = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True)
    return (value * 1.329227995784916e36).to(DOT)


@triton.jit
def dot(w, x, PRECISION: tl.constexpr):
    """w @ x over one block of K, to be added to the sum outside the tensor core.

    Tensor cores truncate where they accumulate, and over the hundreds of steps of a full K that is seen. Unless an
    imprecise length is named, the compiler moves the addition back into them.
    """
    return tl.dot(w, x, input_precision=PRECISION, max_num_imprecise_acc=w.shape[-1])


@triton.jit
def tile_offsets(COLS: tl.constexpr, ROWS: tl.constexpr):
    return tl.arange(0, COLS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]


@triton.jit
def store_tile(out_ptr, tile, cols, rows, M, N: tl.constexpr, stride_om):
    """tile [columns, rows] fp32 into out [M, N]."""
    if INTERPRETED and out_ptr.dtype.element_ty == tl.bfloat16:
        # The interpreter truncates where GPUs round to nearest even: half a step up makes them agree.
        bits = tile.to(tl.int32, bitcast=True)
        tile = tl.where(tile == tile, (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True), tile)
    out = out_ptr + rows[None, :].to(tl.int64) * stride_om + cols[:, None]
    tl.store(out, tile, mask=(rows < M)[None, :] & (cols < N)[:, None])


@triton.jit
def last_to_arrive(arrived_ptr, SPLIT_K: tl.constexpr, AMD: tl.constexpr):
    """Counts this program in, its partials being stored, and says whether it is the last one of its tile.

    The last one sees all partials (acq_rel) and has to set the counter back to zero.
    """
    if AMD:
        # There the barrier alone lets a wave go on before its own stores have landed.
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1",
            "=v,v,~{memory}",
            [tl.arange(0, 64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    # The stores of all warps come before the release of the one thread that counts.
    tl.debug_barrier()
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1


@triton.jit
def sum_splits(partial_ptr, stride_split, SPLIT_K: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """[COLS, ROWS] fp32, always added in split order, so that two runs give the same bits."""
    partials = partial_ptr + tile_offsets(COLS, ROWS)
    total = tl.load(partials)
    # Small tiles are all asked for at once; large ones would not fit the registers.
    UNROLL: tl.constexpr = SPLIT_K if COLS * ROWS <= 1024 else 2
    for split in tl.range(1, SPLIT_K, loop_unroll_factor=UNROLL):
        total += tl.load(partials + split * stride_split)
    return total
