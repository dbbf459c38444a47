"""Layouts: what they accept, and that dequantize() is the inverse of quantizing."""

import pytest
import torch

from indexproj.indexer.cli.synthetic import quantize_blocks, random_weight
from indexproj.kernels import DenseMatrix, Format, Fp4Matrix, Fp8Matrix, ProjectionWeights
from indexproj.kernels.formats import operand_layout, parse_pair
from indexproj.kernels.weights import joined
from support import dense, random_matrix, same, weights

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
CODES, FP4 = torch.zeros(130, 300).to(E4M3), torch.zeros(8, 24, dtype=torch.uint8)
GROUPS = {Format.FP8_BLOCK: (128, 128), Format.FP8_ROW: (1, 300), Format.NVFP4: (1, 16)}  # else (1, 32)


def ones(*shape, dtype=FP32):
    return torch.ones(shape).to(dtype)


def spread(scale, format, n, k):
    """[N, K]: the scale of each value."""
    rows, columns = GROUPS.get(format, (1, 32))
    return scale[torch.arange(n) // rows][:, torch.arange(k) // columns]


@pytest.mark.parametrize("format", list(Format)[1:], ids=str)
def test_values_are_codes_times_scales(format):
    """In fp64 that is exact, in fp32 each scale rounds."""
    matrix = random_matrix(format, 130, 300)
    for dtype in (FP64, FP32):
        if isinstance(matrix, Fp4Matrix):  # the even column in the low half
            e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=dtype)
            values = e2m1[torch.stack((matrix.codes % 16, matrix.codes // 16), -1).flatten(1).int()]
        else:
            values = matrix.codes.to(dtype)
        values *= spread(matrix.scale.to(dtype), format, 130, 300)
        if format == Format.NVFP4:
            values *= matrix.global_scale.to(dtype)
        assert torch.equal(matrix.dequantize(dtype), values)
    assert torch.equal(matrix.dequantize(BF16), values.bfloat16())


@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (1, 1)])
def test_quantize_blocks_error_is_half_a_step(shape):
    weight = random_weight(*shape, torch.default_generator)
    codes, scale = quantize_blocks(weight)
    step = torch.maximum(weight.abs() / 8, 2**-9 * scale.max())  # 3 mantissa bits, or the subnormal step
    assert ((Fp8Matrix(codes, scale).dequantize() - weight).abs() <= step / 2 * 1.001).all()
    assert codes.float().abs().max() == 448


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DenseMatrix(ones(2, 2)), TypeError, "expected torch.bfloat16, got torch.float32"),
        (lambda: DenseMatrix(ones(2, dtype=BF16)), ValueError, "non-empty 2-D"),
        (lambda: DenseMatrix(ones(0, 2, dtype=BF16)), ValueError, "non-empty 2-D"),
        (lambda: DenseMatrix(ones(3, 2, dtype=BF16).T), ValueError, "call .contiguous()"),
        (lambda: Fp8Matrix(CODES.view(torch.uint8), ones(2, 3)), TypeError, "float8_e4m3fn"),
        (lambda: Fp8Matrix(CODES.view(torch.float8_e4m3fnuz), ones(2, 3)), TypeError, "e4m3fn, got .*e4m3fnuz"),
        (lambda: Fp8Matrix(CODES, ones(2, 3).double()), TypeError, "Fp8Matrix.scale: expected torch.float32"),
        (lambda: Fp8Matrix(CODES, ones(1, 2)), ValueError, r"\[2, 3\] or \[130, 1\] for a matrix \[130, 300\]"),
        (lambda: Fp8Matrix(CODES, ones(130, 9, dtype=E8M0)), ValueError, r"expected \[130, 10\] for a matrix"),
        (lambda: Fp8Matrix(CODES, ones(2, 3).to("meta")), ValueError, "expected it on cpu"),
        (lambda: Fp4Matrix(FP4.char(), ones(8, 3, dtype=E4M3), ones(8, 1)), TypeError, "torch.uint8"),
        (lambda: Fp4Matrix(FP4, ones(8, 3), ones(8, 1)), TypeError, "Fp4Matrix.scale: expected"),
        (lambda: Fp4Matrix(FP4, ones(8, 2, dtype=E4M3), ones(8, 1)), ValueError, r"\[8, 3\] for a matrix"),
        (lambda: Fp4Matrix(FP4, ones(8, 3, dtype=E8M0)), ValueError, r"expected \[8, 2\] for a matrix"),
        (lambda: Fp4Matrix(FP4, ones(8, 3, dtype=E4M3)), TypeError, "None with torch.float8_e4m3fn"),
        (lambda: Fp4Matrix(FP4, ones(8, 2, dtype=E8M0), ones(8, 1)), TypeError, "one with torch.float8_e8m0fnu"),
        (lambda: Fp4Matrix(FP4, ones(8, 3, dtype=E4M3), ones(1, 1)), ValueError, r"expected \[8, 1\] for a matrix"),
        (lambda: Fp4Matrix(FP4, ones(8, 2, dtype=E8M0).to("meta")), ValueError, "expected it on cpu"),
        (lambda: ProjectionWeights(dense(8, 4), dense(8, 5)), ValueError, "differ in K"),
        (lambda: ProjectionWeights.pack(dense(8, 4), dense(8, 5)), ValueError, "differ in K"),
        (lambda: ProjectionWeights(dense(8, 4), dense(8, 4).map(to_meta)), ValueError, "gate is on meta"),
        (lambda: random_matrix(Format.FP8_BLOCK, 130, 4).rows(3, 5), ValueError, "of 128, as 128 rows share .* got 3"),
        (lambda: parse_pair("INT4, BF16"), ValueError, "INT4"),
    ],
)
def test_wrong_dtypes_shapes_and_devices_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def to_meta(tensor):
    return tensor.to("meta")


@pytest.mark.parametrize("format", Format, ids=str)
def test_every_format_has_views_copies_and_operands(format):
    matrix = random_matrix(format, 256, 96)
    values = matrix.dequantize(FP64)
    assert parse_pair(f"{format}, BF16") == (matrix.format, Format.BF16) == (format, Format.BF16)
    assert values.shape == matrix.shape == (256, 96)
    assert matrix.nbytes == sum(tensor.nbytes for tensor in matrix.tensors)
    found = tuple(operand if operand is None else (operand.dtype, tuple(operand.shape)) for operand in matrix.operands)
    assert found == operand_layout(format, 256, 96)
    copy = matrix.map(torch.clone)
    assert same(copy, matrix)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copy.tensors, matrix.tensors, strict=True))
    for start, stop in ((128, 200), (0 if format == Format.FP8_BLOCK else 3, 5)):
        assert torch.equal(matrix.rows(start, stop).dequantize(FP64), values[start:stop])
        assert matrix.rows(start, stop).tensors[0].data_ptr() == matrix.tensors[0][start:].data_ptr()
    assert matrix.matches(copy)
    assert not matrix.matches(matrix.map(to_meta))
    assert not matrix.matches(matrix.rows(0, 128))
    assert [other for other in Format if matrix.matches(random_matrix(other, 256, 96))] == [format]


@pytest.mark.parametrize("format", [Format.FP8_BLOCK, Format.FP8_ROW, Format.MXFP8], ids=str)
def test_fnuz_codes_keep_their_bits_and_halve_the_scale(format):
    """Every code but NaN (0x80) against torch's own value of it."""
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    bits[0x80] = 0
    codes = bits.view(4, 64).repeat(1, 2).view(torch.float8_e4m3fnuz)
    scale = random_matrix(format, 4, 128).scale
    matrix = Fp8Matrix.from_e4m3fnuz(codes, scale)
    assert torch.equal(matrix.codes.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(matrix.dequantize(FP64), codes.double() * spread(scale.double(), format, 4, 128))
    lowest = Fp8Matrix.from_e4m3fnuz(codes[:, :32].contiguous(), torch.zeros(4, 1, dtype=torch.uint8).view(E8M0))
    assert not lowest.scale.view(torch.uint8).any()


def test_copy_keeps_pointers():
    for pair in ("BF16, BF16", "FP8 128x128, BF16"):
        live, new = weights(pair, (128, 16, 256)), weights(pair, (128, 16, 256))
        pointers = [tensor.data_ptr() for matrix in (live.wk, live.gate) for tensor in matrix.tensors]
        live.copy_(new)
        assert same(live.wk, new.wk)
        assert same(live.gate, new.gate)
        assert [tensor.data_ptr() for matrix in (live.wk, live.gate) for tensor in matrix.tensors] == pointers
    for pair in ("BF16, BF16", "FP8 128x128, FP8 128x128"):
        with pytest.raises(ValueError, match="copy_: expected"):
            live.copy_(weights(pair, (128, 16, 256)))


def test_pack_puts_dense_matrices_into_one_buffer():
    wk, gate = dense(128, 64), dense(16, 64)
    packed = ProjectionWeights.pack(wk, gate)
    assert same(packed.wk, wk)
    assert same(packed.gate, gate)
    assert torch.equal(packed.fused_weight, torch.cat((wk.weight, gate.weight)))
    assert packed.fused_weight.data_ptr() == packed.wk.weight.data_ptr()
    assert packed.nbytes == packed.fused_weight.nbytes
    assert ProjectionWeights.pack(packed.wk, packed.gate).fused_weight.data_ptr() == packed.wk.weight.data_ptr()
    moved = packed.map(torch.clone)
    assert moved.fused_weight.data_ptr() == moved.wk.weight.data_ptr() != packed.wk.weight.data_ptr()
    assert torch.equal(moved.fused_weight, packed.fused_weight)
    assert ProjectionWeights(wk, gate).fused_weight is None
    mixed = weights("FP8 128x128, BF16", (128, 16, 64))
    assert mixed.fused_weight is None
    assert same(mixed.map(torch.clone).wk, mixed.wk)
    assert same(mixed.map(torch.clone).gate, mixed.gate)
    assert mixed.nbytes == 128 * 64 + 4 + 2 * 16 * 64


def test_joined_needs_consecutive_slices_of_one_tensor():
    buffer = torch.arange(40 * 64.0).bfloat16().view(40, 64)
    assert torch.equal(joined((buffer[:, :16], buffer[:, 16:40]), 1), buffer[:, :40])
    for other in (
        buffer.view(-1).as_strided((40, 24), (24, 1), 16),  # other rows
        buffer.view(torch.float16)[:, 16:40],
        buffer[:, 17:40],
        buffer.clone()[:, 16:40],
    ):
        assert joined((buffer[:, :16], other), 1) is None
    assert torch.equal(joined((buffer[:16], buffer[16:20]), 0), buffer[:20])
    for first, other in ((buffer[:16], buffer[18:20]), (buffer[4:20], buffer[:4]), (buffer[:16], buffer.clone()[16:])):
        assert joined((first, other), 0) is None


def test_operands_follow_the_memory_of_parameters():
    """Engines move parameters by assigning to `data`."""
    codes = torch.nn.Parameter(torch.zeros(128, 128, dtype=E4M3), requires_grad=False)
    matrix = Fp8Matrix(codes, ones(1, 1))
    codes.data = ones(128, 128, dtype=E4M3)
    assert torch.equal(matrix.operands[0].view(E4M3).float(), ones(128, 128))
