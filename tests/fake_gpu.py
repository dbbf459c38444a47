"""In place of a GPU: tensors on the CPU, exact results, and timers that run what they time and make up the time.

As a script, a process of `indexproj bench --ab` on that GPU.
"""

import torch

from indexproj.benchmarks import bench, gpu
from indexproj.kernels import reference

CPU = torch.device("cpu")


def timer(calls):
    """Runs the calls; each takes as many microseconds as there are calls."""
    for call in calls:
        call()
    return lambda: float(len(calls))


def project(x, weights, out=None):
    k, gate = reference(x, weights)
    if out is None:
        return k.bfloat16(), gate.float()
    return torch.split(out.copy_(torch.cat((k, gate), 1)), weights.shape[:2], 1)


def launch(x, operands, outs, signature, config):
    weights = gpu.weight_copies(signature.shape, signature.formats, CPU)[0]
    for out, exact in zip(outs, reference(x, weights), strict=True):
        out.copy_(exact)


def install(patch):
    """patch: a function like setattr."""
    properties = type("Properties", (), {"L2_cache_size": 10**5, "multi_processor_count": 2})
    patch(torch.cuda, "get_device_properties", lambda _: properties)
    patch(gpu, "current_gpu", lambda: CPU)
    patch(gpu, "replay", timer)
    patch(gpu, "eager", timer)
    patch(gpu, "ceilings", lambda _: iter([("empty kernel", 0, lambda: 2.0), ("copy", 6000, lambda: 3.0)]))
    patch(gpu, "description", lambda: {"GPU": "made-up GPU"})
    patch(bench, "SHAPES", {"deepseek-v3.2": (128, 64, 512), "glm-5": (128, 32, 256)})
    patch(gpu, "launch", launch)
    patch(bench, "project", project)
    gpu.weight_copies.cache_clear()
    bench.sampler_of.cache_clear()


if __name__ == "__main__":
    install(setattr)
    bench.serve()
