"""What `project` refuses, before any kernel runs."""

import math

import pytest
import torch

from indexproj.kernels import DenseMatrix, ProjectionWeights, project, project_all
from indexproj.kernels.operation import _resolve
from support import ALL_PAIRS, weights

SHAPE = (128, 16, 256)
BUFFER = torch.zeros(4, 512, dtype=torch.bfloat16)


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
        (x_of(4, 256), {"out": x_of(1, 144).expand(4, 144)}, ValueError, "contiguous, separate rows"),
        (x_of(4, 256), {"out": x_of(600).as_strided((4, 144), (143, 1))}, ValueError, "contiguous, separate rows"),
        (x_of(2, 4, 256), {"out": x_of(2, 4, 150)[..., :144]}, ValueError, "out must be contiguous"),
        (x_of(4, 256), {**out_of(4, 144), "gate_dtype": torch.bfloat16}, ValueError, "must not be given with out="),
        (x_of(4, 256), {**out_of(4, 144), "gate_dtype": torch.float32}, ValueError, "must not be given with out="),
        (BUFFER[:, :256], {"out": BUFFER[:, 256:400]}, ValueError, "out shares storage with x or the weights"),
        (x_of(4, 256), {"gate_scale": float("nan")}, ValueError, "finite in fp32"),
        (x_of(4, 256), {"activation": "int8"}, ValueError, "None, 'fp8' or 'fp8_ue8m0', got 'int8'"),
        (x_of(4, 256), {"activation": ""}, ValueError, "None, 'fp8' or 'fp8_ue8m0', got ''"),
        (x_of(4, 256), {}, RuntimeError, "TRITON_INTERPRET=1 before Python starts"),
    ],
)
def test_project_refuses_bad_input(x, options, error, message):
    with pytest.raises(error, match=message):
        project(x, weights("FP8 128x128, BF16", SHAPE), **options)


@pytest.mark.parametrize(
    ("place", "tensor"),
    [
        (0, torch.zeros(256, 128, dtype=torch.uint8).T),
        (0, torch.zeros(128, 128, dtype=torch.uint8)),
        (0, torch.zeros(128, dtype=torch.uint8)),
        (1, torch.ones(1, 3)),
        (1, torch.ones(1, 2).double()),
        (1, torch.ones(1, 2, device="meta")),
        (0, None),
        (1, None),
        (2, torch.ones(128, 1)),
        (3, torch.zeros(16, 256)),
        (3, torch.zeros(16, 128, dtype=torch.bfloat16)),
        (4, torch.ones(1, 2)),
    ],
)
def test_operation_refuses_wrong_operands(place, tensor):
    operands = operands_of(weights("FP8 128x128, BF16", SHAPE))
    operands[place] = tensor
    refused("project: ", operands)


@pytest.mark.parametrize(
    ("count", "message"),
    [(5, "expected 6 operands for 2 matrices, got 5"), (7, "expected 6 operands for 2 matrices, got 7")],
)
def test_operation_refuses_too_few_and_too_many_operands(count, message):
    operands = operands_of(weights("FP8 128x128, BF16", SHAPE))
    refused(message, [*operands, None][:count])


@pytest.mark.parametrize(
    ("formats", "options", "message"),
    [
        (["FP9", "BF16"], {}, "expected formats among BF16, FP8 128x128, .*, got FP9"),
        (["FP8_BLOCK", "BF16"], {}, "got FP8_BLOCK"),
        ([], {}, "at least one matrix"),
        (None, {"factors": [1.0]}, "expected 2 factors for 2 matrices, got 1"),
        (None, {"factors": [1.0] * 3}, "expected 2 factors"),
        (None, {"factors": [1.0, float("nan")]}, "finite in fp32"),
        (None, {"factors": [float("inf"), 1.0]}, "finite in fp32"),
        (None, {"factors": [1.0, -1e39]}, "finite in fp32"),
        (None, {"activations": ["fp8"]}, "2 activations for 2 matrices, got 1"),
        (None, {"activations": ["none", "fp8"]}, "needs a matrix in FP8 128x128, got .* and one in BF16"),
    ],
)
def test_operation_refuses_wrong_formats_and_options(formats, options, message):
    refused(message, operands_of(weights("FP8 128x128, BF16", SHAPE)), formats, **options)


def operands_of(w):
    """What `project` passes to the operation."""
    return [operand for matrix in (w.wk, w.gate) for operand in matrix.operands]


def refused(message, operands, formats=None, **options):
    formats = ["FP8 128x128", "BF16"] if formats is None else formats
    with pytest.raises(ValueError, match=message):
        torch.ops.indexproj.project(x_of(4, 256), operands, formats, [False] * len(formats), **options)
    with pytest.raises(ValueError, match=message):
        torch.ops.indexproj.project_out(x_of(4, 256), operands, formats, x_of(4, 144), **options)


def test_weights_and_out_that_require_grad_are_refused():
    w = weights("BF16, BF16", SHAPE)
    w.gate.weight.requires_grad_()
    with pytest.raises(RuntimeError, match="not differentiable"):
        project(x_of(4, 256), w)
    with pytest.raises(RuntimeError, match="not differentiable"):
        project(x_of(4, 256), weights("BF16, BF16", SHAPE), out=x_of(4, 144).requires_grad_())


def test_gate_scale_of_minus_zero_is_zero():
    """They are equal, and the first one's kernel would be the other one's."""
    w, x = weights("FP8 128x128, BF16", SHAPE), x_of(4, 256)
    signature, _ = _resolve(x, operands_of(w), ["FP8 128x128", "BF16"], [False] * 2, [1.0, -0.0])
    assert math.copysign(1, signature.factors[1]) == 1


def test_out_in_the_storage_of_the_weights_is_refused():
    w = weights("BF16, BF16", SHAPE)
    out = w.gate.weight.view(-1)[: 4 * 144].view(4, 144)
    with pytest.raises(ValueError, match="out shares storage with x or the weights"):
        project(x_of(4, 256), w, out=out)


def test_too_few_dtypes_are_refused():
    w = weights("FP8 128x128, BF16", SHAPE)
    with pytest.raises(ValueError, match="expected 2 dtypes for 2 matrices, got 1"):
        project_all(x_of(4, 256), (w.wk, w.gate), dtypes=[torch.float32])


@pytest.mark.parametrize("pair", [pair for pair in ALL_PAIRS if not pair.startswith("FP8 128x128")])
def test_w8a8_of_other_formats_is_refused(pair):
    w = weights(pair, SHAPE)
    with pytest.raises(ValueError, match=f"needs a matrix in FP8 128x128, got .* one in {w.wk.format}"):
        project(x_of(4, 256), w, activation="fp8")


def test_dtypes_with_out_are_refused():
    w = weights("FP8 128x128, BF16", SHAPE)
    with pytest.raises(ValueError, match="dtypes must not be given with out="):
        project_all(x_of(4, 256), (w.wk, w.gate), dtypes=[torch.float32] * 2, out=x_of(4, 144))


def test_project_refuses_other_classes_of_weights():
    with pytest.raises(TypeError, match="must be ProjectionWeights, got Tensor"):
        project(x_of(4, 256), x_of(144, 256))


def test_requires_grad_is_accepted_under_no_grad():
    x = x_of(0, 256).requires_grad_()
    with torch.no_grad():
        assert project(x, weights("FP8 128x128, BF16", SHAPE))[0].shape == (0, 128)


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(x_of(2, 3, 256))
        k, gate = project(x, weights("FP8 128x128, BF16", SHAPE).map(mode.from_tensor))
    assert (k.shape, k.dtype, gate.shape, gate.dtype) == ((2, 3, 128), x.dtype, (2, 3, 16), torch.float32)


def test_compile_with_dynamic_rows_of_weights():
    gate = torch.zeros(16, 256, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(gate, 0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, wk, gate):
        return project(x, ProjectionWeights(DenseMatrix(wk), DenseMatrix(gate)))

    assert [tuple(output.shape) for output in run(x_of(0, 256), x_of(128, 256), gate)] == [(0, 128), (0, 16)]
