"""What only a GPU shows: candidates of `tune` for four M, streams, graphs, subnormals, large tensors, torch.

`make test-gpu` also runs the cases of tests/interpreter on it.
"""

import functools
import itertools

import pytest
import torch
from torch.nn.functional import linear

from indexproj.benchmarks.tune import candidates, compile_all
from indexproj.kernels import project, reference
from indexproj.kernels.formats import parse_pair
from indexproj.kernels.target import INTERPRETED, target_of
from numerics import relative_error, run, surrounded
from support import ALL_PAIRS, DEEPSEEK, GLM, weights

FP8, BF16, FP32 = "FP8 128x128, BF16", torch.bfloat16, torch.float32
RAGGED = (120, 28, 6120)  # cuts tiles of rows and groups of 16 and 32
ROWS = (1, 5, 40, 700)


@pytest.fixture(autouse=True)
def target():
    """The current GPU; tensors are made on it."""
    if INTERPRETED or not torch.cuda.is_available():
        pytest.skip("needs a GPU, and a process without TRITON_INTERPRET=1")
    with torch.device("cuda", torch.cuda.current_device()) as device:
        yield target_of(device)


@functools.cache
def compile_candidates(target):
    """Compiles all candidates on all cores, instead of one by one at their launches."""
    cases = itertools.product(ROWS, map(parse_pair, ALL_PAIRS))
    found = {(config, formats) for m, formats in cases for config in candidates(m, RAGGED, formats, target)}
    kernels = [(config, RAGGED, formats, None, (FP32, FP32)) for config, formats in found]
    assert list(compile_all(target, kernels, 240))


@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("pair", ALL_PAIRS)
def test_candidates_at_ragged_sizes(pair, m, target):
    """NaN surrounds x and the weights, and outputs start as NaN. `tune` itself checks each kernel that it times."""
    compile_candidates(target)
    w = surrounded(weights(pair, RAGGED))
    x = torch.full((m + 2, 6144), torch.nan, dtype=BF16)[1:-1, : RAGGED[2]].normal_()
    configs, exact = candidates(m, RAGGED, w.formats, target), reference(x, w)
    errors = {config: relative_error(run(x, w, config), exact) for config in configs}
    assert not {config: error for config, error in errors.items() if not error <= 2e-6}


@pytest.mark.parametrize("is_busy", [False, True])
@pytest.mark.parametrize("m", [3, 16, 100, 1000])
def test_a_thousand_launches_give_the_same_bits(m, is_busy):
    """Also while another stream keeps the GPU busy."""
    w, x = weights(FP8, DEEPSEEK), torch.randn(m, DEEPSEEK[2], dtype=BF16)
    first, other = project(x, w), torch.cuda.Stream()
    square, differs = torch.randn(4096, 4096, dtype=BF16), torch.zeros((), dtype=torch.bool)
    for number in range(1000):
        if is_busy and number % 20 == 0:
            with torch.cuda.stream(other):
                torch.mm(square, square)
        for output, expected in zip(project(x, w), first, strict=True):
            differs |= (output != expected).any()
    assert not differs


@pytest.mark.parametrize("m", [3, 16, 100])
def test_graphs_on_two_streams_see_reloaded_weights(m):
    """Replayed at the same time, they do not disturb each other."""
    w, xs = weights(FP8, DEEPSEEK), torch.randn(2, m, DEEPSEEK[2], dtype=BF16)
    graphs, outputs, streams = [], [], [torch.cuda.Stream() for _ in xs]
    for x in xs:
        project(x, w)
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            outputs.append([project(x, w) for _ in range(8)])
    for _ in range(3):
        w.copy_(weights(FP8, DEEPSEEK))
        torch.cuda.synchronize()
        for _ in range(50):
            for graph, stream in zip(graphs, streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
        torch.cuda.synchronize()
        for x, calls in zip(xs, outputs, strict=True):
            expected = project(x, w)
            assert relative_error(expected, reference(x, w)) <= 2**-8
            assert all(torch.equal(a, b) for pair in calls for a, b in zip(pair, expected, strict=True))


def test_batch_invariant_rows_over_all_m():
    w, x = weights(FP8, GLM), torch.randn(4096, GLM[2], dtype=BF16)
    whole = project(x, w, k_dtype=FP32, batch_invariant=True)
    assert relative_error(whole, reference(x, w)) <= 2e-6
    for m in (*range(1, 300), 511, 1000, 2048, 4095):
        start = (37 * m) % (4096 - m)
        outputs = project(x[start : start + m], w, k_dtype=FP32, batch_invariant=True)
        for output, expected in zip(outputs, whole, strict=True):
            assert torch.equal(output, expected[start : start + m]), m


@pytest.mark.parametrize("m", [3, 20, 100])
@pytest.mark.parametrize("pair", ["BF16, BF16", "FP8 per row, BF16"])
def test_subnormal_activations_are_not_flushed(m, pair):
    """Weights are so large that sums are normal numbers."""
    bits = torch.randint(1, 0x80, (m, 512), dtype=torch.int16)
    x = torch.where(torch.rand(m, 512) < 0.5, bits, bits - 0x8000).view(BF16)
    w = weights(pair, (128, 32, 512)).map(lambda tensor: tensor * 2.0**60 if tensor.itemsize > 1 else tensor)
    assert relative_error(project(x, w, k_dtype=FP32), reference(x, w)) <= 2e-6


@pytest.mark.parametrize("m", [3, 20, 100])
def test_infinities_have_their_sign(m):
    w, x = weights(FP8, GLM), torch.randn(m, GLM[2], dtype=BF16)
    x[1, 7], x[2, 7] = torch.inf, -torch.inf
    for output, exact in zip(project(x, w), reference(x, w), strict=True):
        torch.testing.assert_close(output[1:3].float(), exact[1:3].float(), rtol=0, atol=0, equal_nan=True)
        assert output[0].isfinite().all()


@pytest.mark.parametrize("m", [40, 65536])
def test_tensors_beyond_2_gb(m):
    """Rows of x and out lie so far apart that offsets do not fit into 32 bits."""
    if torch.cuda.mem_get_info()[0] < 14e9:
        pytest.skip("needs 14 GB of free memory")
    (d, h, k), w, stride = GLM, weights(FP8, GLM), 2**31 // (m - 1) + 16
    x = torch.empty(m, stride, dtype=BF16)[:, :k].normal_()
    out = torch.empty(m, stride, dtype=BF16)[:, : d + h]
    outputs, picked = project(x, w, out=out), torch.arange(0, m, max(1, m // 500))
    for output, exact in zip(outputs, reference(x[picked], w), strict=True):
        assert relative_error([output[picked]], [exact]) <= 2**-8


@pytest.mark.parametrize("m", [1, 17, 300, 4096])
@pytest.mark.parametrize("shape", [DEEPSEEK, pytest.param(GLM, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("pair", ALL_PAIRS)
def test_error_against_fp64_next_to_torch(pair, shape, m):
    """torch computes with weights that were upcast to bf16, as engines do, and rounds to the same dtype."""
    w, x = weights(pair, shape), torch.randn(m, shape[2], dtype=BF16)
    exact, fused = reference(x, w), w.to_bf16().fused_weight
    ours = relative_error(project(x, w, gate_dtype=x.dtype), exact)
    theirs = relative_error(torch.split(linear(x, fused), list(shape[:2]), 1), exact)
    assert ours <= 2 * theirs + 1e-6
