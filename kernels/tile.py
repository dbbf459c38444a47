"""What the kernels share: load and decode weights, multiply, store an output tile, sum the K splits.

A matrix reaches a kernel as a tuple w of three pointers and a format (a compile-time integer):

    format       w[0]: values or codes [N, K]       w[1]: group or block scales     w[2]: row scales
    BF16         bf16 [N, K]                        None                            None
    FP8_BLOCK    e4m3 as uint8 [N, K]               fp32 [N/128, K/128]             None
    FP8_ROW      e4m3 as uint8 [N, K]               None                            fp32 [N]
    MXFP8        e4m3 as uint8 [N, K]               e8m0 as uint8 [N, K/32]         None
    NVFP4        two e2m1 per uint8 [N, K/2]        e4m3 as uint8 [N, K/16]         fp32 [N]
    MXFP4        two e2m1 per uint8 [N, K/2]        e8m0 as uint8 [N, K/32]         None

Tiles are transposed, [columns of the output, rows of x]: the product is w @ x.T. Weights are then the first operand of
the dot, which tensor cores take from registers, where they have just been decoded.

Arguments of the helpers: cols [R] are rows of the matrix, which are columns of its output; start_k [R] is where in K
each of them begins; rows are rows of x.
"""

import triton
import triton.language as tl

from .formats import ACTIVATIONS, MX_GROUP, NVFP4_GROUP, Format
from .formats import SCALE_BLOCK as _SCALE_BLOCK

BF16, FP8_BLOCK, FP8_ROW, MXFP8, NVFP4, MXFP4 = (tl.constexpr(code) for code in range(len(Format)))
UNCHANGED, FP8, FP8_UE8M0 = (tl.constexpr(code) for code in range(len(ACTIVATIONS)))
SCALE_BLOCK = tl.constexpr(_SCALE_BLOCK)
GROUP_16, GROUP_32 = tl.constexpr(NVFP4_GROUP), tl.constexpr(MX_GROUP)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def decode_e4m3(codes):
    """e4m3 codes (uint8) to fp32, exactly, subnormals included. 0x7F and 0xFF are +-480."""
    bits = codes.to(tl.int32)
    # Moved to fp32's places, sign, exponent and mantissa read as value * 2**-120: the exponent biases are 7 and 127.
    value = ((bits & 0x80) << 24 | (bits & 0x7F) << 20).to(tl.float32, bitcast=True)
    return value * 1.329227995784916e36


@triton.jit
def decode_e2m1(codes):
    """e2m1 codes (the low four bits of uint8) to fp32, exactly."""
    bits = codes.to(tl.int32)
    # The exponent biases are 1 and 127: value * 2**-126.
    value = ((bits & 0x8) << 28 | (bits & 0x7) << 22).to(tl.float32, bitcast=True)
    return value * 8.507059173023462e37


@triton.jit
def decode_e8m0(codes):
    """e8m0 codes (uint8, no NaN) to fp32, exactly."""
    # The exponent biases are both 127. Code 0 is 2**-127, a subnormal in fp32.
    return tl.maximum(codes.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def quantize(x, AXIS: tl.constexpr, ACTIVATION: tl.constexpr):
    """Rounds x to e4m3 as DeepSeek's W8A8 does: returns values and scales, both fp32.

    AXIS of x is a group of 128 along K. Its scale is max(amax, 1e-4) / 448, rounded up to a power of two for
    FP8_UE8M0. Negative zero becomes zero.
    """
    tl.static_assert(x.shape[AXIS] == SCALE_BLOCK)
    x = x.to(tl.float32)
    scale = tl.div_rn(tl.maximum(tl.max(tl.abs(x), AXIS, keep_dims=True), 1e-4), 448.0)
    if ACTIVATION == FP8_UE8M0:
        scale = (scale.to(tl.int32, bitcast=True) + 0x7FFFFF & 0x7F800000).to(tl.float32, bitcast=True)
    value = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    # e4m3 keeps 3 mantissa bits, and multiples of 2**-9 below 2**-6. Adding 1.5 * 2**20 times the power of two of a
    # value leaves just these bits in fp32, rounded to nearest even.
    exponent = tl.maximum(value.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000)
    large = (exponent + 0xA400000).to(tl.float32, bitcast=True)
    return value + large - large, scale


@triton.jit
def _load_group_scales(
    sf_ptr, cols, start_k, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    IS_E8M0: tl.constexpr,
):  # fmt: skip
    """[R, BLOCK_K / GROUP] fp32."""
    groups = start_k[:, None] // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
    inside = (cols < N)[:, None] & (groups < tl.cdiv(K, GROUP))
    codes = tl.load(sf_ptr + cols[:, None] * tl.cdiv(K, GROUP) + groups, mask=inside, other=0)
    if IS_E8M0:
        return decode_e8m0(codes)
    else:
        return decode_e4m3(codes)


@triton.jit
def _scale_groups(values, scales):
    """[R, C] values times [R, G] scales, each of which covers C / G neighbors."""
    R: tl.constexpr = values.shape[0]
    C: tl.constexpr = values.shape[1]
    G: tl.constexpr = scales.shape[1]
    return tl.reshape(tl.reshape(values, (R, G, C // G)) * scales[:, :, None], (R, C))


@triton.jit
def load_weights(
    w, cols, start_k, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr, DOT: tl.constexpr
):
    """[R, BLOCK_K] in dtype DOT, decoded exactly; zeros beyond N and K.

    Applies the scales of groups. Scales of blocks and rows, which bf16 cannot hold, are left to the fp32 sums.
    """
    if FORMAT == NVFP4 or FORMAT == MXFP4:
        GROUP: tl.constexpr = GROUP_16 if FORMAT == NVFP4 else GROUP_32
        pairs = start_k[:, None] // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
        inside = (cols < N)[:, None] & (pairs < K // 2)
        codes = tl.load(w[0] + cols[:, None] * (K // 2) + pairs, mask=inside, other=0)
        scales = _load_group_scales(w[1], cols, start_k, N, K, BLOCK_K, GROUP, FORMAT == MXFP4)
        even = _scale_groups(decode_e2m1(codes & 0xF), scales).to(DOT)
        odd = _scale_groups(decode_e2m1(codes >> 4), scales).to(DOT)
        return tl.reshape(tl.join(even, odd), (cols.shape[0], BLOCK_K))
    else:
        offs_k = start_k[:, None] + tl.arange(0, BLOCK_K)[None, :]
        codes = tl.load(w[0] + cols[:, None] * K + offs_k, mask=(cols < N)[:, None] & (offs_k < K), other=0)
        if FORMAT == BF16:
            return codes.to(DOT)
        else:
            values = decode_e4m3(codes)
            if FORMAT == MXFP8:
                scales = _load_group_scales(w[1], cols, start_k, N, K, BLOCK_K, GROUP_32, True)
                values = _scale_groups(values, scales)
            return values.to(DOT)


@triton.jit
def load_block_scales(w, cols, start_k, N: tl.constexpr, K: tl.constexpr):
    """[R] fp32, of the 128x128 block that holds start_k. Past K, where weights are zero, any scale will do."""
    block_k = tl.minimum(start_k, K - 1) // SCALE_BLOCK
    return tl.load(w[1] + cols // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK) + block_k, mask=cols < N, other=0.0)


@triton.jit
def dot(w, x, PRECISION: tl.constexpr):
    """w @ x over one block of K, to be added outside the tensor core.

    Tensor cores truncate when they accumulate, which shows over the hundreds of steps of a full K. The compiler moves
    the addition back into them unless max_num_imprecise_acc names a length.
    """
    return tl.dot(w, x, input_precision=PRECISION, max_num_imprecise_acc=w.shape[-1])


@triton.jit
def tile_offsets(COLS: tl.constexpr, ROWS: tl.constexpr):
    """[COLS, ROWS] offsets into a contiguous tile."""
    return tl.arange(0, COLS)[:, None] * ROWS + tl.arange(0, ROWS)[None, :]


@triton.jit
def store_tile(out_ptr, tile, w, cols, rows, M, N: tl.constexpr, stride_om, FACTOR: tl.constexpr):
    """Stores [columns, rows] fp32 sums, times row scales and FACTOR, to out [M, N]."""
    if w[2] is not None:
        tile *= tl.load(w[2] + cols, mask=cols < N, other=0.0)[:, None]
    if FACTOR != 1:
        tile *= FACTOR
    if INTERPRETED and out_ptr.dtype.element_ty == tl.bfloat16:
        # The interpreter truncates where GPUs round to nearest even.
        bits = tile.to(tl.int32, bitcast=True)
        tile = tl.where(tile == tile, (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True), tile)
    out = out_ptr + rows[None, :].to(tl.int64) * stride_om + cols[:, None]
    tl.store(out, tile, mask=(rows < M)[None, :] & (cols < N)[:, None])


@triton.jit
def wait_for_dependencies(PDL: tl.constexpr):
    """Programmatic dependent launch: what earlier kernels write (x, the workspace) is visible from here on."""
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Programmatic dependent launch: lets the next kernel begin; it waits as this one did."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def last_to_arrive(arrived_ptr, SPLIT_K: tl.constexpr, AMD: tl.constexpr):
    """Counts this program's stored partials in; True for the last program of the tile.

    The last one sees all partials (acq_rel) and must reset the counter to zero.
    """
    if AMD:
        # The barrier alone does not make a wave wait for its own stores there.
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1",
            "=v,v,~{memory}",
            [tl.arange(0, 64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    # The stores of all warps precede the release, which one thread does.
    tl.debug_barrier()
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1


@triton.jit
def sum_splits(partial_ptr, stride_split, SPLIT_K: tl.constexpr, COLS: tl.constexpr, ROWS: tl.constexpr):
    """[COLS, ROWS] fp32, summed in the order of the splits: two runs give the same bits."""
    partials = partial_ptr + tile_offsets(COLS, ROWS)
    total = tl.load(partials)
    # Loads all splits of a small tile at once; those of a large one would not fit the registers.
    UNROLL: tl.constexpr = SPLIT_K if COLS * ROWS <= 1024 else 2
    for split in tl.range(1, SPLIT_K, loop_unroll_factor=UNROLL):
        total += tl.load(partials + split * stride_split)
    return total
