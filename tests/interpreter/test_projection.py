"""The kernels in Triton's interpreter against fp64: numbers, bounds, determinism, outputs."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from indexproj.benchmarks.tune import candidates
from indexproj.kernels import Format, KernelConfig, ProjectionWeights, choose, project, project_all, reference
from indexproj.kernels.formats import parse_pair
from indexproj.kernels.reference import quantize
from indexproj.kernels.target import INTERPRETED, target_of
from numerics import largest_row_error, relative_error, run, surrounded, uneven
from support import ALL_PAIRS, DEEPSEEK, GLM, dense, random_matrix, weights

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FP8, FP4, BOTH_FP8 = "FP8 128x128, BF16", "NVFP4, NVFP4", "FP8 128x128, FP8 128x128"
full = pytest.mark.full
MIXED = [(Format.FP8_BLOCK, Format.BF16), (Format.NVFP4, Format.MXFP8)]

# Pair, shape, M, dtype of x, activation. K cuts groups of 16 and 32; a full K takes the interpreter long.
FEW_ROWS, MORE_ROWS = (2, 5, 9, 33, 65, 257), (3, 8, 16, 31, 63, 127, 129, 255, 511, 1000, 2047, 4096)
RAGGED, W8A8 = [(128, 32, 200), (40, 9, 61)], ("fp8", "fp8_ue8m0")
CASES = [(FP8, DEEPSEEK, 17, BF16, None), (FP4, GLM, 100, BF16, None)]
CASES += product([FP8], RAGGED, FEW_ROWS, [BF16], [None])
CASES += product(ALL_PAIRS, [(100, 9, 344)], (1, 31, 100), [BF16], [None])
CASES += product([FP8], [(128, 32, 1000), (40, 9, 61)], (1, 5, 67), [BF16], W8A8)
WIDER = [*product(ALL_PAIRS, [GLM], [17], [BF16], [None]), *product((FP8, FP4), [DEEPSEEK], [2], [BF16], [None])]
WIDER += [*product([FP8], [DEEPSEEK], (1, 64, 100), [FP16], [None]), *product([FP8], RAGGED, MORE_ROWS, [BF16], [None])]
WIDER += product([FP8], [(128, 16, 129)], FEW_ROWS + MORE_ROWS, [BF16], [None])
WIDER += product(ALL_PAIRS, [(100, 9, 88), (100, 9, 1000)], (1, 31, 100), [BF16], [None])
WIDER += product([FP8], [(150, 9, 520)], (1, 5, 67), [BF16], W8A8)
WIDER += product([FP8], [(150, 9, 520), (128, 32, 1000), (40, 9, 61)], (17, 300), [BF16], W8A8)
WIDER += [*product([FP8], [GLM], (1, 17, 100), [BF16], W8A8), *product([BOTH_FP8], [GLM], (1, 17, 100), [FP16], W8A8)]


@pytest.mark.parametrize(
    ("pair", "shape", "m", "dtype", "activation"),
    [*CASES, *(pytest.param(*case, marks=full) for case in WIDER)],
    ids=str,
)
@pytest.mark.usefixtures("poison")
def test_project_against_fp64(pair, shape, m, dtype, activation):
    """NaN surrounds every tensor of the weights. In W8A8 groups of x differ, and all rows count alike."""
    w = surrounded(weights(pair, shape))
    x = uneven(m, shape[2]).to(dtype).nan_to_num() if activation else torch.randn(m, shape[2], dtype=dtype)
    outputs, exact = project(x, w, k_dtype=FP32, activation=activation), reference(x, w, activation)
    assert (largest_row_error if activation else relative_error)(outputs, exact) <= 2e-6


GEMV = KernelConfig("gemv", block_m=4, block_k=128, slices=8)
CONFIGS = [
    KernelConfig("split_k", block_m=8, block_k=64, slices=2),
    KernelConfig("split_k", block_m=16, block_k=128, slices=2, block_n=32),
    KernelConfig("split_k", block_m=16, block_k=64, slices=8, loop_splits=True),
    KernelConfig("split_k", block_m=16, block_k=128, slices=1, loop_splits=True, block_n=32),
    KernelConfig("prefill", block_m=16, block_k=64, block_n=0),
    KernelConfig("prefill", block_m=16, block_k=128, block_n=0),
    KernelConfig("prefill", block_m=32, block_k=128, block_n=32),
]


# Splits that divide K, that do not, and that leave the last programs without steps.
@pytest.mark.parametrize(
    ("config", "split_k"),
    [(GEMV, 1), *product(CONFIGS, (1, 3)), *(pytest.param(*c, marks=full) for c in product(CONFIGS, (2, 5, 16)))],
    ids=str,
)
@pytest.mark.parametrize("pair", MIXED, ids=str)
@pytest.mark.usefixtures("poison")
def test_splits_of_k(pair, config, split_k):
    """The gate has the same bits with and without W8A8."""
    w = surrounded(ProjectionWeights(*map(random_matrix, pair, (40, 9), (1000, 1000))))
    x = uneven(5 if config == GEMV else 19, 1000)
    config = dataclasses.replace(config, split_k=split_k)
    plain = run(x, w, config)
    assert largest_row_error(plain, reference(x, w)) <= 2e-6
    if pair == MIXED[0] and config.block_k * config.slices % 128 == 0:
        rounded = run(x, w, config, activation="fp8")
        assert largest_row_error(rounded, reference(x, w, "fp8")) <= 2e-6
        assert not torch.equal(plain[0], rounded[0])
        assert torch.equal(plain[1], rounded[1])


@pytest.mark.parametrize("m", [3, 20, 100])
@pytest.mark.parametrize("pair", ["BF16, BF16", FP8, FP4])
@pytest.mark.usefixtures("poison")
def test_addresses_that_are_no_multiples_of_16(pair, m):
    w = surrounded(weights(pair, (100, 9, 344)), offset=1)
    x = torch.randn(m * 345 + 1, dtype=BF16)[1:].view(m, 345)[:, :344]
    out = torch.full((m * 111 + 1,), torch.nan)[1:].view(m, 111)[:, 1:110]
    assert all(tensor.data_ptr() % 16 for tensor in (x, out, w.wk.tensors[0]))
    assert relative_error(project(x, w, out=out), reference(x, w)) <= 2e-6


@pytest.mark.parametrize(("m", "regimes"), [(5, {"gemv", "split_k"}), (40, {"split_k", "prefill"})])
@pytest.mark.full
def test_every_candidate_of_tune(m, regimes):
    w, x = weights(FP8, (128, 16, 300)), torch.randn(m, 300, dtype=BF16)
    found = candidates(m, w.shape, w.formats, dataclasses.replace(target_of(w.device), sm_count=40))
    assert {config.regime for config in found} == regimes
    for config in found:
        if not (config.pdl and INTERPRETED):  # the interpreter knows no PDL
            assert relative_error(run(x, w, config), reference(x, w)) <= 2e-6, config


@pytest.mark.parametrize(("pair", "activation"), [(FP8, None), (FP8, "fp8"), pytest.param(FP4, None, marks=full)])
@pytest.mark.usefixtures("exact_dot")
def test_batch_invariant_rows_keep_their_bits(pair, activation):
    w, x = weights(pair, (64, 16, 1024)), uneven(257, 1024) if activation else torch.randn(257, 1024, dtype=BF16)
    options = {"k_dtype": FP32, "batch_invariant": True, "activation": activation}
    whole = project(x, w, **options)
    assert largest_row_error(whole, reference(x, w, activation)) <= 2e-6
    for m in (1, 3, 8, 16, 17, 64, 100, 257):
        picked = torch.randperm(257)[:m]
        for output, expected in zip(project(x[picked], w, **options), whole, strict=True):
            assert torch.equal(output, expected[picked])


@pytest.mark.parametrize("m", [3, 20, 70])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_same_bits_whatever_the_outputs_and_strides(dtype, m):
    """Outputs round the fp32 sums; two runs, rows of x apart and torch's default dtype change nothing."""
    w, x = weights("FP8 128x128, FP8 128x128", (40, 9, 600)), torch.randn(m, 600, dtype=dtype)
    k, gate = project(x, w, k_dtype=FP32)
    for k_dtype, gate_dtype in product((None, FP32), (dtype, FP32)):
        outputs = project(x, w, k_dtype=k_dtype, gate_dtype=gate_dtype)
        assert equal(outputs, (k.to(k_dtype or dtype), gate.to(gate_dtype)))
    scale = 32**-0.5 * 128**-0.5
    assert equal(project(x, w, k_dtype=FP32, gate_scale=scale), (k, gate * torch.tensor(scale)))
    apart = torch.full((m + 8, 701), torch.nan, dtype=dtype)
    apart[:m, :600] = x
    torch.set_default_dtype(BF16)  # as engines do
    try:
        assert equal(project(apart[:m, :600], w, k_dtype=FP32), (k, gate))
    finally:
        torch.set_default_dtype(FP32)
    for out_dtype in (dtype, FP32):
        around = torch.full((m + 2, 40 + 9 + 6), torch.nan, dtype=out_dtype)
        out = around[1:-1, 3:-3]
        outputs = project(x, w, out=out)
        assert [output.data_ptr() for output in outputs] == [out.data_ptr(), out[:, 40:].data_ptr()]
        assert equal(outputs, (k.to(out_dtype), gate.to(out_dtype)))
        assert around.isnan().sum() == around.numel() - out.numel()


def equal(outputs, expected):
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("m", [3, 20, 100])
@pytest.mark.parametrize(
    ("formats", "shape", "activations"),
    [
        ("NVFP4, BF16, FP8 128x128", (128, 32, 128, 500), [None] * 3),
        ("FP8 128x128, BF16, FP8 128x128", (128, 32, 128, 500), ["fp8", None, "fp8_ue8m0"]),
        # As in DeepSeek-V4, where two compressors and weights_proj read the same x.
        ("BF16, BF16, BF16", (600, 64, 270, 200), [None] * 3),
    ],
)
@pytest.mark.usefixtures("poison")
def test_three_matrices(formats, shape, activations, m):
    *ns, k = shape
    matrices, x = list(map(random_matrix, parse_pair(formats), ns, [k] * 3)), torch.randn(m, k, dtype=BF16)
    outputs = project_all(x, matrices, dtypes=[FP32] * 3, activations=activations)
    xs = [x.double() if each is None else quantize(x, each == "fp8_ue8m0") for each in activations]
    exact = [own @ matrix.dequantize(torch.float64).T for own, matrix in zip(xs, matrices, strict=True)]
    assert relative_error(outputs, exact) <= 2e-6
    if m == 20:  # otherwise kernel or tiles depend on the number of columns
        for output, matrix, each in zip(outputs, matrices, activations, strict=True):
            assert torch.equal(output, *project_all(x, [matrix], dtypes=[FP32], activations=[each]))


@pytest.mark.skipif(not INTERPRETED, reason="counts the loads of Triton's interpreter")
@pytest.mark.parametrize("m", [3, 20, 100])
@pytest.mark.parametrize("pair", MIXED, ids=str)
def test_bytes_loaded_are_those_that_dispatch_counts(pair, m, monkeypatch):
    """Weights and x, without anything beyond them. Within a program each byte counts once."""
    w = ProjectionWeights(*map(random_matrix, pair, (128, 32), (1024, 1024)))
    x, loaded, load = torch.randn(m, 1024, dtype=BF16), {}, interpreter.InterpreterBuilder.create_masked_load

    def counting(self, pointers, mask, *others):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for byte in range(size):
            loaded.setdefault(self.grid_idx, []).append(pointers.data[mask.data] + byte)
        return load(self, pointers, mask, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)
    project(x, w)
    every = np.concatenate([np.unique(np.concatenate(pieces)) for pieces in loaded.values()])
    config = choose(m, w.shape, w.formats, target_of(w.device))
    x_reads, _, tiles_m = config.grid(m, 128, 32)
    for times, tensor in ((x_reads, x), (tiles_m, w.wk.tensors[0]), (tiles_m, w.gate.tensors[0])):
        inside = (every >= tensor.data_ptr()) & (every < tensor.data_ptr() + tensor.nbytes)
        assert inside.sum() == times * tensor.nbytes


def test_k_of_one():
    w = ProjectionWeights.pack(dense(128, 1), dense(16, 1))
    x = torch.randn(1, 5, dtype=BF16).T  # its last stride, 5, is never used
    assert relative_error(project(x, w, k_dtype=FP32), reference(x, w)) <= 2e-6


@pytest.mark.parametrize("rows", [(2, 3), (), (0,), (4, 0)], ids=str)
def test_leading_dimensions_are_kept(rows):
    w, x, out = weights(FP8, (128, 16, 128)), torch.randn(*rows, 128, dtype=BF16), torch.empty(*rows, 144, dtype=BF16)
    k, gate = project(x, w)
    assert (k.shape, k.dtype) == ((*rows, 128), BF16)
    assert (gate.shape, gate.dtype) == ((*rows, 16), FP32)
    assert equal((k, gate.bfloat16()), project(x, w, out=out))
    assert torch.equal(k.flatten(), project(x.reshape(k.numel() // 128, 128), w)[0].flatten())


@pytest.mark.parametrize("activation", [None, "fp8"])
@pytest.mark.parametrize("m", [4, 5, 70])
def test_non_finite_activations_stay_in_their_row(m, activation):
    w, x = weights(FP8, (40, 9, 256)), torch.randn(m, 256, dtype=BF16)
    clean, rest = project(x, w, activation=activation), torch.arange(m) != 3
    for value in (torch.nan, torch.inf):
        x[3, 7] = value
        for output, before in zip(project(x, w, activation=activation), clean, strict=True):
            assert not output[3].isfinite().any()
            assert torch.equal(output[rest], before[rest])


def test_threads_do_not_disturb_each_other():
    w, xs = weights(FP8, (128, 16, 500)), torch.randn(4, 5, 500, dtype=BF16)
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda x: project(x, w), xs))
    assert all(equal(output, project(x, w)) for x, output in zip(xs, outputs, strict=True))


def test_opcheck():
    w, x = weights(FP8, (40, 9, 256)), torch.randn(4, 512, dtype=BF16)[:, :256]
    operands = [operand for matrix in (w.wk, w.gate) for operand in matrix.operands]
    tests, formats = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"), [str(f) for f in w.formats]
    for options in (([1.0, 1.0], ["none"] * 2, False), ([1.0, 0.5], ["fp8", "none"], True)):
        inputs = x, operands, formats, [False, True], *options
        torch.library.opcheck(torch.ops.indexproj.project, inputs, test_utils=tests)
        inputs = x, operands, formats, torch.empty(4, 49, dtype=BF16), *options
        torch.library.opcheck(torch.ops.indexproj.project_out, inputs, test_utils=tests)


def test_torch_compile_fullgraph():
    w, options = weights(FP8, (128, 16, 256)), {"gate_scale": 0.5, "activation": "fp8"}
    compiled = torch.compile(lambda x: project(2 * x, w, **options), backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 70):
        x = torch.randn(m, 256, dtype=BF16)
        outputs, expected = compiled(x), project(2 * x, w, **options)
        assert equal(outputs, expected)
        assert [output.stride() for output in outputs] == [output.stride() for output in expected]
