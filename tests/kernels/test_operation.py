"""What `project` refuses, before any kernel runs; and the operation on fake tensors."""

import math

import pytest
import torch

from indexproj.kernels import Format, Matrix, ProjectionWeights, project, project_all
from indexproj.kernels.operation import _resolve
from support import ALL_PAIRS, weights

SHAPE = (128, 16, 256)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def zeros(*shape):
    return torch.zeros(shape, dtype=BF16)


W, DENSE, X, OUT = weights("FP8 128x128, BF16", SHAPE), weights("BF16, BF16", SHAPE), zeros(4, 256), zeros(4, 144)
HUGE = Matrix(Format.BF16, torch.empty(2**23, 256, dtype=BF16, device="meta"))
GRAD, MATRICES, BUFFER = DENSE.map(lambda tensor: tensor.clone().requires_grad_()), (W.wk, W.gate), zeros(4, 512)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: project(X.float(), W), TypeError, "bfloat16 or torch.float16, got torch.float32"),
        (lambda: project(zeros(4, 255), W), ValueError, r"\[..., K=256\] to fit the weights, got \[..., 255\]"),
        (lambda: project(zeros(), W), ValueError, r"got \[\]"),
        (lambda: project(X.to("meta"), W), ValueError, "x is on meta, the weights are on cpu"),
        (lambda: project(zeros(256, 4).T, W), ValueError, "call x.contiguous()"),
        (lambda: project(zeros(4, 256).requires_grad_(), W), RuntimeError, "not differentiable"),
        (lambda: project(X, GRAD), RuntimeError, "not differentiable"),
        (lambda: project(X, DENSE, out=zeros(4, 144).requires_grad_()), RuntimeError, "not differentiable"),
        (lambda: project(X, zeros(144, 256)), TypeError, "must be ProjectionWeights, got Tensor"),
        (
            lambda: project(X, W, k_dtype=FP16),
            TypeError,
            "output must be x's torch.bfloat16 or .*32, got torch.float16",
        ),
        (lambda: project(X, W, gate_dtype=torch.float64), TypeError, "output must be .* got torch.float64"),
        (lambda: project(X, W, out=zeros(4, 128)), ValueError, r"\[4, 144\], got \[4, 128\]"),
        (lambda: project(X, W, out=zeros(5, 144)), ValueError, r"\[4, 144\], got \[5, 144\]"),
        (lambda: project(X, W, out=OUT.half()), TypeError, "out's dtype"),
        (lambda: project(X, W, out=OUT.to("meta")), ValueError, "out is on meta"),
        (lambda: project(X, W, out=zeros(144, 4).T), ValueError, "out must be contiguous"),
        (lambda: project(X, W, out=OUT[:1].expand(4, 144)), ValueError, "contiguous, separate rows"),
        (lambda: project(X, W, out=zeros(600).as_strided((4, 144), (143, 1))), ValueError, "contiguous, separate rows"),
        (lambda: project(zeros(2, 4, 256), W, out=zeros(2, 4, 150)[..., :144]), ValueError, "out must be contiguous"),
        (lambda: project(X, W, out=OUT, gate_dtype=BF16), ValueError, "must not be given with out="),
        (lambda: project(X, W, out=OUT, gate_dtype=FP32), ValueError, "must not be given with out="),
        (lambda: project_all(X, MATRICES, out=OUT, dtypes=[FP32] * 2), ValueError, "must not be given with out="),
        (lambda: project(BUFFER[:, :256], W, out=BUFFER[:, 256:400]), ValueError, "out shares storage with x or the w"),
        (lambda: project(X, DENSE, out=DENSE.wk.values.view(-1)[:576].view(4, 144)), ValueError, "shares storage with"),
        (lambda: project_all(X, MATRICES, dtypes=[FP32]), ValueError, "expected 2 dtypes for 2 matrices, got 1"),
        (lambda: project_all(X, MATRICES, factors=[1.0] * 3), ValueError, "expected 2 factors for 2 matrices, got 3"),
        (lambda: project_all(X, MATRICES, activations=["fp8"]), ValueError, "expected 2 activations for 2 matrices"),
        (lambda: project_all(X, MATRICES, activations=["fp8"] * 2), ValueError, "in FP8 128x128, got .* one in BF16"),
        (lambda: project_all(X, []), ValueError, "at least one matrix"),
        (lambda: project_all(X.to("meta"), [HUGE]), ValueError, r"fewer than 2\*\*31 values, got one of 8388608 x 256"),
        (lambda: project(X, W, gate_scale=float("nan")), ValueError, "finite in fp32"),
        (lambda: project(X, W, gate_scale=float("inf")), ValueError, "finite in fp32"),
        (lambda: project(X, W, gate_scale=-1e39), ValueError, "finite in fp32"),
        (lambda: project(X, W, activation="int8"), ValueError, "None, 'fp8' or 'fp8_ue8m0', got 'int8'"),
        (lambda: project(X, W, activation=""), ValueError, "None, 'fp8' or 'fp8_ue8m0', got ''"),
        (lambda: project(X, W), RuntimeError, "TRITON_INTERPRET=1 before Python starts"),
    ],
)
def test_project_refuses_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("pair", [pair for pair in ALL_PAIRS if not pair.startswith("FP8 128x128")])
def test_w8a8_of_other_formats_is_refused(pair):
    w = weights(pair, SHAPE)
    with pytest.raises(ValueError, match=f"needs a matrix in FP8 128x128, got .* one in {w.wk.format}"):
        project(X, w, activation="fp8")


CODES, SCALES, _, GATE, *_ = OPERANDS = [*W.wk.operands, *W.gate.operands]  # what `project` passes to the operation


def changed(place, operand):
    return [*OPERANDS[:place], operand, *OPERANDS[place + 1 :]]


@pytest.mark.parametrize(
    ("operands", "formats", "message"),
    [
        (changed(0, CODES.T.contiguous().T), None, "of a matrix in FP8 128x128: expected .* True.*, got .* False"),
        (changed(0, CODES[:, :128].contiguous()), None, r"K=128\] to fit the weights, got \[..., 256"),
        (changed(0, CODES[:, 0]), None, "2-D values or codes"),
        (changed(0, CODES[:, :0]), None, r"2-D values or codes .* got \[128, 0\]"),
        (changed(0, None), None, r"2-D values or codes .* got \[\]"),
        (changed(1, torch.ones(1, 3)), None, r"float32, \(1, 2\), .* got \(torch.float32, torch.Size\(\[1, 3\]\)"),
        (changed(1, SCALES.double()), None, "expected .*float32, .* got .*float64"),
        (changed(1, SCALES.to("meta")), None, "x is on cpu, the weights are on meta"),
        (changed(1, None), None, "expected .*float32, .* got None"),
        (changed(2, torch.ones(128, 1)), None, "expected None, got .*float32"),
        (changed(3, GATE.float()), None, "of a matrix in BF16: expected .*bfloat16, .* got .*float32"),
        (changed(3, zeros(16, 128)), None, r"K=128\] to fit the weights, got \[..., 256"),
        (changed(4, SCALES), None, "expected None, got .*float32"),
        (OPERANDS[:5], None, "expected 6 operands for 2 matrices, got 5"),
        ([*OPERANDS, None], None, "expected 6 operands for 2 matrices, got 7"),
        (OPERANDS, ["FP9", "BF16"], "'FP9' is not a valid Format"),
    ],
)
def test_operation_refuses_wrong_operands(operands, formats, message):
    formats, options = formats or ["FP8 128x128", "BF16"], ([1.0] * 2, ["none"] * 2, False)
    with pytest.raises(ValueError, match=message):
        torch.ops.indexproj.project(X, operands, formats, [False] * 2, *options)
    with pytest.raises(ValueError, match=message):
        torch.ops.indexproj.project_out(X, operands, formats, OUT, *options)


def test_gate_scale_of_minus_zero_is_zero():
    """They are equal, and the first one's kernel would be the other one's."""
    signature, _ = _resolve(X, OPERANDS, ["FP8 128x128", "BF16"], [False] * 2, [1.0, -0.0], ["none"] * 2, False)
    assert math.copysign(1, signature.factors[1]) == 1


def test_requires_grad_is_accepted_under_no_grad():
    with torch.no_grad():
        assert project(zeros(0, 256).requires_grad_(), W)[0].shape == (0, 128)


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        k, gate = project(mode.from_tensor(zeros(2, 3, 256)), W.map(mode.from_tensor))
    assert (k.shape, k.dtype, gate.shape, gate.dtype) == ((2, 3, 128), BF16, (2, 3, 16), FP32)


def test_compile_with_dynamic_rows_of_weights():
    gate = zeros(16, 256)
    torch._dynamo.mark_dynamic(gate, 0)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x, wk, gate):
        return project(x, ProjectionWeights(Matrix(Format.BF16, wk), Matrix(Format.BF16, gate)))

    assert [tuple(output.shape) for output in run(zeros(0, 256), zeros(128, 256), gate)] == [(0, 128), (0, 16)]
