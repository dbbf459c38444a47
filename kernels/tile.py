"""What the kernels share: load and decode weights, multiply, store an output tile, sum the K splits.

A matrix reaches a kernel as a tuple w of three pointers and a format (a compile-time integer): values w[0], scales of
groups or blocks w[1] and scales of rows w[2], see `Matrix` in matrix.py. Codes and 8-bit scales are uint8; None stands
for a tensor that the format does not have.

In split_k tiles are transposed, [columns of the output, rows of x]: the product is w @ x.T. Weights are then the first
operand of the dot, which tensor cores take from registers, where they have just been decoded.

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
    return value * 1.329227995784916e36  # 2**120


@triton.jit
def decode_e2m1(codes):
    """e2m1 codes (the low four bits of uint8) to fp32, exactly."""
    bits = codes.to(tl.int32)
    # The exponent biases are 1 and 127: value * 2**-126.
    value = ((bits & 0x8) << 28 | (bits & 0x7) << 22).to(tl.float32, bitcast=True)
    return value * 8.507059173023462e37  # 2**126


@triton.jit
def decode_e8m0(codes):
    """e8m0 codes (uint8, no NaN) to fp32, exactly."""
    # The exponent biases are both 127. Code 0 is 2**-127, a subnormal in fp32.
    return tl.maximum(codes.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)


# Prefill decodes in PTX, two codes per 32-bit register: 2.5 instructions per e4m3 code instead of 8. Codes start in the
# upper byte of a bf16 and move right by `shift`; `magnitude` masks exponent and mantissa there, and `factor` is the
# power of two, in both halves. x * y + -0.0 is x * y; sm_80 has no mul.bf16x2.
def _decode_pair(out: str, shift: int, magnitude: str, factor: str) -> str:
    return f"""
    shr.u32 bits, pair, {shift};
    and.b32 bits, bits, {magnitude};
    and.b32 sign, pair, 0x80008000;
    or.b32 bits, bits, sign;
    mov.b32 factor, {factor};
    fma.rn.bf16x2 {out}, bits, factor, zero;"""


_E4M3, _E2M1 = (4, "0x07F007F0", "0x7B807B80"), (6, "0x01C001C0", "0x7E807E80")
_SETUP = ".reg .b32 pair, bits, sign, factor, zero;\n    mov.b32 zero, 0x80008000;"
DECODE_E4M3_PTX = tl.constexpr(f"""{{
    {_SETUP}
    prmt.b32 pair, 0, $2, 0x5140;{_decode_pair("$0", *_E4M3)}
    prmt.b32 pair, 0, $2, 0x7362;{_decode_pair("$1", *_E4M3)}
}}""")
# Codes in the lower halves of four bytes to $0 and $1, in the upper halves to $2 and $3.
DECODE_E2M1_PTX = tl.constexpr(f"""{{
    {_SETUP}
    prmt.b32 pair, 0, $4, 0x5140;{_decode_pair("$2", *_E2M1)}
    shl.b32 pair, pair, 4;{_decode_pair("$0", *_E2M1)}
    prmt.b32 pair, 0, $4, 0x7362;{_decode_pair("$3", *_E2M1)}
    shl.b32 pair, pair, 4;{_decode_pair("$1", *_E2M1)}
}}""")


@triton.jit
def decode_e4m3_packed(codes):
    """e4m3 codes (uint8) to bf16, exactly: the same values as `decode_e4m3`."""
    return tl.inline_asm_elementwise(DECODE_E4M3_PTX, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4)


@triton.jit
def decode_e2m1_packed(codes):
    """Two e2m1 codes per uint8 to two bf16 tensors, those of the lower and of the upper halves, exactly."""
    return tl.inline_asm_elementwise(
        DECODE_E2M1_PTX, "=&r,=&r,=&r,=&r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
    )


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
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    value = tl.div_rn(x, tl.broadcast_to(scale, x.shape))
    # e4m3 keeps 3 mantissa bits, and multiples of 2**-9 below 2**-6. Adding 1.5 * 2**20 times the power of two of a
    # value leaves just these bits in fp32, rounded to nearest even.
    exponent = tl.maximum(value.to(tl.int32, bitcast=True) & 0x7F800000, 0x3C800000)
    large = (exponent + 0xA400000).to(tl.float32, bitcast=True)
    return value + large - large, scale


@triton.jit
def load_codes(w, cols, start_k, N: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, FORMAT: tl.constexpr):
    """Values or codes [R, BLOCK_K], or BLOCK_K/2 bytes for 4-bit formats, and [R, groups] codes of group scales.

    Zeros beyond N and K. Without group scales, the codes stand in their place, as callers unpack two tensors. `decode`
    is a separate function, so that other loads can be issued before these arrive.
    """
    PER_BYTE: tl.constexpr = 2 if FORMAT == NVFP4 or FORMAT == MXFP4 else 1
    SIZE: tl.constexpr = K // PER_BYTE
    offs_k = start_k[:, None] // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)[None, :]
    codes = tl.load(w[0] + cols[:, None] * SIZE + offs_k, mask=(cols < N)[:, None] & (offs_k < SIZE), other=0)
    if FORMAT == NVFP4 or FORMAT == MXFP4 or FORMAT == MXFP8:
        GROUP: tl.constexpr = GROUP_16 if FORMAT == NVFP4 else GROUP_32
        groups = start_k[:, None] // GROUP + tl.arange(0, BLOCK_K // GROUP)[None, :]
        inside = (cols < N)[:, None] & (groups < tl.cdiv(K, GROUP))
        return codes, tl.load(w[1] + cols[:, None] * tl.cdiv(K, GROUP) + groups, mask=inside, other=0)
    else:
        return codes, codes


@triton.jit
def _scale_groups(values, scales):
    """[R, C] values times [R, G] scales, each of which covers C / G neighbors."""
    R: tl.constexpr = values.shape[0]
    C: tl.constexpr = values.shape[1]
    G: tl.constexpr = scales.shape[1]
    return values * tl.reshape(tl.broadcast_to(scales[:, :, None], (R, G, C // G)), (R, C)).to(values.dtype)


@triton.jit
def decode(codes, group_scales, FORMAT: tl.constexpr, DOT: tl.constexpr, PACKED: tl.constexpr = False):
    """[R, BLOCK_K] in dtype DOT, exactly, from what `load_codes` returns.

    Applies the scales of groups. Scales of blocks and rows, which bf16 cannot hold, are left to the fp32 sums. PACKED
    needs bf16 and an NVIDIA GPU.
    """
    if FORMAT == BF16:
        return codes.to(DOT)
    elif FORMAT == FP8_BLOCK or FORMAT == FP8_ROW:
        return decode_e4m3_packed(codes) if PACKED else decode_e4m3(codes).to(DOT)
    else:
        scales = decode_e4m3(group_scales) if FORMAT == NVFP4 else decode_e8m0(group_scales)
        if FORMAT == MXFP8:
            return _scale_groups(decode_e4m3_packed(codes) if PACKED else decode_e4m3(codes), scales).to(DOT)
        else:
            if PACKED:
                even, odd = decode_e2m1_packed(codes)
            else:
                even, odd = decode_e2m1(codes & 0xF), decode_e2m1(codes >> 4)
            pairs = tl.join(_scale_groups(even, scales).to(DOT), _scale_groups(odd, scales).to(DOT))
            return tl.reshape(pairs, (codes.shape[0], 2 * codes.shape[1]))


@triton.jit
def load_block_scales(w, cols, start_k, N: tl.constexpr, K: tl.constexpr):
    """[R] fp32, of the 128x128 block that holds start_k. Past K, where weights are zero, any scale will do."""
    block_k = tl.minimum(start_k, K - 1) // SCALE_BLOCK
    return tl.load(w[1] + cols // SCALE_BLOCK * tl.cdiv(K, SCALE_BLOCK) + block_k, mask=cols < N, other=0.0)


@triton.jit
def dot(a, b, AMD: tl.constexpr):
    """a @ b over one block of K, to be added outside the tensor core.

    Tensor cores truncate when they accumulate, which shows over the hundreds of steps of a full K. The compiler moves
    the addition back into them unless max_num_imprecise_acc names a length.
    """
    PRECISION: tl.constexpr = "ieee" if AMD else "tf32"  # of fp32 operands
    return tl.dot(a, b, input_precision=PRECISION, max_num_imprecise_acc=a.shape[-1])


@triton.jit
def offsets(R: tl.constexpr, C: tl.constexpr):
    """[R, C] offsets into a contiguous tile."""
    return tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :]


@triton.jit
def load_row_scales(w, cols, N: tl.constexpr):
    """[R] fp32, ones for a format without row scales."""
    if w[2] is None:
        return tl.full(cols.shape, 1.0, tl.float32)
    else:
        return tl.load(w[2] + cols, mask=cols < N, other=0.0)


@triton.jit
def store(out_ptr, tile, rows, cols, M, N: tl.constexpr, stride_om):
    """Stores fp32 sums to out [M, N]. rows and cols broadcast to the shape of the tile."""
    if INTERPRETED and out_ptr.dtype.element_ty == tl.bfloat16:
        # The interpreter truncates where GPUs round to nearest even.
        bits = tile.to(tl.int32, bitcast=True)
        tile = tl.where(tile == tile, (bits + 0x7FFF + (bits >> 16 & 1)).to(tl.float32, bitcast=True), tile)
    tl.store(out_ptr + rows.to(tl.int64) * stride_om + cols, tile, mask=(rows < M) & (cols < N))


@triton.jit
def last_to_arrive(arrived_ptr, SPLIT_K: tl.constexpr, AMD: tl.constexpr):
    """Marks this program's partials as stored; True for the last program of the tile.

    The last one sees all partials (acq_rel) and must reset the counter to zero.
    """
    if AMD:
        # The barrier alone does not make a wavefront wait for its own stores there.
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\n\tv_mov_b32 $0, $1", "=v,v,~{memory}", [tl.arange(0, 64)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    # The stores of all warps precede the release, which one thread does.
    tl.debug_barrier()
    return tl.atomic_add(arrived_ptr, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1


@triton.jit
def sum_splits(partial_ptr, stride_split, own, split, SPLIT_K: tl.constexpr):
    """The sum of the partial tiles of all splits, in their order: two runs give the same bits. own is this split's."""
    R: tl.constexpr = own.shape[0]
    C: tl.constexpr = own.shape[1]
    partials = partial_ptr + offsets(R, C)
    if SPLIT_K == 2:  # either order gives the same bits
        return own + tl.load(partials + (1 - split) * stride_split)
    else:
        total = tl.load(partials)
        # Loads all splits of a small tile at once; those of a large one would not fit the registers.
        UNROLL: tl.constexpr = SPLIT_K if R * C <= 1024 else 2
        for other in tl.range(1, SPLIT_K, loop_unroll_factor=UNROLL):
            total += tl.load(partials + other * stride_split)
        return total
