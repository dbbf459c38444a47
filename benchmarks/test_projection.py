"""The projection on a GPU: ours for every pair of formats, and the alternatives.

Calls cycle through copies of the weights that do not fit into L2. "device" is the time of a call in a replayed CUDA
graph; "eager" includes launching from Python. Results are checked against fp64 first.
"""

import functools
import time

import pytest
import torch

from indexproj.benchmarks.contenders import OTHERS, OURS, UnavailableError
from indexproj.benchmarks.gpu import Replay, floors, repeated, weight_copies
from indexproj.indexer.models import PAIRS, SHAPES
from indexproj.kernels import reference
from indexproj.kernels.formats import parse_pair
from indexproj.kernels.workspace import recycled_counters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DEVICE = torch.device("cuda")
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096, 8192, 16384)
QUICK_MS = (1, 16, 256, 8192)
FP8 = "FP8 128x128, BF16"
# The alternatives upcast at load, so their time does not depend on the pair.
CASES = [("indexproj", OURS["indexproj"], pair) for pair in PAIRS]
CASES += [("indexproj, bf16", OURS["indexproj, bf16"], pair) for pair in ("BF16, BF16", FP8)]
CASES += [(name, contender, FP8) for name, contender in OTHERS.items()]
# Largest error against fp64 relative to the largest output, for contenders that round activations to FP8.
TOLERANCES = {"vLLM block-scaled": 0.1, "DeepGEMM": 0.1}


class Clock:
    """Seconds, divided by the calls in one round."""

    calls = 1

    def __call__(self):
        torch.cuda.synchronize()
        return time.perf_counter() / self.calls


CLOCK = Clock()


def run_all(calls):
    for call in calls:
        call()


@pytest.mark.parametrize("how", ["device", "eager"])
@pytest.mark.parametrize(("name", "contender", "pair"), CASES, ids=[f"{name}: {pair}" for name, _, pair in CASES])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.benchmark(timer=CLOCK)
def test_projection(benchmark, shape, name, contender, pair, m, how, quick):
    weights = weight_copies(SHAPES[shape], parse_pair(pair), DEVICE)
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
    benchmark.extra_info |= floors(torch.cuda.get_device_name(), shape, pair if is_ours else "BF16, BF16", m)
    with recycled_counters(x.device):
        in_turn = repeated(calls)
        CLOCK.calls = len(in_turn)
        run = Replay(calls) if how == "device" else functools.partial(run_all, in_turn)
        benchmark.pedantic(run, rounds=5 if quick else 15, warmup_rounds=2)
        del run
