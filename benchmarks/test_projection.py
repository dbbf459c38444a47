"""The projection on a GPU: ours for every pair of encodings, against all that would be used instead.

Weights are not in L2: calls go through more copies of them than it holds. "device" is the time of a call in a replayed
CUDA graph; "eager" is that of a call from Python, launch included. Results are checked against fp64 first.
"""

import functools
import time

import pytest
import torch

from indexproj.benchmarks.contenders import OTHERS, OURS, UnavailableError
from indexproj.benchmarks.gates import PAIRS, SHAPES
from indexproj.benchmarks.gpu import floors
from indexproj.benchmarks.timing import Replay, copies_to_outgrow_l2, enough
from indexproj.indexer.cli.synthetic import random_matrix
from indexproj.kernels import ProjectionWeights, reference
from indexproj.kernels.workspace import counters_returned

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="measured on a GPU, and there is none here")

DEVICE = torch.device("cuda")
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192, 16384)
QUICK_MS = (1, 16, 256, 8192)
FP8 = "FP8 128x128, BF16"
# Others upcast: to them all pairs are one, but that bf16 rounds the weights.
CASES = [("indexproj", OURS["indexproj"], pair) for pair in PAIRS]
CASES += [("indexproj, bf16", OURS["indexproj, bf16"], pair) for pair in ("BF16, BF16", FP8)]
CASES += [(name, contender, FP8) for name, contender in OTHERS.items()]
# Largest error against fp64, relative to the largest output, where activations are rounded to FP8.
TOLERANCES = {"vLLM block-scaled": 0.1, "DeepGEMM": 0.1}


class Clock:
    """Seconds, divided by the calls of one round."""

    calls = 1

    def __call__(self):
        torch.cuda.synchronize()
        return time.perf_counter() / self.calls


CLOCK = Clock()


def run_all(calls):
    for call in calls:
        call()


@pytest.fixture(scope="module")
def copies():
    """Weights by shape and pair, as many copies as L2 does not hold; those of one case at a time."""
    kept = {}

    def of(shape, pair):
        if (shape, pair) not in kept:
            kept.clear()
            torch.manual_seed(0)
            *ns, k = SHAPES[shape]
            weights = ProjectionWeights.pack(
                *(random_matrix(kind, n, k) for kind, n in zip(PAIRS[pair], ns, strict=True))
            )
            count = copies_to_outgrow_l2(weights.nbytes, DEVICE)
            kept[shape, pair] = [weights.map(lambda tensor: tensor.to(DEVICE, copy=True)) for _ in range(count)]
        return kept[shape, pair]

    return of


@pytest.mark.parametrize("how", ["device", "eager"])
@pytest.mark.parametrize(("name", "contender", "pair"), CASES, ids=[f"{name}: {pair}" for name, _, pair in CASES])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(timer=CLOCK)
def test_projection(benchmark, copies, shape, name, contender, pair, m, how, quick):
    weights = copies(shape, pair)
    x = torch.randn(m, SHAPES[shape][-1], device=DEVICE).bfloat16()
    try:
        calls = [contender(x, one) for one in weights]
        outputs = calls[0]()
    except UnavailableError as error:
        pytest.skip(f"{name}: {error}")
    tolerance = 2**-8 if name in OURS else TOLERANCES.get(name, 2**-6)
    for output, exact in zip(outputs, reference(x, weights[0]), strict=True):
        assert (output.double() - exact).abs().max() <= tolerance * exact.abs().max()

    is_ours = name in OURS
    benchmark.group = f"{shape}, {how}"
    benchmark.extra_info |= {"row": f"{name}: {pair}" if is_ours else name, "column": m, "unit": "us"}
    rounds = 5 if quick else 15
    with counters_returned(x.device):
        together = enough(calls)
        CLOCK.calls = len(together)
        run = Replay(calls) if how == "device" else functools.partial(run_all, together)
        benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)
        del run
    gpu = torch.cuda.get_device_name()
    benchmark.extra_info |= floors(gpu, shape, pair if is_ours else "BF16, BF16", m, benchmark.stats.stats.median)
