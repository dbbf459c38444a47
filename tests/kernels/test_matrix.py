"""Layouts: what they accept, and that dequantize() is the inverse of quantizing."""

import pytest
import torch

from indexproj.indexer.cli.synthetic import quantize_blocks, random_weight
from indexproj.kernels import DenseMatrix, Fp4Matrix, Fp8Matrix, ProjectionWeights, reference
from indexproj.kernels.matrix import joined
from support import MATRICES, dense, fp8, same, weights

CODES = torch.zeros(130, 300, dtype=torch.float8_e4m3fn)
E8M0, E4M3 = torch.float8_e8m0fnu, torch.float8_e4m3fn
FP4 = torch.zeros(8, 24, dtype=torch.uint8)


def test_fp8_values_are_code_times_the_scale_of_their_block():
    codes = torch.ones(130, 300).to(torch.float8_e4m3fn)
    matrix = Fp8Matrix(codes, torch.arange(1.0, 7).view(2, 3))
    values = matrix.dequantize()
    for row, column, value in ((0, 0, 1), (127, 127, 1), (127, 128, 2), (0, 299, 3), (128, 0, 4), (129, 256, 6)):
        assert values[row, column] == value


def test_fp64_is_exact_and_fp32_rounds_once():
    matrix = fp8(128, 256)
    exact = matrix.dequantize(torch.float64)
    assert torch.equal(exact, matrix.codes.double() * matrix.scale.double().repeat_interleave(128, 1))
    assert torch.equal(matrix.dequantize(), exact.float())
    assert torch.equal(matrix.dequantize(torch.bfloat16), exact.float().bfloat16())


@pytest.mark.parametrize("shape", [(128, 256), (130, 300), (1, 1)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_quantizing_loses_no_more_than_half_a_step(shape, power_of_two):
    weight = random_weight(*shape, torch.default_generator)
    codes, scale = quantize_blocks(weight, power_of_two)
    matrix = Fp8Matrix(codes, scale)
    step = torch.maximum(weight.abs() / 8, 2**-9 * scale.max())  # 3 mantissa bits, or the subnormal step
    assert ((matrix.dequantize() - weight).abs() <= step / 2 * 1.001).all()
    assert (scale.log2().frac() == 0).all() == power_of_two
    if not power_of_two:
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
            r"expected \[2, 3\] or \[130, 1\] for codes \[130, 300\]",
        ),
        (lambda: Fp8Matrix(CODES, torch.zeros(130, 9).to(E8M0)), ValueError, r"expected \[130, 10\] for codes"),
        (lambda: Fp8Matrix(CODES, torch.zeros(2, 3, device="meta")), ValueError, "tensors are on cpu and meta"),
        (
            lambda: Fp4Matrix(FP4.view(torch.int8), torch.ones(8, 3).to(E4M3), torch.ones(8, 1)),
            TypeError,
            "torch.uint8",
        ),
        (lambda: Fp4Matrix(FP4, torch.ones(8, 3), torch.ones(8, 1)), TypeError, "Fp4Matrix.scale: expected"),
        (
            lambda: Fp4Matrix(FP4, torch.ones(8, 2).to(E4M3), torch.ones(8, 1)),
            ValueError,
            r"expected \[8, 3\] for codes",
        ),
        (lambda: Fp4Matrix(FP4, torch.ones(8, 3).to(E8M0)), ValueError, r"expected \[8, 2\] for codes"),
        (lambda: Fp4Matrix(FP4, torch.ones(8, 3).to(E4M3)), TypeError, "expected one with an e4m3fn scale"),
        (
            lambda: Fp4Matrix(FP4, torch.ones(8, 2).to(E8M0), torch.ones(8, 1)),
            TypeError,
            "and none with an e8m0fnu one",
        ),
        (lambda: Fp4Matrix(FP4, torch.ones(8, 3).to(E4M3), torch.ones(1, 1)), ValueError, r"expected \[8, 1\], got"),
        (lambda: Fp4Matrix(FP4, torch.ones(8, 2).to(E8M0).to("meta")), ValueError, "tensors are on cpu and meta"),
        (lambda: ProjectionWeights(dense(8, 4), dense(8, 5)), ValueError, "differ in K"),
        (lambda: ProjectionWeights.pack(dense(8, 4), dense(8, 5)), ValueError, "differ in K"),
        (
            lambda: ProjectionWeights(dense(8, 4), dense(8, 4).map(lambda t: t.to("meta"))),
            ValueError,
            "gate is on meta",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_scales_of_rows_and_of_32_values():
    codes = torch.ones(3, 70).to(E4M3)
    rows = Fp8Matrix(codes, torch.tensor([[1.0], [2.0], [4.0]]))
    assert torch.equal(rows.dequantize(), torch.tensor([[1.0], [2.0], [4.0]]).expand(3, 70))
    groups = Fp8Matrix(codes, torch.exp2(torch.arange(9.0)).view(3, 3).to(E8M0))
    for row, column, value in ((0, 0, 1), (0, 31, 1), (0, 32, 2), (0, 69, 4), (2, 64, 256)):
        assert groups.dequantize()[row, column] == value


def test_fp4_values_by_hand():
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


@pytest.mark.parametrize("kind", MATRICES)
def test_what_every_kind_can(kind):
    matrix = MATRICES[kind](256, 96)
    values = matrix.dequantize(torch.float64)
    assert values.shape == matrix.shape == (256, 96)
    assert matrix.nbytes == sum(tensor.nbytes for tensor in matrix.tensors)
    copy = matrix.map(torch.clone)
    assert same(copy, matrix)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(copy.tensors, matrix.tensors, strict=True))
    assert torch.equal(matrix.rows(128, 200).dequantize(torch.float64), values[128:200])
    assert matrix.rows(128, 200).tensors[0].data_ptr() == matrix.tensors[0][128:].data_ptr()
    assert matrix.matches(copy)
    assert not matrix.matches(matrix.map(lambda tensor: tensor.to("meta")))
    assert not matrix.matches(matrix.rows(0, 128))
    assert sum(matrix.matches(make(256, 96)) for make in MATRICES.values()) == 1
    if kind != "fp8":
        assert torch.equal(matrix.rows(3, 5).dequantize(torch.float64), values[3:5])
    else:
        with pytest.raises(ValueError, match="row 3 does not begin a block of 128 rows"):
            matrix.rows(3, 5)


@pytest.mark.parametrize("kind", ["fp8", "fp8_row", "mxfp8"])
def test_fnuz_codes_have_the_same_values(kind):
    every_code = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    every_code[[0x7F, 0xFF]] = 0  # NaN
    codes = every_code.view(4, 64).repeat(1, 2).view(E4M3)
    matrix = Fp8Matrix(codes, MATRICES[kind](4, 128).scale)
    fnuz = matrix.to_fnuz()
    assert fnuz.codes.dtype == torch.float8_e4m3fnuz
    assert torch.equal(fnuz.dequantize(torch.float64), matrix.dequantize(torch.float64))
    assert fnuz.to_fnuz() is fnuz
    assert not fnuz.matches(matrix)


def test_weights_that_match_are_copied_into_the_memory_at_hand():
    for pair in ("dense-dense", "fp8-dense"):
        live, new = weights(pair, (128, 16, 256)), weights(pair, (128, 16, 256))
        pointers = [tensor.data_ptr() for matrix in (live.wk, live.gate) for tensor in matrix.tensors]
        live.copy_(new)
        assert same(live.wk, new.wk)
        assert same(live.gate, new.gate)
        assert [tensor.data_ptr() for matrix in (live.wk, live.gate) for tensor in matrix.tensors] == pointers
    for pair in ("dense-dense", "fp8-fp8"):
        with pytest.raises(ValueError, match="the weights differ in encoding, shape or device"):
            live.copy_(weights(pair, (128, 16, 256)))


def test_two_dense_matrices_share_one_buffer():
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


def test_views_that_do_not_follow_each_other_are_not_fused():
    buffer, other = dense(200, 64).weight, dense(200, 64).weight
    for wk, gate in (
        (buffer[:128], buffer[130:146]),
        (buffer[16:144], buffer[:16]),
        (buffer[:128], other[128:144]),
    ):
        assert ProjectionWeights(DenseMatrix(wk), DenseMatrix(gate)).fused_weight is None


def test_only_slices_of_one_tensor_are_joined():
    buffer = torch.arange(4 * 64.0).bfloat16().view(4, 64)
    assert torch.equal(joined((buffer[:, :16], buffer[:, 16:40]), 1), buffer[:, :40])
    for other in (
        buffer.view(-1).as_strided((4, 24), (24, 1), 16),  # other rows
        buffer.view(torch.float16)[:, 16:40],
        buffer[:, 17:40],
        buffer.clone()[:, 16:40],
    ):
        assert joined((buffer[:, :16], other), 1) is None


def test_other_pairs_have_no_fused_weight():
    assert ProjectionWeights(dense(128, 64), dense(16, 64)).fused_weight is None
    mixed = weights("fp8-dense", (128, 16, 64))
    assert mixed.fused_weight is None
    moved = mixed.map(torch.clone)
    assert same(moved.wk, mixed.wk)
    assert same(moved.gate, mixed.gate)
    assert mixed.nbytes == 128 * 64 + 4 + 2 * 16 * 64


def test_reference_multiplies_decoded_weights():
    w = weights("fp8-dense", (128, 16, 64))
    k, gate = reference(torch.eye(64, dtype=torch.bfloat16), w)
    assert torch.equal(k.T, w.wk.dequantize(torch.float64))
    assert torch.equal(gate.T, w.gate.weight.double())
