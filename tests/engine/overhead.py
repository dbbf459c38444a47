"""What the plugin adds to the time in which vLLM loads a model of 61 layers, as small as they can be.

Run as a program, it prints the figures of docs/vllm.md: loads with and without the plugin take turns in one process.
"""

import gc
import logging
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader

from engine.harness import (
    DEEPSEEK,
    cpu_worker,
    create,
    deepseek,
    engine_config,
    environment,
    is_projection,
    plugin,
    projections,
    with_projection,
    write,
)
from engine.kinds import BF16, FP8, exports_of
from indexproj.indexer.vllm import plugin as vllm_plugin

LAYERS, ROUNDS = 61, 15


def whole_load(config, switch):
    """Seconds from files in the page cache to a model that can serve."""
    loader = get_model_loader(config.load_config)
    config.compilation_config.static_forward_context.clear()
    with plugin(switch), set_current_vllm_config(config):
        return seconds(lambda: loader.load_model(config, config.model_config))


def projections_alone(path, switch, tensors):
    """Seconds of the steps in which the two differ: the swap, load_weights of these tensors, the end of the load."""
    spent = 0.0
    original = vllm_plugin.swap

    def swap(*args):
        nonlocal spent
        spent += seconds(lambda: original(*args))

    with mock.patch.object(vllm_plugin, "swap", swap):
        model, config, _, _ = create(path, switch)
    methods = [module.quant_method for module in projections(model).values()]

    def load():
        model.load_weights(tensors.items())
        for method in methods if switch == "1" else ():  # vLLM's own packs weights here, on a CPU only
            method.process_weights_after_loading(method.layer)

    with environment(config):
        return spent + seconds(load)


def seconds(function):
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    function()
    spent = time.perf_counter() - start
    gc.enable()
    return spent


def in_turn(measure):
    """Seconds without and with the plugin, of ROUNDS each."""
    times = {"0": [], "1": []}
    for _ in range(2):
        measure("0"), measure("1")  # first imports, allocations and caches
    for number in range(ROUNDS):
        for switch in ("01", "10")[number % 2]:
            times[switch].append(measure(switch))
    return times.values()


def quartiles(times):
    return " / ".join(f"{1000 * t:.1f}" for t in statistics.quantiles(times))


def main():
    print(f"milliseconds: quartiles of {ROUNDS} rounds; {LAYERS} layers, one thread")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, cpu_worker():
        for name, makers in (("BF16", BF16), ("FP8 128x128", FP8)):
            tensors = with_projection(deepseek(LAYERS), exports_of(makers, {}))
            path = write(Path(directory, name), tensors, {**DEEPSEEK, "num_hidden_layers": LAYERS})
            config = engine_config(path)
            ours = {n: tensor for n, tensor in tensors.items() if is_projection(n) and f".layers.{LAYERS}." not in n}
            for what, measure in (
                ("whole load", lambda switch, config=config: whole_load(config, switch)),
                ("projections alone", lambda switch, path=path, ours=ours: projections_alone(path, switch, ours)),
            ):
                stock, swapped = in_turn(measure)
                difference = 1000 * (statistics.median(swapped) - statistics.median(stock))
                print(
                    f"{name}, {what}: vLLM {quartiles(stock)}, with indexproj {quartiles(swapped)}, {difference:+.1f}"
                )


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    start = time.perf_counter()
    import indexproj.indexer.vllm.model  # noqa: F401

    print(f"first import, where vLLM is imported already: {1000 * (time.perf_counter() - start):.1f} ms")
    main()
