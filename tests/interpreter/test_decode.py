"""Decoding is exact: with the identity as x outputs are the decoded weights, and as wk x in e4m3, bit for bit."""

import dataclasses

import pytest
import torch

from indexproj.kernels import Format, Matrix, ProjectionWeights, choose, launch, project, reference, tile
from indexproj.kernels.reference import quantize
from indexproj.kernels.target import INTERPRETED, target_of
from numerics import relative_error, run
from support import dense, random_matrix, weights

BF16 = torch.bfloat16
REGIMES = {"gemv": 4, "split_k": 64, "prefill": 300}


def assert_identity(regime, w, step=1, dtype=BF16):
    """With each step-th unit vector as a row of x, outputs are these columns of the decoded weights."""
    config = choose(REGIMES[regime], w.shape, w.formats, target_of(w.device))
    assert config.regime == regime
    picked = torch.arange(0, w.shape[2], step)
    x = torch.zeros(len(picked), w.shape[2], dtype=dtype)
    x[torch.arange(len(picked)), picked] = 1
    for output, matrix in zip(run(x, w, config), (w.wk, w.gate), strict=True):
        assert torch.equal(output.T, matrix.dequantize()[:, picked])


def all_codes(format, n, k):
    """A matrix with every code, many times over: 0x7F and 0xFF of e4m3 are +-480."""
    matrix = random_matrix(format, n, k)
    codes = (torch.arange(n * matrix.values.shape[1]).view(n, -1) * 37 % 256).to(torch.uint8)
    return dataclasses.replace(matrix, values=codes.view(matrix.values.dtype))


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [BF16, pytest.param(torch.float16, marks=pytest.mark.full)])
@pytest.mark.parametrize("format", list(Format)[1:], ids=str)
def test_identity_returns_the_decoded_weights(format, dtype, regime):
    w = ProjectionWeights(all_codes(format, 130, 300), all_codes(format, 16, 300))  # a ragged second block of rows
    assert_identity(regime, w, 77 if regime == "gemv" else 1, dtype)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("scale", [0, 1, 254])
@pytest.mark.parametrize("format", [Format.MXFP4, Format.MXFP8], ids=str)
def test_outermost_e8m0_scales_are_exact(format, scale, regime):
    matrix = random_matrix(format, 16, 64)
    ones = torch.full_like(matrix.values.view(torch.uint8), 0x22 if format == Format.MXFP4 else 0x38)
    e8m0 = torch.full_like(matrix.scale.view(torch.uint8), scale).view(torch.float8_e8m0fnu)
    matrix = Matrix(format, ones.view(matrix.values.dtype), e8m0)
    assert (matrix.dequantize() == 2.0 ** (scale - 127)).all()
    assert_identity(regime, ProjectionWeights(matrix, matrix), 32)


def both_halves(codes):
    return tile.decode_e2m1(codes & 0xF), tile.decode_e2m1(codes >> 4)


@pytest.mark.skipif(not INTERPRETED, reason="replaces PTX, which the interpreter does not run")
@pytest.mark.parametrize("pair", ["FP8 128x128, BF16", "MXFP8, MXFP8", "NVFP4, NVFP4"])
def test_prefill_with_packed_decoding(pair, monkeypatch):
    """The branch for NVIDIA GPUs, with the plain decoders in place of those in PTX."""
    monkeypatch.setattr(tile, "decode_e4m3_packed", tile.decode_e4m3)
    monkeypatch.setattr(tile, "decode_e2m1_packed", both_halves)
    constants = launch.constants
    monkeypatch.setattr(launch, "constants", lambda *a: {k: k == "PACKED" or v for k, v in constants(*a).items()})
    launch.plan_of.cache_clear()
    w, x = weights(pair, (40, 9, 344)), torch.randn(100, 344, dtype=BF16)
    assert relative_error(project(x, w, k_dtype=torch.float32), reference(x, w)) <= 2e-6
    launch.plan_of.cache_clear()


def test_sums_of_gemv_over_all_of_k():
    """`verify` allows 2e-6 for thousands of outputs, so a few must stay well below."""
    w = weights("FP8 128x128, BF16", (8, 8, 7168))
    x = 1 + torch.rand(4, 7168)  # sums grow: a running sum loses digits
    w = ProjectionWeights(w.wk, dense(8, 7168).map(torch.abs))
    assert relative_error(project(x.bfloat16(), w)[1:], reference(x.bfloat16(), w)[1:]) <= 3e-7


@pytest.mark.parametrize("ue8m0", [False, True])
def test_w8a8_rounds_every_bf16_value_as_torch_does(ue8m0):
    """With the identity as wk, k is x in e4m3."""
    x = torch.arange(0x7F80).to(torch.int16).view(BF16)
    x = torch.cat((x, -x)).view(-1, 128)  # groups of neighbors
    x = torch.cat((x, x.T.reshape(-1, 128)))  # groups of distant values
    eye = Matrix(Format.FP8_BLOCK, torch.eye(128).to(torch.float8_e4m3fn), torch.ones(1, 1))
    w = ProjectionWeights(eye, dense(16, 128))
    k, _ = project(x, w, k_dtype=torch.float32, activation="fp8_ue8m0" if ue8m0 else "fp8")
    assert torch.equal(k, quantize(x, ue8m0).float())
