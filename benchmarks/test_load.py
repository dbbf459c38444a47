"""Loading the weights of DeepSeek-V3.2's 62 indexers from the page cache: time, and memory beyond the weights.

Contenders: ours, which keeps FP8, and streaming all tensors with an upcast to bf16, as engines do. Results are compared
before anything is timed.
"""

import pytest
import torch
from safetensors import safe_open

from indexproj.indexer.cli.fixture import write_fixture
from indexproj.loading import Checkpoint, Plan, load

D, H, K = 128, 64, 7168


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, request):
    path = tmp_path_factory.mktemp("checkpoint")
    write_fixture("deepseek-v3.2", path, layers=8 if request.config.getoption("quick") else None)
    yield path
    for file in path.iterdir():
        file.unlink()  # a gigabyte, which pytest would keep


def native(path):
    return {layer: (weights.wk, weights.gate) for layer, weights in load(path).items()}


def upcast(path):
    """A fused bf16 parameter [D + H, K] per layer; an FP8 wk waits for its scales and is upcast into its rows."""
    fused, waiting = {}, {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                tensor = shard.get_tensor(name)
                if ".indexer.wk." not in name and ".weights_proj." not in name:
                    continue
                layer = int(name.split(".")[2])
                if layer not in fused:
                    fused[layer] = torch.empty(D + H, K, dtype=torch.bfloat16)
                if ".weights_proj." in name:
                    fused[layer][D:].copy_(tensor)
                    continue
                pair = waiting.setdefault(layer, {})
                pair[name.endswith("_inv")] = tensor
                if len(pair) == 2:
                    scale = pair[True].repeat_interleave(128, 0).repeat_interleave(128, 1)
                    fused[layer][:D].copy_((pair[False].float() * scale).bfloat16())
                    del waiting[layer]
    return fused


CONTENDERS = {"ours": native, "streaming and upcasting": upcast}


def peak_beyond_weights(contender, path):
    """The most bytes that torch holds while a contender runs, less those of its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = contender(path)
    mapped = {file.stat().st_size for file in path.iterdir()}  # the profiler counts mapped files
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) not in mapped:
            held += event.nbytes()
            peak = max(peak, held)
    return peak - nbytes(result)


def nbytes(result):
    parts = (value if isinstance(value, tuple) else (value,) for value in result.values())
    return sum(part.nbytes for tensors in parts for part in tensors)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CONTENDERS)
def test_load(benchmark, checkpoint, name, quick):
    contender = CONTENDERS[name]
    result, loaded = contender(checkpoint), load(checkpoint)
    for layer, weights in loaded.items():
        found = result[layer]
        if name == "ours":
            found = torch.cat([matrix.dequantize(torch.bfloat16) for matrix in found])
        assert torch.equal(found, weights.to_bf16().fused_weight)
    benchmark.group = f"Loading the projection of {len(loaded)} layers"
    benchmark.extra_info |= {"row": name, "column": "time", "unit": "ms", "MB of weights": nbytes(result) / 1e6}
    del result, loaded, weights, found
    benchmark.pedantic(contender, (checkpoint,), rounds=5 if quick else 15, warmup_rounds=1)
    benchmark.extra_info["MB beyond weights"] = peak_beyond_weights(contender, checkpoint) / 1e6


def test_plan(benchmark, checkpoint):
    """Reading the headers of all shards."""
    benchmark.group = "Headers of all shards"
    benchmark.extra_info |= {"row": "ours", "column": "time", "unit": "ms"}
    plan = benchmark.pedantic(lambda: Plan.of(Checkpoint(checkpoint)), rounds=15, warmup_rounds=1)
    assert not plan.problems
