"""Measures what needs no GPU: host overhead of a launch, and loading. `make benchmark` prints the tables.

Host: CPU time of a projection of DeepSeek-V3.2 with a CUDA driver that runs nothing. "JITFunction" is Triton's own
launcher with all arguments prepared; the others also look up kernel, grid and workspace.
Loading: all of DeepSeek-V3.2's indexers from the page cache, on one thread, as engines run one process per GPU.
"""

import itertools
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from indexproj.benchmarks.bench import machine
from indexproj.benchmarks.gpu import in_turn
from indexproj.benchmarks.report import markdown
from indexproj.indexer.cli.fixture import write_fixture
from indexproj.kernels import TARGETS, choose, launch, project
from indexproj.kernels.dispatch import out_dtypes
from indexproj.kernels.formats import spread
from indexproj.kernels.workspace import workspace
from indexproj.loading import Checkpoint, Plan, load
from stub import stub_driver
from support import DEEPSEEK, weights


def run(layers=None):
    """Results as in benchmarks/bench.py. layers: how many to load, all by default."""
    torch.set_num_threads(1)
    yield machine()
    with tempfile.TemporaryDirectory() as folder, stub_driver(folder):
        for m in (1, 16):
            yield from results("host", launchers(m), 500, m)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "checkpoint")
        write_fixture("deepseek-v3.2", path, layers)
        ours, upcast = load(path), load_upcast(path)
        assert all(torch.equal(upcast[layer], ours[layer].to_bf16().fused_weight) for layer in ours)
        calls = {"ours, which keeps FP8": partial(load, path), "streaming and upcasting": partial(load_upcast, path)}
        yield from results("loading", calls | {"ours, headers only": lambda: Plan.of(Checkpoint(path))}, 1)
        for name, call in calls.items():
            print(f"{name}: {{:.1f}} MB of weights, {{:.1f}} MB beyond them".format(*megabytes(call, path)))


def results(suite, calls, count, m=0):
    def microseconds(call):
        start = time.thread_time()
        for _ in range(count):
            call()
        return 1e6 * (time.thread_time() - start) / count

    for name, us in in_turn({name: partial(microseconds, call) for name, call in calls.items()}).items():
        yield {"suite": suite, "m": m, "contender": name, "how": "cpu", "us": us}


def launchers(m):
    """Ways to launch m rows, from Triton's launcher to `project`."""
    (*ns, k), w, target = DEEPSEEK, weights("FP8 128x128, BF16", DEEPSEEK), TARGETS["sm_90"]
    x, dtypes = torch.zeros(m, k, dtype=torch.bfloat16), out_dtypes("fp32", len(ns))
    outs = tuple(torch.empty(m, n, dtype=dtype) for n, dtype in zip(ns, dtypes, strict=True))
    matrices = w.wk.operands, w.gate.operands
    operands, formats = [*w.wk.operands, *w.gate.operands], list(map(str, w.formats))
    options_of_op = [False, True], [1.0] * 2, ["none"] * 2, False
    signature, config = launch.Signature.of(w.shape, w.formats), choose(m, DEEPSEEK, w.formats, target)
    kernel, grid = launch.KERNELS[config.regime], config.grid(m, *ns)
    buffers = workspace(x.device, *config.workspace_size(m, *ns)) if config.has_workspace else ()
    constants, options = launch.constants(config, signature, target).values(), launch.options(config, target)
    ready = x, matrices, outs, *buffers, m, x.stride(0), tuple(out.stride(0) for out in outs), *constants
    return {
        "JITFunction": lambda: kernel[grid](*ready, **options),
        "launch": lambda: launch.launch(x, matrices, outs, signature),
        "torch.library op": lambda: torch.ops.indexproj.project(x, operands, formats, *options_of_op),
        "project": lambda: project(x, w),
    }


def load_upcast(path):
    """[D + H, K] bf16 per layer. Reads all tensors and upcasts wk, as engines do."""
    tensors, fused = {}, {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= load_file(file)
    for name, codes in tensors.items():
        if name.endswith(".indexer.wk.weight"):
            scale, gate = tensors[f"{name}_scale_inv"], tensors[name.replace("wk.", "weights_proj.")]
            wk = (codes.float() * spread(scale, (128, 128), codes.shape)).bfloat16()
            fused[int(name.split(".")[2])] = torch.cat((wk, gate))
    return fused


def megabytes(call, path):
    """Of what a loader returns, and the most that torch holds beyond it while the loader runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    mapped = {file.stat().st_size for file in path.iterdir()}  # the profiler counts mapped files
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(nbytes for nbytes in events if abs(nbytes) not in mapped))
    size = sum(weights.nbytes for weights in result.values())
    return size / 1e6, (max(held) - size) / 1e6


if __name__ == "__main__":
    print(markdown(list(run())))
