"""activation="fp8" and "fp8_ue8m0": x rounded to e4m3 for wk, in the interpreter against fp64."""

from itertools import product

import pytest
import torch

from indexproj.kernels import DenseMatrix, Fp8Matrix, KernelConfig, ProjectionWeights, project, reference
from indexproj.kernels.reference import quantize
from numerics import largest_row_error, run, surrounded, uneven
from support import GLM, weights

FP8, BOTH_FP8 = "FP8 128x128, BF16", "FP8 128x128, FP8 128x128"
CASES = [*product([FP8], [(128, 32, 1000), (40, 9, 61)], (1, 5, 67))]
WIDER = [*product([FP8], [(128, 32, 1000), (40, 9, 61)], (17, 300)), *product([FP8], [(150, 9, 520)], (1, 5, 67, 300))]
WIDER += [*product((FP8, BOTH_FP8), [GLM], (1, 17, 100))]


@pytest.mark.parametrize(
    ("pair", "shape", "m"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in WIDER)], ids=str
)
@pytest.mark.parametrize("activation", ["fp8", "fp8_ue8m0"])
@pytest.mark.usefixtures("poison")
def test_w8a8_against_fp64(activation, pair, shape, m):
    """x is in bf16 for the first pair, in fp16 for the second."""
    w, x = surrounded(weights(pair, shape)), uneven(m, shape[2])
    x = x if pair == FP8 else x.half().nan_to_num(posinf=60000)
    outputs = project(x, w, k_dtype=torch.float32, activation=activation)
    assert largest_row_error(outputs, reference(x, w, activation)) <= 2e-6


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
    n = (8, 9) if config.regime == "gemv" else (128, 32)
    w, x = surrounded(weights(FP8, (*n, 1000))), uneven(11, 1000)
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
