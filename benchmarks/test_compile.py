"""What a server waits for when it launches a kernel for the first time: compiled, or found in Triton's cache.

For an H100, FP8 wk and BF16 gate. `indexproj compile --cache` turns the first into the second.
"""

import pytest

from indexproj.benchmarks.compiled import warm_up
from indexproj.benchmarks.gates import SHAPES
from indexproj.kernels import TARGETS, choose
from indexproj.kernels.launch import KERNELS
from indexproj.kernels.matrix import Kind

SHAPE, KINDS = SHAPES["deepseek-v3.2"], (Kind.FP8_BLOCK, Kind.BF16)
MS = QUICK_MS = (1, 16, 8192)


@pytest.mark.parametrize("how", ["compiled", "from the cache"])
def test_first_launch(benchmark, tmp_path, monkeypatch, m, how, quick):
    config = choose(m, SHAPE, KINDS, TARGETS["sm_90"])
    folders = iter(range(100))

    def forget():
        for kernel in KERNELS.values():
            kernel.device_caches.clear()
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / (str(next(folders)) if how == "compiled" else "cache")))

    benchmark.group = "First launch of a kernel for an H100, on this host"
    benchmark.extra_info |= {"row": how, "column": config.regime, "unit": "ms"}
    rounds = 2 if quick else 5
    binary = benchmark.pedantic(
        warm_up, (TARGETS["sm_90"], config, SHAPE, KINDS), setup=forget, rounds=rounds, warmup_rounds=1
    )
    assert binary.asm["cubin"]
