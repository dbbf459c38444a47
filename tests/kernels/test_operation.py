"""What `project` refuses, before any kernel runs."""

import math

import pytest
import torch

from indexproj.kernels import DenseMatrix, ProjectionWeights, project, project_all
from indexproj.kernels.matrix import operand_specs
from indexproj.kernels.operation import _check_inputs
from support import PAIRS, weights

SHAPE = (128, 16, 256)
ALIASED, WIDE = (torch.zeros(4, columns, dtype=torch.bfloat16) for columns in (512, 1024))
FLAT = torch.zeros(4 * (144 + 256), dtype=torch.bfloat16)


def x_of(*shape, dtype=torch.bfloat16, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def out_of(*shape, dtype=torch.bfloat16):
    return {"out": torch.zeros(*shape, dtype=dtype)}


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (x_of(4, 256, dtype=torch.float32), {}, TypeError, "bfloat16 or torch.float16, got torch.float32"),
        (x_of(4, 255), {}, ValueError, r"\[..., K=256\] to fit the weights, got \[..., 255\]"),
        (torch.tensor(1.0).bfloat16(), {}, ValueError, r"got \[\]"),
        (x_of(4, 256, device="meta"), {}, ValueError, "x is on meta, the weights are on cpu"),
        (x_of(256, 4).T, {}, ValueError, "call x.contiguous()"),
        (x_of(4, 256).requires_grad_(), {}, RuntimeError, "not differentiable"),
        (x_of(4, 256), {"k_dtype": torch.float16}, TypeError, "k_dtype must be x's torch.bfloat16 or torch.float32"),
        (x_of(4, 256), {"gate_dtype": torch.float64}, TypeError, "gate_dtype must be"),
        (x_of(4, 256), out_of(4, 128), ValueError, r"\[4, 144\], got \[4, 128\]"),
        (x_of(4, 256), out_of(5, 144), ValueError, r"\[4, 144\], got \[5, 144\]"),
        (x_of(4, 256), out_of(4, 144, dtype=torch.float16), TypeError, "out's dtype"),
        (x_of(4, 256), {"out": torch.zeros(4, 144, device="meta").bfloat16()}, ValueError, "out is on meta"),
        (x_of(4, 256), {"out": x_of(144, 4).T}, ValueError, "out must be contiguous"),
        (x_of(4, 256), {"out": x_of(1, 144).expand(4, 144)}, ValueError, "rows that do not overlap"),
        (x_of(2, 4, 256), {"out": x_of(2, 4, 150)[..., :144]}, ValueError, "out must be contiguous"),
        (x_of(4, 256), {**out_of(4, 144), "gate_dtype": torch.bfloat16}, ValueError, "do not go with out="),
        (x_of(4, 256), {**out_of(4, 144), "gate_dtype": torch.float32}, ValueError, "do not go with out="),
        (ALIASED[:, :256], {"out": ALIASED[:, 100:244]}, ValueError, "out overlaps x in memory"),
        (ALIASED[:, 144:400], {"out": ALIASED[:, 1:145]}, ValueError, "out overlaps x in memory"),
        (ALIASED[::2, :256], {"out": ALIASED[1:3, 100:244]}, ValueError, "out overlaps x in memory"),
        (WIDE[:, :256], {"out": WIDE.view(torch.float32)[:, 127:271]}, ValueError, "out overlaps x in memory"),
        (WIDE[:, 280:536], {"out": WIDE.view(torch.float32)[:, :144]}, ValueError, "out overlaps x in memory"),
        (ALIASED[None, :, :256], {"out": FLAT[:576].view(1, 4, 144)}, RuntimeError, "need a GPU"),
        (FLAT[:1024].view(1, 4, 256), {"out": FLAT[1023:1599].view(1, 4, 144)}, ValueError, "out overlaps x in memory"),
        (x_of(4, 256), {"gate_scale": float("nan")}, ValueError, "2 finite factors"),
        (x_of(4, 256), {"activation": ["fp8"]}, ValueError, r"must be None, .* got \['fp8'\]"),
        (x_of(4, 256), {"activation": "int8"}, ValueError, "must be None, 'fp8' or 'fp8_ue8m0', got 'int8'"),
        (x_of(4, 256), {}, RuntimeError, "TRITON_INTERPRET=1 before Python starts"),
    ],
)
def test_bad_input_is_named(x, options, error, message):
    with pytest.raises(error, match=message):
        project(x, weights("fp8-dense", SHAPE), **options)


@pytest.mark.parametrize("pair", PAIRS)
def test_operands_are_what_their_kind_asks_for(pair):
    w = weights(pair, SHAPE)
    for matrix in (w.wk, w.gate):
        found = [None if tensor is None else (tensor.dtype, tuple(tensor.shape)) for tensor in matrix.operands]
        assert found == list(operand_specs(matrix.kind, *matrix.shape))


@pytest.mark.parametrize(
    ("place", "tensor"),
    [
        (0, torch.zeros(256, 128, dtype=torch.uint8).T),
        (0, torch.zeros(128, 128, dtype=torch.uint8)),
        (0, torch.zeros(128, dtype=torch.uint8)),
        (1, torch.ones(1, 3)),
        (1, torch.ones(1, 2).double()),
        (1, torch.ones(1, 2, device="meta")),
        (2, torch.zeros(16, 256)),
        (2, torch.zeros(16, 128, dtype=torch.bfloat16)),
        (2, torch.zeros(300, 256, dtype=torch.bfloat16)),
    ],
)
def test_the_operation_itself_refuses_operands_that_do_not_fit(place, tensor):
    operands = operands_of(weights("fp8-dense", SHAPE))
    operands[place] = tensor
    refused("project: ", operands)


@pytest.mark.parametrize(("count", "message"), [(2, "two-dimensional codes, got"), (4, "3 operands expected")])
def test_the_operation_itself_refuses_too_few_and_too_many_operands(count, message):
    operands = operands_of(weights("fp8-dense", SHAPE))
    refused(message, [*operands, operands[-1]][:count])


@pytest.mark.parametrize("factors", [[], [1.0], [1.0, float("nan")], [float("inf"), 1.0], [1.0, -1e39], [1.0] * 3])
def test_the_operation_itself_refuses_factors_that_are_not_one_number_per_matrix(factors):
    refused("2 finite factors", operands_of(weights("fp8-dense", SHAPE)), factors=factors)


@pytest.mark.parametrize("form", ["FP9 BF16", "FP8_BLOCK BF16:fp64", "FP8_BLOCK, BF16"])
def test_the_operation_itself_refuses_a_form_that_does_not_exist(form):
    refused(
        f'W8A8_UE8M0_FNUZ, each with ":fp32" or without, got "{form}"', operands_of(weights("fp8-dense", SHAPE)), form
    )


def operands_of(w):
    """What `project` hands to the operation."""
    return [operand for matrix in (w.wk, w.gate) for operand in matrix.operands if operand is not None]


def refused(message, operands, form="FP8_BLOCK BF16", factors=None):
    with pytest.raises(ValueError, match=message):
        torch.ops.indexproj.project(x_of(4, 256), operands, form, factors)
    with pytest.raises(ValueError, match=message):
        torch.ops.indexproj.project_out(x_of(4, 256), operands, form, x_of(4, 144), factors)


def test_weights_and_outputs_that_require_grad_are_refused():
    w = weights("dense-dense", SHAPE)
    w.gate.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        project(x_of(4, 256), w)
    with pytest.raises(RuntimeError, match="not differentiable"):
        project(x_of(4, 256), weights("dense-dense", SHAPE), out=x_of(4, 144).requires_grad_())


@pytest.mark.parametrize(
    ("x", "out"),
    [
        (ALIASED[:, :256], ALIASED[:, 256:400]),
        (ALIASED[:, 144:400], ALIASED[:, :144]),
        (WIDE[:, :256], WIDE.view(torch.float32)[:, 128:272]),
        (WIDE[:, 288:544], WIDE.view(torch.float32)[:, :144]),
        (FLAT[:1024].view(4, 256), FLAT[1024:].view(4, 144)),
        (FLAT[576:].view(4, 256), FLAT[:576].view(4, 144)),
    ],
)
def test_out_may_lie_beside_x_or_between_its_rows(x, out):
    with pytest.raises(RuntimeError, match="the Triton kernels need a GPU"):  # nothing else is wrong
        project(x, weights("fp8-dense", SHAPE), out=out)


def test_a_scale_of_minus_zero_is_zero():
    """They are equal, and the first one's kernel would be the other one's."""
    w, x = weights("fp8-dense", SHAPE), x_of(4, 256)
    operands = [operand for operand in (*w.wk.operands, *w.gate.operands) if operand is not None]
    problem, _ = _check_inputs(x, operands, "FP8_BLOCK BF16", x.dtype, [1.0, -0.0], False)
    assert math.copysign(1, problem.factors[1]) == 1


def test_out_may_not_lie_in_the_weights():
    w = weights("dense-dense", SHAPE)
    out = w.gate.weight.view(-1)[: 4 * 144].view(4, 144)
    with pytest.raises(ValueError, match="out overlaps the weights in memory"):
        project(x_of(4, 256), w, out=out)


def test_too_few_dtypes_are_refused():
    w = weights("fp8-dense", SHAPE)
    with pytest.raises(ValueError, match="2 matrices, but dtypes of 1"):
        project_all(x_of(4, 256), (w.wk, w.gate), dtypes=[torch.float32])


@pytest.mark.parametrize("pair", sorted(PAIRS.keys() - {"fp8-dense", "fp8-fp8"}))
def test_w8a8_of_other_encodings_is_refused(pair):
    w = weights(pair, SHAPE)
    with pytest.raises(ValueError, match=f"an FP8 matrix with 128x128 blocks, got one of kind {w.wk.kind.name};"):
        project(x_of(4, 256), w, activation="fp8")


def test_too_few_activations_are_refused():
    w = weights("fp8-dense", SHAPE)
    with pytest.raises(ValueError, match="2 matrices, but 1 activations"):
        project_all(x_of(4, 256), (w.wk, w.gate), activations=["fp8"])


def test_dtypes_do_not_go_with_out():
    w = weights("fp8-dense", SHAPE)
    with pytest.raises(ValueError, match="dtypes do not go with out="):
        project_all(x_of(4, 256), (w.wk, w.gate), dtypes=[torch.float32] * 2, out=x_of(4, 144))


def test_no_matrices_are_refused():
    with pytest.raises(ValueError, match="at least one matrix"):
        project_all(x_of(4, 256), ())


def test_more_rows_than_a_program_holds_are_refused():
    wide, third = (DenseMatrix(x_of(n, 256)) for n in (256, 129))
    with pytest.raises(ValueError, match=r"have \[256, 129\] rows; rounded up to powers of two, .* at most 384"):
        project_all(x_of(4, 256), (wide, third))


def test_weights_of_another_kind_are_named():
    with pytest.raises(TypeError, match="must be ProjectionWeights, got Tensor"):
        project(x_of(4, 256), x_of(144, 256))


def test_grad_is_no_matter_where_it_is_off():
    x = x_of(0, 256).requires_grad_()
    with torch.no_grad():
        assert project(x, weights("fp8-dense", SHAPE))[0].shape == (0, 128)


def test_fake_tensors_give_the_shapes_and_dtypes():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(x_of(2, 3, 256))
        k, gate = project(x, weights("fp8-dense", SHAPE).map(mode.from_tensor))
    assert (k.shape, k.dtype, gate.shape, gate.dtype) == ((2, 3, 128), x.dtype, (2, 3, 16), torch.float32)


def test_weights_may_have_a_number_of_rows_that_the_compiler_does_not_know():
    gate = torch.zeros(16, 256, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(gate, 0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, wk, gate):
        return project(x, ProjectionWeights(DenseMatrix(wk), DenseMatrix(gate)))

    assert [tuple(output.shape) for output in run(x_of(0, 256), x_of(128, 256), gate)] == [(0, 128), (0, 16)]
