"""Layouts: what they accept, and that dequantize() is the inverse of quantizing."""

import pytest
import torch

from indexproj.indexer.cli.synthetic import quantize_blocks, random_matrix, random_weight
from indexproj.kernels import DenseMatrix, Format, Fp4Matrix, Fp8Matrix, ProjectionWeights, reference
from indexproj.kernels.formats import operand_layout, parse_pair
from indexproj.kernels.weights import joined
from support import dense, fp8, same, weights

CODES = torch.zeros(130, 300, dtype=torch.float8_e4m3fn)
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
FP4 = torch.zeros(8, 24, dtype=torch.uint8)


def test_fp8_block_scales():
    codes = torch.ones(130, 300).to(torch.float8_e4m3fn)
    matrix = Fp8Matrix(codes, torch.arange(1.0, 7).view(2, 3))
    values = matrix.dequantize()
    for row, column, value in ((0, 0, 1), (127, 127, 1), (127, 128, 2), (0, 299, 3), (128, 0, 4), (129, 256, 6)):
        assert values[row, column] == value


def test_dequantize_to_fp64_is_exact_and_to_fp32_rounds_once():
    matrix = fp8(128, 256)
    exact = matrix.dequantize(torch.float64)
    assert torch.equal(exact, matrix.codes.double() * matrix.scale.double().repeat_interleave(128, 1))
    assert torch.equal(matrix.dequantize(), exact.float())
    assert torch.equal(matrix.dequantize(torch.bfloat16), exact.float().bfloat16())


@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (1, 1)])
def test_quantize_blocks_error_is_half_a_step(shape):
    weight = random_weight(*shape, torch.default_generator)
    codes, scale = quantize_blocks(weight)
    matrix = Fp8Matrix(codes, scale)
    step = torch.maximum(weight.abs() / 8, 2**-9 * scale.max())  # 3 mantissa bits, or the subnormal step
    assert ((matrix.dequantize() - weight).abs() <= step / 2 * 1.001).all()
    assert codes.float().abs().max() == 448


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DenseMatrix(torch.zeros(2, 2)), TypeError, "expected torch.bfloat16, got torch.float32"),
        (lambda: DenseMatrix(torch.zeros(2, dtype=torch.bfloat16)), ValueError, "non-empty 2-D"),
        (lambda: DenseMatrix(torch.zeros(0, 2, dtype=torch.bfloat16)), ValueError, "non-empty 2-D"),
        (lambda: DenseMatrix(torch.zeros(3, 2, dtype=torch.bfloat16).T), ValueError, "call .contiguous()"),
        (lambda: Fp8Matrix(CODES.view(torch.uint8), torch.zeros(2, 3)), TypeError, "float8_e4m3fn"),
        (lambda: Fp8Matrix(CODES, torch.zeros(2, 3).double()), TypeError, "Fp8Matrix.scale: expected torch.float32"),
        (
            lambda: Fp8Matrix(CODES, torch.zeros(1, 2)),
            ValueError,
            r"expected \[2, 3\] or \[130, 1\] for a matrix \[130, 300\]",
        ),
        (lambda: Fp8Matrix(CODES, torch.zeros(130, 9).to(E8M0)), ValueError, r"expected \[130, 10\] for a matrix"),
        (lambda: Fp8Matrix(CODES, torch.zeros(2, 3, device="meta")), ValueError, "expected it on cpu"),
        (
            lambda: Fp4Matrix(FP4.view(torch.int8), torch.ones(8, 3).to(E4M3), torch.ones(8, 1)),
            TypeError,
            "torch.uint8",
        ),
        (lambda: Fp4Matrix(FP4, torch.ones(8, 3), torch.ones(8, 1)), TypeError, "Fp4Matrix.scale: expected"),
        (
            lambda: Fp4Matrix(FP4, torch.ones(8, 2).to(E4M3), torch.ones(8, 1)),
            ValueError,
            r"expected \[8, 3\] for a matrix",
        ),
        (lambda: Fp4Matrix(FP4, torch.ones(8, 3).to(E8M0)), ValueError, r"expected \[8, 2\] for a matrix"),
        (lambda: Fp4Matrix(FP4, torch.ones(8, 3).to(E4M3)), TypeError, "None with torch.float8_e4m3fn"),
        (
            lambda: Fp4Matrix(FP4, torch.ones(8, 2).to(E8M0), torch.ones(8, 1)),
            TypeError,
            "one with torch.float8_e8m0fnu",
        ),
        (
            lambda: Fp4Matrix(FP4, torch.ones(8, 3).to(E4M3), torch.ones(1, 1)),
            ValueError,
            r"expected \[8, 1\] for a matrix",
        ),
        (lambda: Fp4Matrix(FP4, torch.ones(8, 2).to(E8M0).to("meta")), ValueError, "expected it on cpu"),
        (lambda: ProjectionWeights(dense(8, 4), dense(8, 5)), ValueError, "differ in K"),
        (lambda: ProjectionWeights.pack(dense(8, 4), dense(8, 5)), ValueError, "differ in K"),
        (
            lambda: ProjectionWeights(dense(8, 4), dense(8, 4).map(lambda t: t.to("meta"))),
            ValueError,
            "gate is on meta",
        ),
    ],
)
def test_matrix_refuses_wrong_dtypes_shapes_and_devices(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_row_scales_and_mx_scales():
    codes = torch.ones(3, 70).to(E4M3)
    rows = Fp8Matrix(codes, torch.tensor([[1.0], [2.0], [4.0]]))
    assert torch.equal(rows.dequantize(), torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 70))
    groups = Fp8Matrix(codes, torch.exp2(torch.arange(9.0)).view(3, 3).to(E8M0))
    for row, column, value in ((0, 0, 1), (0, 31, 1), (0, 32, 2), (0, 69, 4), (2, 64, 256)):
        assert groups.dequantize()[row, column] == value


def test_fp4_codes_and_scales():
    """Every code once, the even column in the low half; groups of 16, then of 32."""
    codes = torch.arange(0, 256, 17, dtype=torch.int32).to(torch.uint8)  # 0x00, 0x11, ... 0xff
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = torch.cat((values, -values)).repeat_interleave(2)
    scale = torch.tensor([[1.5, 0.25]])
    nvfp4 = Fp4Matrix(codes.view(1, 16), scale.to(E4M3), torch.tensor([[3.0]]))
    assert torch.equal(nvfp4.dequantize(), (expected * 3 * scale.repeat_interleave(16)).view(1, 32))
    mxfp4 = Fp4Matrix(codes.view(1, 16), torch.tensor([[0.125]]).to(E8M0))
    assert torch.equal(mxfp4.dequantize(), (expected * 0.125).view(1, 32))
    assert Fp4Matrix(torch.tensor([[0x72]], dtype=torch.uint8), torch.ones(1, 1).to(E8M0)).dequantize().tolist() == [
        [1, 6]
    ]


@pytest.mark.parametrize("format", Format, ids=str)
def test_every_format_has_views_copies_and_operands(format):
    matrix = random_matrix(format, 256, 96)
    values = matrix.dequantize(torch.float64)
    assert values.shape == matrix.shape == (256, 96)
    assert matrix.format == format
    assert matrix.nbytes == sum(tensor.nbytes for tensor in matrix.tensors)
    found = tuple(operand if operand is None else (operand.dtype, tuple(operand.shape)) for operand in matrix.operands)
    assert found == operand_layout(format, 256, 96)
    copy = matrix.map(torch.clone)
    assert same(copy, matrix)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copy.tensors, matrix.tensors, strict=True))
    assert torch.equal(matrix.rows(128, 200).dequantize(torch.float64), values[128:200])
    assert matrix.rows(128, 200).tensors[0].data_ptr() == matrix.tensors[0][128:].data_ptr()
    assert matrix.matches(copy)
    assert not matrix.matches(matrix.map(lambda tensor: tensor.to("meta")))
    assert not matrix.matches(matrix.rows(0, 128))
    assert [other for other in Format if matrix.matches(random_matrix(other, 256, 96))] == [format]
    if format != Format.FP8_BLOCK:
        assert torch.equal(matrix.rows(3, 5).dequantize(torch.float64), values[3:5])
    else:
        with pytest.raises(ValueError, match="multiple of 128, as 128 rows share scales, got 3"):
            matrix.rows(3, 5)


def test_parse_pair():
    assert parse_pair("FP8 128x128, BF16") == (Format.FP8_BLOCK, Format.BF16)
    assert [str(format) for format in parse_pair("FP8 per row, NVFP4")] == ["FP8 per row", "NVFP4"]
    with pytest.raises(ValueError, match="INT4"):
        parse_pair("INT4, BF16")


@pytest.mark.parametrize("format", [Format.FP8_BLOCK, Format.FP8_ROW, Format.MXFP8], ids=str)
def test_fnuz_codes_keep_their_bits_and_halve_the_scale(format):
    """Every code but NaN (0x80) against torch's own value of it."""
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    bits[0x80] = 0
    codes = bits.view(4, 64).repeat(1, 2).view(torch.float8_e4m3fnuz)
    scale = random_matrix(format, 4, 128).scale
    matrix = Fp8Matrix.from_e4m3fnuz(codes, scale)
    assert torch.equal(matrix.codes.view(torch.uint8), codes.view(torch.uint8))
    wide = scale.double().repeat_interleave(matrix.group[0], 0)[:4].repeat_interleave(matrix.group[1], 1)
    assert torch.equal(matrix.dequantize(torch.float64), codes.double() * wide)
    lowest = Fp8Matrix.from_e4m3fnuz(codes[:, :32].contiguous(), torch.zeros(4, 1, dtype=torch.uint8).view(E8M0))
    assert not lowest.scale.view(torch.uint8).any()
    with pytest.raises(TypeError, match=r"expected torch\.float8_e4m3fn, got torch.float8_e4m3fnuz"):
        Fp8Matrix(codes, scale)


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


def test_fused_weight_needs_consecutive_views():
    buffer, other = dense(200, 64).weight, dense(200, 64).weight
    for wk, gate in (
        (buffer[:128], buffer[130:146]),
        (buffer[16:144], buffer[:16]),
        (buffer[:128], other[128:144]),
    ):
        assert ProjectionWeights(DenseMatrix(wk), DenseMatrix(gate)).fused_weight is None


def test_joined_needs_slices_of_one_tensor():
    buffer = torch.arange(4 * 64.0).bfloat16().view(4, 64)
    assert torch.equal(joined((buffer[:, :16], buffer[:, 16:40]), 1), buffer[:, :40])
    for other in (
        buffer.view(-1).as_strided((4, 24), (24, 1), 16),  # other rows
        buffer.view(torch.float16)[:, 16:40],
        buffer[:, 17:40],
        buffer.clone()[:, 16:40],
    ):
        assert joined((buffer[:, :16], other), 1) is None


def test_fused_weight_is_none_for_other_pairs():
    assert ProjectionWeights(dense(128, 64), dense(16, 64)).fused_weight is None
    mixed = weights("FP8 128x128, BF16", (128, 16, 64))
    assert mixed.fused_weight is None
    moved = mixed.map(torch.clone)
    assert same(moved.wk, mixed.wk)
    assert same(moved.gate, mixed.gate)
    assert mixed.nbytes == 128 * 64 + 4 + 2 * 16 * 64


def test_reference_multiplies_decoded_weights():
    w = weights("FP8 128x128, BF16", (128, 16, 64))
    k, gate = reference(torch.eye(64, dtype=torch.bfloat16), w)
    assert torch.equal(k.T, w.wk.dequantize(torch.float64))
    assert torch.equal(gate.T, w.gate.weight.double())


def test_operands_follow_the_memory_of_parameters():
    """Engines move parameters by assigning to `data`."""
    codes = torch.nn.Parameter(torch.zeros(128, 128, dtype=torch.float8_e4m3fn), requires_grad=False)
    matrix = Fp8Matrix(codes, torch.ones(1, 1))
    codes.data = torch.ones(128, 128).to(torch.float8_e4m3fn)
    assert torch.equal(matrix.operands[0].view(torch.float8_e4m3fn).float(), torch.ones(128, 128))
