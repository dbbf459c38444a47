"""Host overhead of one projection, in Python and in Triton's launcher, with a CUDA driver that runs nothing.

CPU time of one thread, for DeepSeek-V3.2 with FP8 wk and M = 1 (gemv) or 16 (split_k). "JITFunction" is Triton's own
launcher with all arguments prepared; the others also look up kernel, grid and workspace.
"""

import shutil
import time

import pytest
import torch

from indexproj.benchmarks.stub import stub_driver
from indexproj.indexer.cli.synthetic import random_matrix
from indexproj.indexer.models import SHAPES
from indexproj.kernels import TARGETS, ProjectionWeights, choose, project
from indexproj.kernels import launch as module
from indexproj.kernels.formats import Format

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc to build the stub driver")

MS = QUICK_MS = (1, 16)
SHAPE = SHAPES["deepseek-v3.2"]


@pytest.fixture(scope="module", autouse=True)
def _driver(tmp_path_factory):
    with stub_driver(tmp_path_factory.mktemp("stub")):
        yield


def contenders(m):
    w = ProjectionWeights(random_matrix(Format.FP8_BLOCK, 128, 7168), random_matrix(Format.BF16, 64, 7168))
    x = torch.zeros(m, 7168, dtype=torch.bfloat16)
    outs = torch.empty(m, 128, dtype=torch.bfloat16), torch.empty(m, 64)
    matrices = w.wk.operands, w.gate.operands
    operands = [operand for matrix in matrices for operand in matrix if operand is not None]
    formats = [str(format) for format in w.formats]
    signature, target = module.signature_of(w, x.dtype, torch.float32), TARGETS["sm_90"]
    config = choose(m, SHAPE, w.formats, target)
    kernel, grid = module.KERNELS[config.regime], config.grid(m, 128, 64)
    buffers = module.workspace(x.device, *config.workspace_size(m, 128, 64)) if config.has_workspace else ()
    constants = module.constants(config, signature, target).values()
    ready = x, matrices, outs, *buffers, m, x.stride(0), tuple(out.stride(0) for out in outs), *constants
    options = module.options(config, target)
    return {
        "JITFunction": lambda: kernel[grid](*ready, **options),
        "launch": lambda: module.launch(x, matrices, outs, signature),
        "torch.library op": lambda: torch.ops.indexproj.project(x, operands, formats, [False, True]),
        "project": lambda: project(x, w),
    }


@pytest.mark.parametrize("name", ["JITFunction", "launch", "torch.library op", "project"])
@pytest.mark.benchmark(timer=time.thread_time)
def test_host(benchmark, m, name, quick):
    benchmark.group = "Host, CPU time of a projection"
    benchmark.extra_info |= {"row": name, "column": m, "unit": "us"}
    run = contenders(m)[name]
    run()
    benchmark.pedantic(run, rounds=10 if quick else 30, iterations=500, warmup_rounds=2)
