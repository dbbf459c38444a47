"""What the plugin adds to the time that vLLM takes to load a tiny model of 61 layers.

`python overhead.py` prints the figures of docs/vllm.md: loads with and without the plugin alternate in one process.
"""

import gc
import logging
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

from engine.checkpoints import BF16, DEEPSEEK, FP8, checkpoint, deepseek, only_projections, write
from engine.harness import cpu_worker, create, engine_config, environment, load_model, projections
from indexproj.indexer.vllm import plugin as vllm_plugin

LAYERS, ROUNDS = 61, 15


def projections_alone(path, switch, tensors):
    """Seconds of the steps in which the two differ: the swap, load_weights of these tensors, the end of the load."""
    spent = 0.0
    original = vllm_plugin.swap

    def swap(*args):
        nonlocal spent
        spent += seconds(lambda: original(*args))

    with mock.patch.object(vllm_plugin, "swap", swap):
        created = create(path, switch)
    methods = [(module, module.quant_method) for module in projections(created.model).values()]

    def load():
        created.model.load_weights(tensors.items())
        for module, method in methods if switch == "1" else ():  # vLLM's own packs weights here, on a CPU only
            method.process_weights_after_loading(module)

    with environment(created.config):
        return spent + seconds(load)


def seconds(function):
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    function()
    spent = time.perf_counter() - start
    gc.enable()
    return spent


def alternate(measure):
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
            tensors, _ = checkpoint(makers, deepseek(LAYERS))
            path = write(Path(directory, name), tensors, {**DEEPSEEK, "num_hidden_layers": LAYERS})
            config = engine_config(path)
            ours = {n: tensor for n, tensor in only_projections(tensors).items() if f".layers.{LAYERS}." not in n}
            for what, measure in (
                ("whole load", lambda switch, config=config: seconds(lambda: load_model(config, switch))),
                ("projections alone", lambda switch, path=path, ours=ours: projections_alone(path, switch, ours)),
            ):
                times = alternate(measure)
                stock, swapped = map(statistics.median, times)
                theirs, mine = map(quartiles, times)
                difference = 1000 * (swapped - stock)
                print(f"{name}, {what}: vLLM {theirs}, with indexproj {mine}, {difference:+.1f}")


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    start = time.perf_counter()
    import indexproj.indexer.vllm.model  # noqa: F401

    print(f"first import, after vLLM: {1000 * (time.perf_counter() - start):.1f} ms")
    main()
