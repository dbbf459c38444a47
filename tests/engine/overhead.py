"""What the plugin adds to the time that vLLM takes to load a tiny model of 61 layers.

`python overhead.py` prints the figures of docs/vllm.md: loads with and without the plugin alternate in one process.
"""

import functools
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


def projections_alone(path, tensors, switch):
    """Seconds of the steps in which the two differ: the swap, load_weights of these tensors, the end of the load."""
    spent = 0.0
    original = vllm_plugin.swap

    def swap(*args):
        nonlocal spent
        spent += seconds(lambda: original(*args))

    with mock.patch.object(vllm_plugin, "swap", swap):
        created = create(path, switch)
    modules = projections(created.model).values() if switch == "1" else ()  # vLLM packs weights there, on a CPU only

    def load():
        created.model.load_weights(tensors.items())
        for module in modules:
            module.quant_method.process_weights_after_loading(module)

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


def compare(label, measure):
    """Prints quartiles of measure("0"), without the plugin, and measure("1"), with it, which alternate."""
    times = {"0": [], "1": []}
    for number in range(-2, ROUNDS):  # two rounds for first imports, allocations and caches
        for switch in ("01", "10")[number % 2]:
            times[switch].append(measure(switch))
    stock, swapped = (statistics.quantiles(1000 * each for each in times[switch][2:]) for switch in "01")
    without, with_plugin = (" / ".join(f"{quartile:.1f}" for quartile in each) for each in (stock, swapped))
    print(f"{label}: vLLM {without}, with indexproj {with_plugin}, {swapped[1] - stock[1]:+.1f}")


def main():
    print(f"milliseconds: quartiles of {ROUNDS} rounds; {LAYERS} layers, one thread")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory, cpu_worker():
        for name, makers in (("BF16", BF16), ("FP8 128x128", FP8)):
            tensors, _ = checkpoint(makers, deepseek(LAYERS))
            path = write(Path(directory, name), tensors, {**DEEPSEEK, "num_hidden_layers": LAYERS})
            load = functools.partial(load_model, engine_config(path))
            compare(f"{name}, whole load", lambda switch, load=load: seconds(lambda: load(switch)))
            ours = {n: tensor for n, tensor in only_projections(tensors).items() if f".layers.{LAYERS}." not in n}
            alone = functools.partial(projections_alone, path, ours)
            compare(f"{name}, projections alone", alone)


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    start = time.perf_counter()
    import indexproj.indexer.vllm.model  # noqa: F401

    print(f"first import, after vLLM: {1000 * (time.perf_counter() - start):.1f} ms")
    main()
