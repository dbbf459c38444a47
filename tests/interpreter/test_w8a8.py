"""activation="fp8" and "fp8_ue8m0": x rounded to e4m3 for wk, in the interpreter against fp64."""

import pytest
import torch

from indexproj.kernels import DenseMatrix, Fp8Matrix, KernelConfig, ProjectionWeights, project, project_all, reference
from indexproj.kernels.reference import quantize
from numerics import largest_row_error, relative_error, run, surrounded, uneven
from support import GLM, dense, fp8, weights

FP8 = "FP8 128x128, BF16"
full = pytest.mark.full


@pytest.mark.parametrize("m", [1, 5, 67, *(pytest.param(m, marks=full) for m in (17, 300))])
@pytest.mark.parametrize("shape", [(128, 32, 1000), pytest.param((150, 9, 520), marks=full), (40, 9, 61)], ids=str)
@pytest.mark.parametrize("activation", ["fp8", "fp8_ue8m0"])
@pytest.mark.usefixtures("poison")
def test_w8a8_against_fp64(activation, shape, m):
    w = surrounded(weights(FP8, shape))
    x = uneven(m, shape[2])
    outputs = project(x, w, k_dtype=torch.float32, activation=activation)
    assert largest_row_error(outputs, reference(x, w, activation)) <= 2e-6


@pytest.mark.parametrize("m", [1, 17, 100])
@pytest.mark.parametrize("activation", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("pair", [FP8, "FP8 128x128, FP8 128x128"])
@pytest.mark.usefixtures("poison")
@pytest.mark.full
def test_w8a8_at_published_shapes(pair, activation, m):
    w = weights(pair, GLM)
    x = uneven(m, GLM[2]) if pair == FP8 else uneven(m, GLM[2]).half().nan_to_num(posinf=60000)
    outputs = project(x, w, k_dtype=torch.float32, activation=activation)
    assert largest_row_error(outputs, reference(x, w, activation)) <= 2e-6


@pytest.mark.parametrize("m", [3, 20, 70])
@pytest.mark.usefixtures("poison")
def test_each_matrix_has_its_own_activation(m):
    matrices = fp8(128, 500), dense(32, 500), fp8(128, 500)
    x = torch.randn(m, 500, dtype=torch.bfloat16)
    outputs = project_all(x, matrices, dtypes=[torch.float32] * 3, activations=["fp8", None, "fp8_ue8m0"])
    rounded = quantize(x, False), x.double(), quantize(x, True)
    exact = [own @ matrix.dequantize(torch.float64).T for own, matrix in zip(rounded, matrices, strict=True)]
    assert relative_error(outputs, exact) <= 2e-6


@pytest.mark.parametrize(
    "config",
    [
        KernelConfig("gemv", block_m=4, block_k=128, slices=8),
        KernelConfig("split_k", block_m=8, block_k=64, slices=2, split_k=3),
        KernelConfig("split_k", block_m=16, block_k=128, slices=2, split_k=3, block_n=32),
        KernelConfig("split_k", block_m=16, block_k=64, slices=8, split_k=2, loop_splits=True),
        KernelConfig("prefill", block_m=16, block_k=128, block_n=0),
        KernelConfig("prefill", block_m=32, block_k=128, block_n=32, split_k=3),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poison")
def test_gate_has_the_same_bits_with_and_without_w8a8(config):
    w = surrounded(weights(FP8, (128, 32, 1000)))
    x = uneven(11, 1000)
    plain, rounded = run(x, w, config), run(x, w, config, activation="fp8")
    assert largest_row_error(rounded, reference(x, w, "fp8")) <= 2e-6
    assert not torch.equal(plain[0], rounded[0])
    assert torch.equal(plain[1], rounded[1])


@pytest.mark.parametrize("ue8m0", [False, True])
def test_every_bf16_value_is_rounded_as_torch_does(ue8m0):
    """With the identity as wk, k is x in e4m3."""
    x = torch.arange(0x7F80).to(torch.int16).view(torch.bfloat16)
    x = torch.cat((x, -x)).view(-1, 128)  # groups of neighbors
    x = torch.cat((x, x.T.reshape(-1, 128)))  # groups of distant values
    eye = Fp8Matrix(torch.eye(128).to(torch.float8_e4m3fn), torch.ones(1, 1))
    w = ProjectionWeights(eye, DenseMatrix(torch.ones(16, 128, dtype=torch.bfloat16)))
    k, _ = project(x, w, k_dtype=torch.float32, activation="fp8_ue8m0" if ue8m0 else "fp8")
    assert torch.equal(k, quantize(x, ue8m0).float())


@pytest.mark.usefixtures("exact_dot")
def test_batch_invariant_w8a8_rows_keep_their_bits():
    w, x = weights(FP8, (64, 16, 1024)), uneven(100, 1024)
    options = {"k_dtype": torch.float32, "batch_invariant": True, "activation": "fp8"}
    whole = project(x, w, **options)
    assert largest_row_error(whole, reference(x, w, "fp8")) <= 2e-6
    for m in (1, 3, 17, 64):
        picked = torch.randperm(100)[:m]
        for output, expected in zip(project(x[picked], w, **options), whole, strict=True):
            assert torch.equal(output, expected[picked])
