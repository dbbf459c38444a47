"""From files in the page cache to the weights of DeepSeek-V3.2's 62 indexers: time, and memory beyond the weights.

Contenders: ours, which keeps FP8; streaming with an upcast to bf16, which is what engines do; and vLLM's own helper for
it, where vLLM is installed. All end with the same weights, which is checked before anything is timed.
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


def every_tensor(path):
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():
                yield name, shard.get_tensor(name)


def layer_of(name):
    return int(name.split(".")[2])


def upcast(path):
    """A [D + H, K] bf16 parameter per layer; an FP8 wk waits for its scale and is then upcast into its rows."""
    fused, waiting = {}, {}
    for name, tensor in every_tensor(path):
        if ".indexer.w" not in name or ".wq_b." in name:
            continue
        layer = layer_of(name)
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


def vllm(path):
    """The same with vLLM's helper and a parameter as its loader sees one."""
    from vllm.model_executor.models.deepseek_v2 import _try_load_fp8_indexer_wk

    class Parameter:
        def __init__(self):
            self.data = torch.empty(D + H, K, dtype=torch.bfloat16)

        def weight_loader(self, _, weight, shard):
            self.data[slice(0, D) if shard == 0 else slice(D, None)].copy_(weight)

    name_of = "model.layers.{}.self_attn.indexer.wk_weights_proj.weight".format
    parameters = {name_of(layer): Parameter() for layer in range(62)}
    waiting, loaded = {}, set()
    for name, tensor in every_tensor(path):
        if not _try_load_fp8_indexer_wk(name, tensor, waiting, parameters, loaded, ()) and ".weights_proj." in name:
            parameters[name_of(layer_of(name))].weight_loader(None, tensor, 1)
    return {layer: parameters[name_of(layer)].data for layer in range(62)}


CONTENDERS = {"ours": native, "streaming and upcasting": upcast, "vLLM's helper": vllm}


def peak_beyond_weights(contender, path):
    """Bytes that torch holds at once while a contender runs, less those of its result."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = contender(path)
    mapped = {file.stat().st_size for file in path.iterdir()}  # a mapped file counts as memory there
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]" and abs(event.nbytes()) not in mapped:
            held += event.nbytes()
            peak = max(peak, held)
    return peak - bytes_of(result)


def bytes_of(result):
    return sum(
        value.nbytes if isinstance(value, torch.Tensor) else sum(m.nbytes for m in value) for value in result.values()
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CONTENDERS)
def test_load(benchmark, checkpoint, name, quick):
    if name == "vLLM's helper":
        pytest.importorskip("vllm", reason="vLLM is not installed")
    contender = CONTENDERS[name]
    result, loaded = contender(checkpoint), load(checkpoint)
    for layer, weights in loaded.items():
        found = result[layer]
        if name == "ours":
            found = torch.cat([matrix.dequantize(torch.bfloat16) for matrix in found])
        assert torch.equal(found, weights.to_bf16().fused_weight)
    benchmark.group = f"Loading the projection of {len(loaded)} layers"
    benchmark.extra_info |= {"row": name, "column": "time", "unit": "ms", "MB of weights": bytes_of(result) / 1e6}
    del result, loaded, weights, found
    benchmark.pedantic(contender, (checkpoint,), rounds=5 if quick else 15, warmup_rounds=1)
    benchmark.extra_info["MB beyond weights"] = peak_beyond_weights(contender, checkpoint) / 1e6


def test_plan(benchmark, checkpoint):
    """Headers only, of all shards."""
    benchmark.group = "Headers of all shards"
    benchmark.extra_info |= {"row": "ours", "column": "time", "unit": "ms"}
    plan = benchmark.pedantic(lambda: Plan.of(Checkpoint(checkpoint)), rounds=15, warmup_rounds=1)
    assert not plan.problems
