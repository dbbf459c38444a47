"""The kernels, run by Triton's interpreter, against fp64."""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from indexproj.benchmarks.tune import candidates
from indexproj.kernels import (
    DenseMatrix,
    Fp4Matrix,
    Fp8Matrix,
    KernelConfig,
    ProjectionWeights,
    choose,
    project,
    project_all,
    reference,
)
from indexproj.kernels.launch import Problem, launch
from indexproj.kernels.matrix import Kind
from indexproj.kernels.reference import quantize
from indexproj.kernels.target import TARGETS
from indexproj.kernels.workspace import workspace
from support import DEEPSEEK, GLM, MATRICES, PAIRS, fp8, weights

SM90 = TARGETS["sm_90"]


def relative_error(outputs, exact):
    """max |difference| / max |reference|; NaN counts as wrong."""
    errors = []
    for output, truth in zip(outputs, exact, strict=True):
        assert output.shape == truth.shape
        errors.append(((output.double() - truth).abs().max() / truth.abs().max()).item())
    return float("nan") if any(error != error for error in errors) else max(errors)


def run(x, w, config=None, wk=None):
    """fp32 outputs of one launch, with a chosen config, and wk read as another kind."""
    *ns, k = w.shape
    outs = tuple(torch.full((len(x), n), torch.nan) for n in ns)
    kinds = wk or w.wk.kind, w.gate.kind
    problem = Problem(x.device, x.dtype, k, tuple(ns), kinds, (1.0, 1.0), (torch.float32, torch.float32))
    launch(x, (w.wk.operands, w.gate.operands), outs, problem, config)
    return outs


# The interpreter takes long for gemv and tiled at full K; smaller ones are below, with every pair.
PUBLISHED = [(pair, 17, torch.bfloat16) for pair in PAIRS]
PUBLISHED += [(pair, m, torch.bfloat16) for pair in ("fp8-dense", "nvfp4-nvfp4") for m in (2, 100)]
PUBLISHED += [("fp8-dense", m, torch.float16) for m in (1, 64, 100)]


@pytest.mark.parametrize(("pair", "m", "dtype"), PUBLISHED)
@pytest.mark.usefixtures("poison")
def test_published_shape(pair, m, dtype):
    w = weights(pair, DEEPSEEK if m in (2, 64, 100) else GLM)
    x = torch.randn(m, w.shape[2], dtype=dtype)
    assert relative_error(project(x, w, k_dtype=torch.float32), reference(x, w)) <= 2e-6


@pytest.mark.parametrize("m", [2, 3, 5, 8, 9, 16, 31, 33, 63, 65, 127, 129, 255, 257, 511, 1000, 2047, 4096])
@pytest.mark.parametrize("shape", [(128, 32, 200), (128, 16, 129), (40, 9, 61)], ids=str)
@pytest.mark.usefixtures("poison")
def test_every_m_and_ragged_k(shape, m):
    w = surrounded(weights("fp8-dense", shape))
    x = torch.randn(m, shape[2], dtype=torch.bfloat16)
    assert relative_error(project(x, w, k_dtype=torch.float32), reference(x, w)) <= 2e-6


@pytest.mark.parametrize("m", [1, 31, 100])
@pytest.mark.parametrize("k", [88, 544, 1000])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.usefixtures("poison")
def test_every_pair_at_ragged_sizes(pair, k, m):
    """Groups of 16 and 32 that K cuts, and nothing but NaN around every tensor."""
    w = surrounded(weights(pair, (100, 9, k)))
    x = torch.randn(m, k, dtype=torch.bfloat16)
    assert relative_error(project(x, w, k_dtype=torch.float32), reference(x, w)) <= 2e-6


ROWS = (1, 2, 3, 5, 8, 16, 17, 64, 100, 257)


@pytest.mark.parametrize("pair", ["fp8-dense", "nvfp4-nvfp4"])
@pytest.mark.usefixtures("exact_dot")
def test_rows_keep_their_bits_in_any_batch(pair):
    w = weights(pair, (128, 32, 1024))
    x = torch.randn(max(ROWS), 1024, dtype=torch.bfloat16)
    alone = project(x[:1], w, k_dtype=torch.float32, batch_invariant=True)
    whole = project(x, w, k_dtype=torch.float32, batch_invariant=True)
    assert relative_error(whole, reference(x, w)) <= 2e-6
    for m in ROWS:
        picked = torch.randperm(max(ROWS))[:m]
        outputs = project(x[picked], w, k_dtype=torch.float32, batch_invariant=True)
        for output, full in zip(outputs, whole, strict=True):
            assert torch.equal(output, full[picked])
    assert all(torch.equal(one[0], full[0]) for one, full in zip(alone, whole, strict=True))


@pytest.mark.parametrize("m", [3, 20, 70])
def test_the_gate_is_scaled_in_fp32_before_it_is_rounded(m):
    w = weights("fp8-fp8", (128, 32, 1000))
    x = torch.randn(m, 1000, dtype=torch.bfloat16)
    k, gate = project(x, w, k_dtype=torch.float32)
    scaled = project(x, w, k_dtype=torch.float32, gate_scale=32**-0.5 * 128**-0.5)
    factor = torch.tensor(32**-0.5 * 128**-0.5, dtype=torch.float32)
    assert torch.equal(scaled[0], k)
    assert torch.equal(scaled[1], gate * factor)
    rounded = project(x, w, gate_dtype=torch.bfloat16, gate_scale=32**-0.5 * 128**-0.5)[1]
    assert torch.equal(rounded, scaled[1].bfloat16())


@pytest.mark.parametrize("m", [3, 20, 70])
@pytest.mark.usefixtures("poison")
def test_each_matrix_takes_its_own_activation(m):
    matrices = fp8(128, 1000), weights("dense-dense", (128, 32, 1000)).gate, fp8(128, 1000)
    x = torch.randn(m, 1000, dtype=torch.bfloat16)
    outputs = project_all(x, matrices, dtypes=[torch.float32] * 3, activations=["fp8", None, "fp8_ue8m0"])
    rounded = quantize(x, False), x.double(), quantize(x, True)
    exact = [own @ matrix.dequantize(torch.float64).T for own, matrix in zip(rounded, matrices, strict=True)]
    assert relative_error(outputs, exact) <= 2e-6


@pytest.mark.parametrize("m", [3, 20, 70])
@pytest.mark.usefixtures("poison")
def test_three_matrices_are_as_good_as_two(m):
    shape = (128, 32, 1000)
    w, third = weights("nvfp4-dense", shape), fp8(128, 1000)
    x = torch.randn(m, 1000, dtype=torch.bfloat16)
    outputs = project_all(x, (w.wk, w.gate, third), dtypes=[torch.float32] * 3)
    exact = (*reference(x, w), x.double() @ third.dequantize(torch.float64).T)
    assert relative_error(outputs, exact) <= 2e-6
    for output, alone in zip(outputs, project(x, w, k_dtype=torch.float32), strict=False):
        assert torch.equal(output, alone)


@pytest.mark.parametrize("m", [3, 20, 100])
@pytest.mark.parametrize("pair", ["fp8-dense", "nvfp4-mxfp8"])
def test_bytes_are_asked_for_as_often_as_dispatch_says(pair, m, monkeypatch):
    """Of weights and x together with all scales, and of nothing beyond them; within a program each byte counts once."""
    wk, gate = (MATRICES[name](n, 1024) for name, n in zip(pair.split("-"), (128, 32), strict=True))
    w, x = ProjectionWeights(wk, gate), torch.randn(m, 1024, dtype=torch.bfloat16)
    asked = {}
    load = interpreter.InterpreterBuilder.create_masked_load

    def counting(self, pointers, mask, *others):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        for byte in range(size):
            asked.setdefault(self.grid_idx, []).append(pointers.data[mask.data] + byte)
        return load(self, pointers, mask, *others)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counting)
    project(x, w)
    every = np.concatenate([np.unique(np.concatenate(pieces)) for pieces in asked.values()])
    weight_reads, x_reads = choose(m, w.shape, w.kinds, SM90).reads(m, 128, 32)
    for times, tensors in ((x_reads, [x]), (weight_reads, [wk.tensors[0], gate.tensors[0]])):
        for tensor in tensors:
            inside = (every >= tensor.data_ptr()) & (every < tensor.data_ptr() + tensor.nbytes)
            assert inside.sum() == times * tensor.nbytes


def surrounded(w):
    """The same weights, with NaN before and behind every tensor."""

    def embed(tensor):
        around = torch.full((tensor.nbytes + 2048,), 0xFF, dtype=torch.uint8)
        inside = around[1024:-1024].view(tensor.dtype).view(tensor.shape)
        return inside.copy_(tensor)

    return w.map(embed)


# Splits that divide K, that do not, and that leave the last programs nothing to do.
@pytest.mark.parametrize("split_k", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(
    "config",
    [
        KernelConfig("split_k", block_m=8, block_k=64, slices=2, num_stages=2),
        KernelConfig("split_k", block_m=16, block_k=128, slices=1, num_stages=2, block_n=32),
        KernelConfig("split_k", block_m=16, block_k=64, slices=2, num_stages=2, serial=True),
        KernelConfig("tiled", block_m=16, block_k=64, num_stages=3),
        KernelConfig("tiled", block_m=64, block_k=128, num_stages=3),
    ],
    ids=lambda config: f"{config.regime}{'-serial' * config.serial}-{config.block_m}-{config.block_k}",
)
@pytest.mark.parametrize("pair", ["fp8-dense", "nvfp4-mxfp8"])
@pytest.mark.usefixtures("poison")
def test_splits(pair, config, split_k):
    wk, gate = (MATRICES[name](n, 1000) for name, n in zip(pair.split("-"), (128, 32), strict=True))
    w = surrounded(ProjectionWeights(wk, gate))
    x = torch.randn(19, 1000, dtype=torch.bfloat16)
    outputs = run(x, w, dataclasses.replace(config, split_k=split_k))
    assert relative_error(outputs, reference(x, w)) <= 2e-6


def all_codes(name, n, k):
    """A matrix with every code there is but NaN, many times over."""
    matrix = MATRICES[name.removesuffix("_fnuz")](n, k)
    codes = (torch.arange(n * matrix.tensors[0].shape[1]).view(n, -1) * 37 % 256).to(torch.uint8)
    if isinstance(matrix, Fp4Matrix):
        return dataclasses.replace(matrix, codes=codes)
    if name.endswith("_fnuz"):
        return Fp8Matrix(codes.masked_fill(codes == 0x80, 0).view(torch.float8_e4m3fnuz), matrix.scale)
    return Fp8Matrix(codes.masked_fill(codes & 0x7F == 0x7F, 0).view(torch.float8_e4m3fn), matrix.scale)


@pytest.mark.parametrize(("m", "regime"), [(4, "gemv"), (64, "split_k"), (300, "tiled")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "name", ["fp8", "fp8_row", "mxfp8", "nvfp4", "mxfp4", "fp8_fnuz", "fp8_row_fnuz", "mxfp8_fnuz"]
)
def test_identity_returns_the_decoded_weights(name, dtype, m, regime):
    w = ProjectionWeights(all_codes(name, 128, 300), all_codes(name, 160, 300))  # two block rows, the last one ragged
    picked = torch.arange(0, 300, 77 if regime == "gemv" else 1)  # a program per row takes the interpreter long
    config = choose(m, w.shape, w.kinds, SM90)
    assert config.regime == regime
    k, gate = run(torch.eye(300, dtype=dtype)[picked], w, config)
    assert torch.equal(k.T, w.wk.dequantize()[:, picked])
    assert torch.equal(gate.T, w.gate.dequantize()[:, picked])


@pytest.mark.parametrize(("m", "regime"), [(4, "gemv"), (64, "split_k"), (300, "tiled")])
@pytest.mark.parametrize("scale", [0, 1, 254])
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_the_outermost_e8m0_scales_are_exact(name, scale, m, regime):
    matrix = MATRICES[name](128, 64)
    ones = torch.full_like(matrix.tensors[0].view(torch.uint8), 0x22 if name == "mxfp4" else 0x38)
    e8m0 = torch.full_like(matrix.scale.view(torch.uint8), scale).view(torch.float8_e8m0fnu)
    w = ProjectionWeights(*[type(matrix)(ones.view(matrix.codes.dtype), e8m0)] * 2)
    config = choose(m, w.shape, w.kinds, SM90)
    assert config.regime == regime
    k, gate = run(torch.eye(64, dtype=torch.bfloat16)[:2], w, config)
    assert torch.equal(k, torch.full_like(k, 2.0 ** (scale - 127)))
    assert torch.equal(gate, k)


@pytest.mark.parametrize(("m", "regimes"), [(5, {"gemv", "split_k"}), (40, {"split_k", "tiled"})])
def test_whatever_tuning_measures_is_right(m, regimes):
    w = weights("fp8-dense", (128, 16, 300))
    x = torch.randn(m, 300, dtype=torch.bfloat16)
    found = candidates(m, w.shape, w.kinds, dataclasses.replace(SM90, sm_count=40))
    assert {config.regime for config in found} == regimes
    for config in found:
        assert relative_error(run(x, w, config), reference(x, w)) <= 2e-6, config


def test_identity_at_full_k():
    w = weights("fp8-dense", DEEPSEEK)
    for m, step in ((4, 911), (64, 113), (128, 113)):  # some of the 7168 unit vectors, in every split and scale block
        picked = torch.arange(0, 7168, step)
        eye = torch.zeros(len(picked), 7168, dtype=torch.bfloat16)
        eye[torch.arange(len(picked)), picked] = 1
        k, gate = run(eye, w, choose(m, w.shape, w.kinds, SM90))
        assert torch.equal(k.T, w.wk.dequantize()[:, picked])
        assert torch.equal(gate.T, w.gate.dequantize()[:, picked])


@pytest.mark.parametrize("m", [3, 7, 100])
def test_two_runs_give_the_same_bits(m):
    w = weights("fp8-dense", GLM)
    x = torch.randn(m, GLM[2], dtype=torch.bfloat16)
    first, second = (project(x, w, k_dtype=torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("k_dtype", "gate_dtype"), list(itertools.product([None, torch.float32], repeat=2)))
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_output_dtypes_round_the_fp32_sums(x_dtype, k_dtype, gate_dtype):
    w = weights("fp8-dense", (128, 16, 256))
    x = torch.randn(9, 256, dtype=x_dtype)
    exact = project(x, w, k_dtype=torch.float32)
    outputs = project(x, w, k_dtype=k_dtype, gate_dtype=gate_dtype or x.dtype)
    for output, fp32, dtype in zip(outputs, exact, (k_dtype, gate_dtype), strict=True):
        assert output.dtype == (dtype or x.dtype)
        assert torch.equal(output, fp32.to(output.dtype))


@pytest.mark.parametrize("m", [3, 5, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_out_is_one_buffer_and_nothing_beside_it_is_touched(m, dtype):
    d, h, k = shape = (128, 16, 256)
    w = weights("fp8-dense", shape)
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
    w = weights("fp8-dense", (128, 16, 200))
    around = torch.full((m + 8, 301), torch.nan, dtype=torch.bfloat16)
    around[:m, :200] = torch.randn(m, 200)
    x = around[:m, :200]
    assert torch.equal(torch.cat(project(x, w), 1), torch.cat(project(x.contiguous(), w), 1))


@pytest.mark.parametrize("m", [3, 20, 70])
def test_the_default_dtype_is_no_matter(m):
    """Engines set it to that of the model."""
    w, x = weights("fp8-dense", (128, 16, 1000)), torch.randn(m, 1000, dtype=torch.bfloat16)
    expected = project(x, w)
    torch.set_default_dtype(torch.bfloat16)
    try:
        outputs = project(x, w)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(output, same) for output, same in zip(outputs, expected, strict=True))


def test_a_k_of_one():
    w = weights("dense-dense", (128, 16, 1))
    x = torch.randn(1, 5, dtype=torch.bfloat16).T  # its last stride is 5, and nobody ever takes that step
    assert relative_error(project(x, w, k_dtype=torch.float32), reference(x, w)) <= 2e-6


def test_leading_dimensions_are_kept():
    w = weights("dense-dense", (128, 16, 128))
    x = torch.randn(2, 3, 128, dtype=torch.bfloat16)
    k, gate = project(x, w)
    assert (k.shape, gate.shape) == ((2, 3, 128), (2, 3, 16))
    assert torch.equal(k.view(6, 128), project(x.view(6, 128), w)[0])
    vector = project(x[1, 2], w)
    assert torch.equal(vector[0], k[1, 2])


@pytest.mark.parametrize("rows", [(0,), (4, 0)])
def test_no_rows(rows):
    w = weights("fp8-dense", (128, 16, 128))
    k, gate = project(torch.empty(*rows, 128, dtype=torch.bfloat16), w)
    assert (k.shape, k.dtype) == ((*rows, 128), torch.bfloat16)
    assert (gate.shape, gate.dtype) == ((*rows, 16), torch.float32)
    out = torch.empty(*rows, 144, dtype=torch.bfloat16)
    assert project(torch.empty(*rows, 128, dtype=torch.bfloat16), w, out=out)[1].shape == (*rows, 16)


@pytest.mark.parametrize("m", [4, 5, 70])
def test_a_non_finite_row_stays_in_its_row(m):
    w = weights("fp8-dense", (128, 16, 256))
    x = torch.randn(m, 256, dtype=torch.bfloat16)
    clean = project(x, w)
    x[3, 7] = torch.nan
    for output, before in zip(project(x, w), clean, strict=True):
        assert output[3].isnan().all()
        rest = torch.arange(m) != 3
        assert torch.equal(output[rest], before[rest])


@pytest.mark.parametrize("m", [5, 70])
def test_counters_are_zero_again_after_a_launch(m, monkeypatch):
    lent = []

    def spy(*arguments):
        lent.append(workspace(*arguments))
        return lent[-1]

    monkeypatch.setattr("indexproj.kernels.launch.workspace", spy)
    project(torch.randn(m, 1000, dtype=torch.bfloat16), weights("fp8-dense", (128, 16, 1000)))
    ((partial, arrived),) = lent
    assert arrived.numel() > 0
    assert not arrived.any()
    assert partial.numel() > 0


def test_threads_do_not_disturb_each_other():
    w = weights("fp8-dense", (128, 16, 1000))
    xs = [torch.randn(5, 1000, dtype=torch.bfloat16) for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda x: project(x, w), xs))
    for x, (k, gate) in zip(xs, outputs, strict=True):
        expected = project(x, w)
        assert torch.equal(k, expected[0])
        assert torch.equal(gate, expected[1])


def test_the_ops_are_sound_for_the_compiler():
    w = weights("fp8-dense", (128, 16, 256))
    x = torch.randn(4, 512, dtype=torch.bfloat16)[:, :256]
    operands = [operand for matrix in (w.wk, w.gate) for operand in matrix.operands if operand is not None]
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for wk, options in (("FP8_BLOCK", ()), ("W8A8", ([1.0, 0.5], True))):
        inputs = (x, operands, f"{wk} BF16:fp32", *options)
        torch.library.opcheck(torch.ops.indexproj.project, inputs, test_utils=tests)
        inputs = (x, operands, f"{wk} BF16", torch.empty(4, 144, dtype=torch.bfloat16), *options)
        torch.library.opcheck(torch.ops.indexproj.project_out, inputs, test_utils=tests)


def test_compiles_without_graph_breaks():
    w = weights("fp8-dense", (128, 16, 256))
    options = {"gate_scale": 0.5, "activation": "fp8"}
    compiled = torch.compile(lambda x: project(2 * x, w, **options), backend="aot_eager", fullgraph=True, dynamic=True)
    for m in (3, 70):
        x = torch.randn(m, 256, dtype=torch.bfloat16)
        for output, expected in zip(compiled(x), project(2 * x, w, **options), strict=True):
            assert torch.equal(output, expected)
            assert output.stride() == expected.stride()


def uneven(m, k):
    """x whose groups of 128 differ by up to 2**40, with a row of zeros, one of nearly nothing and a huge element."""
    groups = torch.exp2(torch.randint(-20, 20, (m, -(-k // 128))).float()).repeat_interleave(128, 1)[:, :k]
    x = (torch.randn(m, k) * groups).bfloat16()
    if m > 2:
        x[0] = 0
        x[1] *= 2.0**-40
        x[2, k // 2] = 2.0**100
    return x


def row_errors(outputs, exact):
    """Of each row, max |difference| / max |reference|, so that large rows hide nothing; 0 in a row of zeros."""
    return torch.stack([
        ((output.double() - truth).abs().amax(1) / truth.abs().amax(1).clamp(min=1e-300)).max()
        for output, truth in zip(outputs, exact, strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize("m", [1, 5, 17, 67, 300])
@pytest.mark.parametrize("shape", [(128, 32, 1000), (150, 9, 520), (40, 9, 61)], ids=str)
@pytest.mark.parametrize("activation", ["fp8", "fp8_ue8m0"])
@pytest.mark.usefixtures("poison")
def test_w8a8(activation, shape, m):
    w = surrounded(weights("fp8-dense", shape))
    x = uneven(m, shape[2])
    outputs = project(x, w, k_dtype=torch.float32, activation=activation)
    assert row_errors(outputs, reference(x, w, activation)).max() <= 2e-6


@pytest.mark.parametrize("m", [1, 17, 100])
@pytest.mark.parametrize("activation", ["fp8", "fp8_ue8m0"])
@pytest.mark.parametrize("pair", ["fp8-dense", "fp8-fp8"])
@pytest.mark.usefixtures("poison")
def test_w8a8_at_published_shapes(pair, activation, m):
    w = weights(pair, GLM)
    w = ProjectionWeights(w.wk.to_fnuz(), w.gate)
    x = uneven(m, GLM[2]) if pair == "fp8-dense" else uneven(m, GLM[2]).half().nan_to_num(posinf=60000)
    outputs = project(x, w, k_dtype=torch.float32, activation=activation)
    assert row_errors(outputs, reference(x, w, activation)).max() <= 2e-6


@pytest.mark.parametrize(
    "config",
    [
        KernelConfig("gemv", block_m=4, block_k=128, slices=8),
        KernelConfig("split_k", block_m=8, block_k=64, slices=2, split_k=3),
        KernelConfig("split_k", block_m=16, block_k=128, slices=2, split_k=3, block_n=32),
        KernelConfig("split_k", block_m=16, block_k=64, slices=8, split_k=2, serial=True),
        KernelConfig("tiled", block_m=16, block_k=128, split_k=1),
        KernelConfig("tiled", block_m=32, block_k=128, split_k=3),
    ],
    ids=str,
)
@pytest.mark.usefixtures("poison")
def test_w8a8_leaves_the_gate_alone(config):
    """Bit for bit, in any config."""
    w = surrounded(weights("fp8-dense", (128, 32, 1000)))
    x = uneven(19, 1000)
    plain, rounded = run(x, w, config), run(x, w, config, wk=Kind.W8A8)
    assert row_errors(rounded, reference(x, w, "fp8")).max() <= 2e-6
    assert not torch.equal(plain[0], rounded[0])
    assert torch.equal(plain[1], rounded[1])


@pytest.mark.parametrize("ue8m0", [False, True])
def test_every_bf16_value_is_rounded_as_torch_does(ue8m0):
    """One group at a time; k is x in e4m3 where wk is the identity."""
    x = torch.arange(0x7F80).to(torch.int16).view(torch.bfloat16)
    x = torch.cat((x, -x)).view(-1, 128)  # neighbours
    x = torch.cat((x, x.T.reshape(-1, 128)))  # from all over
    eye = Fp8Matrix(torch.eye(128).to(torch.float8_e4m3fn), torch.ones(1, 1))
    w = ProjectionWeights(eye, DenseMatrix(torch.ones(16, 128, dtype=torch.bfloat16)))
    k, _ = project(x, w, k_dtype=torch.float32, activation="fp8_ue8m0" if ue8m0 else "fp8")
    assert torch.equal(k, quantize(x, ue8m0).float())


@pytest.mark.usefixtures("exact_dot")
def test_w8a8_rows_keep_their_bits_in_any_batch():
    w, x = weights("fp8-dense", (128, 32, 1024)), uneven(100, 1024)
    options = {"k_dtype": torch.float32, "batch_invariant": True, "activation": "fp8"}
    whole = project(x, w, **options)
    assert row_errors(whole, reference(x, w, "fp8")).max() <= 2e-6
    for m in (1, 3, 17, 64):
        picked = torch.randperm(100)[:m]
        for output, full in zip(project(x[picked], w, **options), whole, strict=True):
            assert torch.equal(output, full[picked])


@pytest.mark.parametrize("m", [1, 5, 70])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_non_finite_row_stays_in_its_row_with_w8a8(value, m):
    w, x = weights("fp8-dense", (128, 16, 256)), torch.randn(m, 256, dtype=torch.bfloat16)
    clean = project(x, w, activation="fp8")
    x[m // 2, 7] = value
    k, gate = project(x, w, activation="fp8")
    assert k[m // 2].isnan().all()
    assert not gate[m // 2].isfinite().any()
    rest = torch.arange(m) != m // 2
    assert torch.equal(k[rest], clean[0][rest])
    assert torch.equal(gate[rest], clean[1][rest])


def test_fp8_is_closer_to_fp64_than_weights_upcast_to_bf16():
    w = ProjectionWeights(fp8(128, 7168), weights("dense-dense", DEEPSEEK).gate)
    x = torch.randn(16, 7168, dtype=torch.bfloat16)
    exact = reference(x, w)[0]
    upcast = x.double() @ w.wk.dequantize(torch.bfloat16).double().T
    ours = project(x, w, k_dtype=torch.float32)[0]
    assert (ours - exact).abs().max() * 100 < (upcast - exact).abs().max()
