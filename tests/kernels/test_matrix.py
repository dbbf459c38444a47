"""Layouts: what they accept, views and copies of them. tests/loading compares the values of every encoding."""

import dataclasses

import pytest
import torch

from indexproj.kernels import Format, Matrix, ProjectionWeights
from indexproj.kernels.formats import operand_layout, parse_pair
from support import dense, random_matrix, same, weights

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
CODES, FP4 = torch.zeros(130, 300).to(E4M3), torch.zeros(8, 24, dtype=torch.uint8)
FP8_BF16 = weights("FP8 128x128, BF16", (8, 8, 64))


def ones(*shape, dtype=FP32):
    return torch.ones(shape).to(dtype)


def matrix(format, *tensors):
    return Matrix(Format(format), *tensors)


def to_meta(tensor):
    return tensor.to("meta")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: matrix("BF16", ones(2, 2)), TypeError, "values in BF16: expected torch.bfloat16, got torch.float32"),
        (lambda: matrix("BF16", ones(2, dtype=BF16)), ValueError, "non-empty 2-D"),
        (lambda: matrix("BF16", ones(0, 2, dtype=BF16)), ValueError, "non-empty 2-D"),
        (lambda: matrix("BF16", ones(3, 2, dtype=BF16).T), ValueError, "call .contiguous()"),
        (lambda: matrix("BF16", ones(2, 2, dtype=BF16), ones(1, 1)), TypeError, "expected None, got torch.float32"),
        (lambda: matrix("FP8 128x128", CODES.view(torch.float8_e4m3fnuz), ones(2, 3)), TypeError, "e4m3fn, got .*fnuz"),
        (lambda: matrix("FP8 128x128", CODES, ones(2, 3).double()), TypeError, "Matrix.scale .*expected torch.float32"),
        (lambda: matrix("FP8 128x128", CODES), TypeError, "expected torch.float32, got None"),
        (lambda: matrix("FP8 128x128", CODES, ones(1, 2)), ValueError, r"expected \[2, 3\] for a matrix \[130, 300\]"),
        (lambda: matrix("FP8 128x128", CODES, ones(2, 3).to("meta")), ValueError, "expected it on cpu"),
        (lambda: matrix("FP8 per row", CODES, ones(130, 1)), TypeError, "Matrix.scale .*expected None"),
        (lambda: matrix("MXFP8", CODES, ones(130, 9, dtype=E8M0)), ValueError, r"expected \[130, 10\] for a matrix"),
        (lambda: matrix("NVFP4", FP4.char(), ones(8, 3, dtype=E4M3), ones(8, 1)), TypeError, "torch.uint8"),
        (lambda: matrix("NVFP4", FP4, ones(8, 3), ones(8, 1)), TypeError, "Matrix.scale in NVFP4: expected .*e4m3fn"),
        (lambda: matrix("NVFP4", FP4, ones(8, 2, dtype=E4M3), ones(8, 1)), ValueError, r"\[8, 3\] for a matrix"),
        (lambda: matrix("NVFP4", FP4, ones(8, 3, dtype=E4M3)), TypeError, "Matrix.row_scale .*float32, got None"),
        (lambda: matrix("NVFP4", FP4, ones(8, 3, dtype=E4M3), ones(1, 1)), ValueError, r"expected \[8, 1\] for a"),
        (lambda: matrix("MXFP4", FP4, ones(8, 3, dtype=E8M0)), ValueError, r"expected \[8, 2\] for a matrix"),
        (lambda: matrix("MXFP4", FP4, ones(8, 2, dtype=E8M0), ones(8, 1)), TypeError, "row_scale .*expected None"),
        (lambda: ProjectionWeights(dense(8, 4), dense(8, 5)), ValueError, "differ in K"),
        (lambda: ProjectionWeights(dense(8, 4), dense(8, 4).map(to_meta)), ValueError, "on meta"),
        (lambda: FP8_BF16.copy_(weights("BF16, BF16", (8, 8, 64))), ValueError, "copy_: expected"),
        (lambda: FP8_BF16.copy_(weights("FP8 128x128, FP8 128x128", (8, 8, 64))), ValueError, "copy_: expected"),
        (lambda: random_matrix(Format.FP8_BLOCK, 130, 4).rows(3, 5), ValueError, "of 128, as 128 rows share .* got 3"),
        (lambda: parse_pair("INT4, BF16"), ValueError, "INT4"),
    ],
)
def test_wrong_dtypes_shapes_and_devices_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


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
    if matrix.row_scale is not None:
        assert torch.equal(dataclasses.replace(matrix, row_scale=-matrix.row_scale).dequantize(FP64), -values)
    assert not matrix.matches(matrix.map(to_meta))
    assert not matrix.matches(matrix.rows(0, 128))
    assert [other for other in Format if matrix.matches(random_matrix(other, 256, 96))] == [format]


def test_pack_puts_dense_matrices_into_one_buffer():
    wk, gate = dense(128, 64), dense(16, 64)
    packed = ProjectionWeights.pack(wk, gate)
    assert same(packed.wk, wk)
    assert same(packed.gate, gate)
    assert torch.equal(packed.fused_weight, torch.cat((wk.values, gate.values)))
    assert packed.nbytes == packed.fused_weight.nbytes
    again, moved = ProjectionWeights.pack(packed.wk, packed.gate), packed.map(torch.clone)
    assert packed.fused_weight.data_ptr() == again.fused_weight.data_ptr() == packed.wk.values.data_ptr()
    assert moved.fused_weight.data_ptr() == moved.wk.values.data_ptr() != packed.wk.values.data_ptr()
    assert torch.equal(moved.fused_weight, packed.fused_weight)
    one, other = dense(40, 64).values, dense(40, 64).values
    # Of two tensors, with a gap, in the other order, and with a row of another stride.
    for parts in ((one[:16], other[16:]), (one[:16], one[18:20]), (one[4:20], one[:4]), (one[::2][:1], one[2:4])):
        pair = [matrix("BF16", part) for part in parts]
        assert torch.equal(ProjectionWeights.pack(*pair).fused_weight, torch.cat(parts))
    mixed = weights("FP8 128x128, BF16", (128, 16, 64))
    assert ProjectionWeights(wk, gate).fused_weight is mixed.fused_weight is None
    assert same(mixed.map(torch.clone).wk, mixed.wk)
    assert mixed.nbytes == 128 * 64 + 4 + 2 * 16 * 64


def test_operands_follow_the_memory_of_parameters():
    codes = torch.nn.Parameter(torch.zeros(128, 128, dtype=E4M3), requires_grad=False)
    wk = matrix("FP8 128x128", codes, ones(1, 1))
    codes.data = ones(128, 128, dtype=E4M3)
    assert torch.equal(wk.operands[0].view(E4M3).float(), ones(128, 128))
