"""Layouts: what they accept, and that dequantize() is the inverse of quantizing."""

import pytest
import torch

from indexproj.indexer.fixture import quantize_blocks, random_weight
from indexproj.kernels import DenseMatrix, Fp8Matrix, ProjectionWeights, reference
from support import dense, fp8, same, weights

CODES = torch.zeros(130, 300, dtype=torch.float8_e4m3fn)


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
        (lambda: Fp8Matrix(CODES, torch.zeros(1, 2)), ValueError, r"expected \[2, 3\] for codes \[130, 300\]"),
        (lambda: Fp8Matrix(CODES, torch.zeros(2, 3, device="meta")), ValueError, "scale is on meta"),
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


def test_two_dense_matrices_share_one_buffer():
    wk, gate = dense(128, 64), dense(16, 64)
    packed = ProjectionWeights.pack(wk, gate)
    assert same(packed.wk, wk)
    assert same(packed.gate, gate)
    assert torch.equal(packed.fused_weight, torch.cat((wk.weight, gate.weight)))
    assert packed.fused_weight.data_ptr() == packed.wk.weight.data_ptr()
    assert packed.nbytes == packed.fused_weight.nbytes
    moved = packed.map(torch.clone)
    assert moved.fused_weight.data_ptr() == moved.wk.weight.data_ptr() != packed.wk.weight.data_ptr()
    assert torch.equal(moved.fused_weight, packed.fused_weight)


def test_views_that_do_not_follow_each_other_are_not_fused():
    buffer = dense(200, 64).weight
    for wk, gate in ((buffer[:128], buffer[130:146]), (buffer[16:144], buffer[:16])):
        assert ProjectionWeights(DenseMatrix(wk), DenseMatrix(gate)).fused_weight is None


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
