"""The kernels in Triton's interpreter against fp64: numbers, bounds, determinism, outputs."""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from indexproj.kernels import Format, KernelConfig, ProjectionWeights, choose, project, project_all, reference
from indexproj.kernels.target import INTERPRETED, target_of
from indexproj.kernels.workspace import workspace
from numerics import relative_error, run, surrounded
from support import ALL_PAIRS, DEEPSEEK, GLM, dense, fp8, random_matrix, weights

FP8 = "FP8 128x128, BF16"
full = pytest.mark.full
MIXED = [(Format.FP8_BLOCK, Format.BF16), (Format.NVFP4, Format.MXFP8)]

# A full K takes the interpreter long; smaller ones are below, with every pair.
PUBLISHED = [(FP8, DEEPSEEK, 17, torch.bfloat16), ("NVFP4, NVFP4", GLM, 100, torch.bfloat16)]
PUBLISHED += [pytest.param(pair, GLM, 17, torch.bfloat16, marks=full) for pair in ALL_PAIRS]
PUBLISHED += [pytest.param(pair, DEEPSEEK, 2, torch.bfloat16, marks=full) for pair in (FP8, "NVFP4, NVFP4")]
PUBLISHED += [pytest.param(FP8, DEEPSEEK, m, torch.float16, marks=full) for m in (1, 64, 100)]


@pytest.mark.parametrize(("pair", "shape", "m", "dtype"), PUBLISHED)
@pytest.mark.usefixtures("poison")
def test_published_shapes_against_fp64(pair, shape, m, dtype):
    w = weights(pair, shape)
    x = torch.randn(m, w.shape[2], dtype=dtype)
    assert relative_error(project(x, w, k_dtype=torch.float32), reference(x, w)) <= 2e-6


FEW_ROWS, MORE_ROWS = (2, 5, 9, 33, 65, 257), (3, 8, 16, 31, 63, 127, 129, 255, 511, 1000, 2047, 4096)


@pytest.mark.parametrize("m", [*FEW_ROWS, *(pytest.param(m, marks=full) for m in MORE_ROWS)])
@pytest.mark.parametrize("shape", [(128, 32, 200), pytest.param((128, 16, 129), marks=full), (40, 9, 61)], ids=str)
@pytest.mark.usefixtures("poison")
def test_any_m_and_ragged_k(shape, m):
    w = surrounded(weights(FP8, shape))
    x = torch.randn(m, shape[2], dtype=torch.bfloat16)
    assert relative_error(project(x, w, k_dtype=torch.float32), reference(x, w)) <= 2e-6


@pytest.mark.parametrize("m", [1, 31, 100])
@pytest.mark.parametrize("k", [pytest.param(88, marks=full), 344, pytest.param(1000, marks=full)])
@pytest.mark.parametrize("pair", ALL_PAIRS)
@pytest.mark.usefixtures("poison")
def test_every_pair_at_ragged_sizes(pair, k, m):
    """K cuts groups of 16 and 32, and NaN surrounds every tensor."""
    w = surrounded(weights(pair, (100, 9, k)))
    x = torch.randn(m, k, dtype=torch.bfloat16)
    assert relative_error(project(x, w, k_dtype=torch.float32), reference(x, w)) <= 2e-6


@pytest.mark.parametrize("m", [3, 20, 100])
@pytest.mark.parametrize("pair", ["BF16, BF16", FP8, "NVFP4, NVFP4"])
@pytest.mark.usefixtures("poison")
def test_addresses_that_are_no_multiples_of_16(pair, m):
    w = surrounded(weights(pair, (100, 9, 344)), offset=1)
    x = torch.randn(m * 345 + 1, dtype=torch.bfloat16)[1:].view(m, 345)[:, :344]
    out = torch.full((m * 111 + 1,), torch.nan)[1:].view(m, 111)[:, 1:110]
    assert all(tensor.data_ptr() % 16 for tensor in (x, out, w.wk.tensors[0]))
    assert relative_error(project(x, w, out=out), reference(x, w)) <= 2e-6


# Splits that divide K, that do not, and that leave the last programs without steps.
@pytest.mark.parametrize("split_k", [1, 3, *(pytest.param(split, marks=full) for split in (2, 5, 16))])
@pytest.mark.parametrize(
    "config",
    [
        KernelConfig("split_k", block_m=8, block_k=64, slices=2, num_stages=2),
        KernelConfig("split_k", block_m=16, block_k=128, slices=1, num_stages=2, block_n=32),
        KernelConfig("split_k", block_m=16, block_k=64, slices=2, num_stages=2, loop_splits=True),
        KernelConfig("prefill", block_m=16, block_k=64, block_n=0),
        KernelConfig("prefill", block_m=64, block_k=128, block_n=32),
    ],
    ids=str,
)
@pytest.mark.parametrize("pair", MIXED, ids=str)
@pytest.mark.usefixtures("poison")
def test_splits_of_k(pair, config, split_k):
    wk, gate = (random_matrix(format, n, 1000) for format, n in zip(pair, (128, 32), strict=True))
    w = surrounded(ProjectionWeights(wk, gate))
    x = torch.randn(19, 1000, dtype=torch.bfloat16)
    outputs = run(x, w, dataclasses.replace(config, split_k=split_k))
    assert relative_error(outputs, reference(x, w)) <= 2e-6


@pytest.mark.parametrize(("m", "regimes"), [(5, {"gemv", "split_k"}), (40, {"split_k", "prefill"})])
@pytest.mark.full
def test_every_candidate_of_tune(m, regimes):
    from indexproj.benchmarks.tune import candidates

    w = weights(FP8, (128, 16, 300))
    x = torch.randn(m, 300, dtype=torch.bfloat16)
    found = candidates(m, w.shape, w.formats, dataclasses.replace(target_of(w.device), sm_count=40))
    assert {config.regime for config in found} == regimes
    for config in found:
        if not (config.pdl and INTERPRETED):  # the interpreter knows no PDL
            assert relative_error(run(x, w, config), reference(x, w)) <= 2e-6, config


ROWS = (1, 3, 8, 16, 17, 64, 100, 257)


@pytest.mark.parametrize("pair", [FP8, pytest.param("NVFP4, NVFP4", marks=full)])
@pytest.mark.usefixtures("exact_dot")
def test_batch_invariant_rows_keep_their_bits(pair):
    w = weights(pair, (64, 16, 1024))
    x = torch.randn(max(ROWS), 1024, dtype=torch.bfloat16)
    whole = project(x, w, k_dtype=torch.float32, batch_invariant=True)
    assert relative_error(whole, reference(x, w)) <= 2e-6
    for m in ROWS:
        picked = torch.randperm(max(ROWS))[:m]
        outputs = project(x[picked], w, k_dtype=torch.float32, batch_invariant=True)
        for output, expected in zip(outputs, whole, strict=True):
            assert torch.equal(output, expected[picked])


@pytest.mark.parametrize("m", [3, 7, 100])
def test_two_runs_give_the_same_bits(m):
    w = weights(FP8, (128, 32, 1500))
    x = torch.randn(m, 1500, dtype=torch.bfloat16)
    first, second = (project(x, w, k_dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("m", [3, 20, 70])
def test_gate_scale_multiplies_fp32_before_rounding(m):
    w = weights("FP8 128x128, FP8 128x128", (128, 32, 500))
    x = torch.randn(m, 500, dtype=torch.bfloat16)
    k, gate = project(x, w, k_dtype=torch.float32)
    scaled = project(x, w, k_dtype=torch.float32, gate_scale=32**-0.5 * 128**-0.5)
    assert torch.equal(scaled[0], k)
    assert torch.equal(scaled[1], gate * torch.tensor(32**-0.5 * 128**-0.5, dtype=torch.float32))
    rounded = project(x, w, gate_dtype=torch.bfloat16, gate_scale=32**-0.5 * 128**-0.5)[1]
    assert torch.equal(rounded, scaled[1].bfloat16())


@pytest.mark.parametrize("m", [3, 20, 70])
@pytest.mark.usefixtures("poison")
def test_three_matrices(m):
    w, third = weights("NVFP4, BF16", (128, 32, 500)), fp8(128, 500)
    x = torch.randn(m, 500, dtype=torch.bfloat16)
    outputs = project_all(x, (w.wk, w.gate, third), dtypes=[torch.float32] * 3)
    exact = (*reference(x, w), x.double() @ third.dequantize(torch.float64).T)
    assert relative_error(outputs, exact) <= 2e-6
    if m == 20:  # with 3 and 70 rows, kernel or tiles depend on the number of columns
        for output, alone in zip(outputs, project(x, w, k_dtype=torch.float32), strict=False):
            assert torch.equal(output, alone)


@pytest.mark.parametrize("m", [3, 20, 100])
@pytest.mark.usefixtures("poison")
def test_matrices_with_many_rows(m):
    """As in DeepSeek-V4, where two compressors and weights_proj read the same x."""
    matrices = dense(600, 200), dense(64, 200), dense(270, 200)
    x = torch.randn(m, 200, dtype=torch.bfloat16)
    outputs = project_all(x, matrices, dtypes=[torch.float32] * 3)
    exact = [x.double() @ matrix.dequantize(torch.float64).T for matrix in matrices]
    assert relative_error(outputs, exact) <= 2e-6


@pytest.mark.skipif(not INTERPRETED, reason="counts the loads of Triton's interpreter")
@pytest.mark.parametrize("m", [3, 20, 100])
@pytest.mark.parametrize("pair", MIXED, ids=str)
def test_bytes_loaded_are_those_that_dispatch_counts(pair, m, monkeypatch):
    """Weights and x, without anything beyond them. Within a program each byte counts once."""
    wk, gate = (random_matrix(format, n, 1024) for format, n in zip(pair, (128, 32), strict=True))
    w, x = ProjectionWeights(wk, gate), torch.randn(m, 1024, dtype=torch.bfloat16)
    loaded = {}
    load = interpreter.InterpreterBuilder.create_masked_load

    def counting(self, pointers, mask, *others):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for byte in range(size):
            loaded.setdefault(self.grid_idx, []).append(pointers.data[mask.data] + byte)
        return load(self, pointers, mask, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)
    project(x, w)
    every = np.concatenate([np.unique(np.concatenate(pieces)) for pieces in loaded.values()])
    config = choose(m, w.shape, w.formats, target_of(w.device))
    tiles_m = -(-m // config.block_m)
    x_reads = config.grid(m, 128, 32)[0]
    for times, tensors in ((x_reads, [x]), (tiles_m, [wk.tensors[0], gate.tensors[0]])):
        for tensor in tensors:
            inside = (every >= tensor.data_ptr()) & (every < tensor.data_ptr() + tensor.nbytes)
            assert inside.sum() == times * tensor.nbytes


@pytest.mark.parametrize(("k_dtype", "gate_dtype"), list(itertools.product([None, torch.float32], repeat=2)))
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_output_dtypes_round_the_fp32_sums(x_dtype, k_dtype, gate_dtype):
    w = weights(FP8, (128, 16, 256))
    x = torch.randn(9, 256, dtype=x_dtype)
    exact = project(x, w, k_dtype=torch.float32)
    outputs = project(x, w, k_dtype=k_dtype, gate_dtype=gate_dtype or x.dtype)
    for output, fp32, dtype in zip(outputs, exact, (k_dtype, gate_dtype), strict=True):
        assert output.dtype == (dtype or x.dtype)
        assert torch.equal(output, fp32.to(output.dtype))


@pytest.mark.parametrize("m", [3, 5, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_out_is_one_buffer_and_nothing_around_it_is_touched(m, dtype):
    d, h, k = shape = (128, 16, 256)
    w = weights(FP8, shape)
    x = torch.randn(m, k, dtype=torch.bfloat16)
    around = torch.full((m + 2, d + h + 6), torch.nan, dtype=dtype)
    out = around[1:-1, 3:-3]
    k_out, gate_out = project(x, w, out=out)
    assert k_out.data_ptr() == out.data_ptr()
    assert gate_out.data_ptr() == out[:, d:].data_ptr()
    expected = project(x, w, k_dtype=dtype, gate_dtype=dtype)
    assert torch.equal(out, torch.cat(expected, 1))
    assert around.isnan().sum() == around.numel() - out.numel()


@pytest.mark.parametrize("m", [3, 5, 70])
def test_row_strided_x_is_read_in_bounds(m):
    w = weights(FP8, (128, 16, 200))
    around = torch.full((m + 8, 301), torch.nan, dtype=torch.bfloat16)
    around[:m, :200] = torch.randn(m, 200)
    x = around[:m, :200]
    assert torch.equal(torch.cat(project(x, w), 1), torch.cat(project(x.contiguous(), w), 1))


@pytest.mark.parametrize("m", [3, 20, 70])
def test_default_dtype_does_not_matter(m):
    """Engines set it to the model's."""
    w, x = weights(FP8, (128, 16, 300)), torch.randn(m, 300, dtype=torch.bfloat16)
    expected = project(x, w)
    torch.set_default_dtype(torch.bfloat16)
    try:
        outputs = project(x, w)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(output, same) for output, same in zip(outputs, expected, strict=True))


def test_k_of_one():
    w = ProjectionWeights.pack(dense(128, 1), dense(16, 1))
    x = torch.randn(1, 5, dtype=torch.bfloat16).T  # its last stride, 5, is never used
    assert relative_error(project(x, w, k_dtype=torch.float32), reference(x, w)) <= 2e-6


def test_leading_dimensions_are_kept():
    w = weights("BF16, BF16", (128, 16, 128))
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    k, gate = project(x, w)
    assert (k.shape, gate.shape) == ((2, 3, 128), (2, 3, 16))
    assert torch.equal(k.view(6, 128), project(x.view(6, 128), w)[0])
    assert torch.equal(project(x[1, 2], w)[0], k[1, 2])


@pytest.mark.parametrize("rows", [(0,), (4, 0)])
def test_zero_rows(rows):
    w = weights(FP8, (128, 16, 128))
    k, gate = project(torch.empty(*rows, 128, dtype=torch.bfloat16), w)
    assert (k.shape, k.dtype) == ((*rows, 128), torch.bfloat16)
    assert (gate.shape, gate.dtype) == ((*rows, 16), torch.float32)
    out = torch.empty(*rows, 144, dtype=torch.bfloat16)
    assert project(torch.empty(*rows, 128, dtype=torch.bfloat16), w, out=out)[1].shape == (*rows, 16)


@pytest.mark.parametrize("activation", [None, "fp8"])
@pytest.mark.parametrize("m", [4, 5, 70])
def test_non_finite_activations_stay_in_their_row(m, activation):
    w = weights(FP8, (128, 16, 256))
    x = torch.randn(m, 256, dtype=torch.bfloat16)
    clean = project(x, w, activation=activation)
    for value in (torch.nan, torch.inf):
        x[3, 7] = value
        for output, before in zip(project(x, w, activation=activation), clean, strict=True):
            assert not output[3].isfinite().any()
            rest = torch.arange(m) != 3
            assert torch.equal(output[rest], before[rest])


@pytest.mark.parametrize("m", [5, 70])
def test_counters_are_zero_after_a_launch(m, monkeypatch):
    buffers = []

    def spy(*arguments):
        buffers.append(workspace(*arguments))
        return buffers[-1]

    monkeypatch.setattr("indexproj.kernels.launch.workspace", spy)
    project(torch.randn(m, 1000, dtype=torch.bfloat16), weights(FP8, (128, 16, 1000)))
    ((partials, arrived),) = buffers
    assert arrived.numel() > 0
    assert not arrived.any()
    assert partials.numel() > 0


def test_threads_do_not_disturb_each_other():
    w = weights(FP8, (128, 16, 500))
    xs = [torch.randn(5, 500, dtype=torch.bfloat16) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda x: project(x, w), xs))
    for x, output in zip(xs, outputs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(output, project(x, w), strict=True))


def test_opcheck():
    w = weights(FP8, (128, 16, 256))
    x = torch.randn(4, 512, dtype=torch.bfloat16)[:, :256]
    operands = [operand for matrix in (w.wk, w.gate) for operand in matrix.operands]
    tests, formats = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"), [str(f) for f in w.formats]
    for options in ((), ([1.0, 0.5], ["fp8", "none"], True)):
        inputs = x, operands, formats, [False, True], *options
        torch.library.opcheck(torch.ops.indexproj.project, inputs, test_utils=tests)
        inputs = x, operands, formats, torch.empty(4, 144, dtype=torch.bfloat16), *options
        torch.library.opcheck(torch.ops.indexproj.project_out, inputs, test_utils=tests)


def test_torch_compile_fullgraph():
    w = weights(FP8, (128, 16, 256))
    options = {"gate_scale": 0.5, "activation": "fp8"}
    compiled = torch.compile(lambda x: project(2 * x, w, **options), backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 70):
        x = torch.randn(m, 256, dtype=torch.bfloat16)
        for output, expected in zip(compiled(x), project(2 * x, w, **options), strict=True):
            assert torch.equal(output, expected)
            assert output.stride() == expected.stride()


def test_fp8_is_closer_to_fp64_than_weights_upcast_to_bf16():
    w = ProjectionWeights(fp8(128, 2048), dense(16, 2048))
    x = torch.randn(16, 2048, dtype=torch.bfloat16)
    exact = reference(x, w)[0]
    upcast = x.double() @ w.wk.dequantize(torch.bfloat16).double().T
    ours = project(x, w, k_dtype=torch.float32)[0]
    assert (ours - exact).abs().max() * 100 < (upcast - exact).abs().max()
