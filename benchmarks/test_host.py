"""What one projection costs the host, in Python and in Triton's launcher, with the CUDA driver replaced by a stub.

Times are CPU time of one thread, for DeepSeek-V3.2 with FP8 wk and M = 1 (gemv) or 16 (split_k). "JITFunction" is
Triton's own way to a kernel with every argument at hand; the others find kernel, grid and workspace besides. "launch,
by JITFunction" is `launch` without its memory.
"""

import time

import pytest
import torch

from cuda_stub import stub_driver
from indexproj.kernels import TARGETS, choose, project
from indexproj.kernels import launch as module
from support import DEEPSEEK, weights


@pytest.fixture(scope="module", autouse=True)
def _driver(tmp_path_factory):
    with stub_driver(tmp_path_factory.mktemp("stub")):
        yield


class Nothing(dict):
    """Keeps nothing, so that every launch goes the way of the first one."""

    def __setitem__(self, key, value):
        pass


def contenders(m):
    w = weights("fp8-dense", DEEPSEEK)
    x, outs = (
        torch.zeros(m, 7168, dtype=torch.bfloat16),
        (torch.empty(m, 128, dtype=torch.bfloat16), torch.empty(m, 64)),
    )
    matrices, kinds = (w.wk.operands, w.gate.operands), (int(w.wk.kind), int(w.gate.kind))
    operands = [operand for matrix in matrices for operand in matrix if operand is not None]
    problem = module.Problem(x.device, x.dtype, 7168, (128, 64), kinds, (1.0, 1.0), (x.dtype, torch.float32))
    config, target = choose(m, DEEPSEEK, TARGETS["sm_90"]), TARGETS["sm_90"]
    kernel, grid = module.KERNELS[config.regime], config.grid(m, 128, 64)
    lent = module.workspace(x.device, *config.workspace(grid, 128, 64)) if config.has_workspace else ()
    constants = module.constants(config, DEEPSEEK, kinds, (1.0, 1.0), x.dtype, target)
    ready = (x, matrices, outs, *lent, m, x.stride(0), tuple(out.stride(0) for out in outs), *constants.values())
    options = module.options(config, target)
    return {
        "JITFunction": lambda: kernel[grid](*ready, **options),
        "launch, by JITFunction": lambda: module.launch(x, matrices, outs, problem),
        "launch": lambda: module.launch(x, matrices, outs, problem),
        "torch.library op": lambda: torch.ops.indexproj.project(x, operands, "FP8_BLOCK BF16:fp32"),
        "project": lambda: project(x, w),
    }


@pytest.mark.parametrize("name", ["JITFunction", "launch, by JITFunction", "launch", "torch.library op", "project"])
@pytest.mark.parametrize("m", [1, 16])
@pytest.mark.benchmark(timer=time.thread_time)
def test_host(benchmark, monkeypatch, m, name):
    monkeypatch.setattr(module, "_ready", Nothing() if name == "launch, by JITFunction" else {})
    benchmark.group = f"M = {m}"
    run = contenders(m)[name]
    run()
    benchmark.pedantic(run, rounds=30, iterations=500, warmup_rounds=2)
