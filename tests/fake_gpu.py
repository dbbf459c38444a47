"""In place of a GPU: tensors on the CPU, exact results, and timers that run what they time and make up the time.

As a script, a process of `indexproj bench --ab` on that GPU.
"""

import os

import torch

from indexproj.benchmarks import bench, gpu
from indexproj.indexer import models

CPU = torch.device("cpu")
SHAPES = {name: (*(min(n, 128) for n in ns), 256) for name, (*ns, _) in models.SHAPES.items()}


def timer(calls, how="device"):
    """Runs the calls; each takes as many microseconds as there are calls, or SLOWER."""
    for call in calls:
        call()
    return lambda: float(os.environ.get("SLOWER", "1")) * len(calls)


def exact_outputs(x, matrices):
    return [x.double() @ matrix.dequantize(torch.float64).T for matrix in matrices]


def project_all(x, matrices, dtypes=None, out=None):
    exact = exact_outputs(x, matrices)
    if out is None:
        return [output.to(dtype) for output, dtype in zip(exact, dtypes, strict=True)]
    return torch.split(out.copy_(torch.cat(exact, 1)), bench.rows(matrices), 1)


def launch(x, operands, outs, signature, config):
    matrices = gpu.weight_copies(signature.shape, signature.formats, CPU)[0]
    for out, exact in zip(outs, exact_outputs(x, matrices), strict=True):
        out.copy_(exact if config.num_warps > 1 else 0 * exact)


def install(patch):
    """patch: a function like setattr."""
    properties = type("Properties", (), {"L2_cache_size": 10**5, "multi_processor_count": 2})
    patch(torch.cuda, "get_device_properties", lambda _: properties)
    patch(gpu, "current_gpu", lambda: CPU)
    patch(gpu, "timer", timer)
    patch(gpu, "ceilings", lambda _: iter([("empty kernel", 0, lambda: 2.0), ("copy", 6000, lambda: 3.0)]))
    patch(gpu, "description", lambda: {"GPU": "made-up GPU"})
    patch(gpu, "launch", launch)
    patch(bench, "SHAPES", SHAPES)
    patch(bench, "project_all", project_all)
    gpu.weight_copies.cache_clear()
    bench.sampler_of.cache_clear()


if __name__ == "__main__":
    install(setattr)
    bench.serve()
