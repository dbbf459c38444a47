"""What a server waits for at the first launch of a kernel for an H100: compilation, or a look-up in Triton's cache.

For FP8 wk and a BF16 gate. `indexproj compile --cache` turns the first into the second.
"""

import pytest

from indexproj.benchmarks.compiled import signature, warm_up
from indexproj.indexer.models import SHAPES
from indexproj.kernels import TARGETS, choose
from indexproj.kernels.formats import parse_pair
from indexproj.kernels.launch import KERNELS

SHAPE, FORMATS = SHAPES["deepseek-v3.2"], parse_pair("FP8 128x128, BF16")
MS, QUICK_MS = (1, 16, 8192), (16,)


@pytest.mark.parametrize("how", ["compiled", "cached"])
def test_first_launch(benchmark, tmp_path, monkeypatch, m, how, quick):
    config = choose(m, SHAPE, FORMATS, TARGETS["sm_90"])
    folders = iter(range(100))

    def forget():
        for kernel in KERNELS.values():
            kernel.device_caches.clear()
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / (str(next(folders)) if how == "compiled" else "cache")))

    benchmark.group = "First launch of a kernel for an H100, on this host"
    benchmark.extra_info |= {"row": how, "column": config.regime, "unit": "ms"}
    rounds, warmup_rounds = 1 if quick else 5, 1 if how == "cached" else 0
    arguments = TARGETS["sm_90"], config, signature(SHAPE, FORMATS)
    binary = benchmark.pedantic(warm_up, arguments, setup=forget, rounds=rounds, warmup_rounds=warmup_rounds)
    assert binary.asm["cubin"]
