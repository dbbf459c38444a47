"""Checkpoints of every kind, and what vLLM makes of them, as it is and with the plugin.

Run as a program, it prints the table of docs/vllm.md.
"""

import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import vllm
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from engine.harness import (
    LAYERS,
    D,
    H,
    K,
    cpu_worker,
    create,
    deepseek,
    environment,
    projections,
    with_projection,
    write,
)
from exports import EXPORTS, Export, named
from indexproj.indexer.vllm.plugin import layer_of
from indexproj.loading import CheckpointError

ROWS = {"wk": D, "weights_proj": H, "wk_weights_proj": D + H}


def one_call(names):
    return [names]


def scales_later(names):
    """As loaders that reorder tensors do: no weight comes in the same call as its scale."""
    return [[n for n in names if n.endswith("_scale_inv")], [n for n in names if not n.endswith("_scale_inv")]]


@dataclass(frozen=True)
class Kind:
    """One way to store the projection, and to bring it.

    Attributes:
        name: for the table.
        matrices: name of a matrix -> maker of an Export from its (n, k).
        lost: last parts of names that are missing from the checkpoint.
        calls: names of all tensors -> those of each call of load_weights.
        reuses_buffers: True where a tensor is overwritten once the next one is asked for.
        is_stray: True where a tensor is there that means nothing.
    """

    name: str
    matrices: dict[str, Callable[[int, int], Export]]
    lost: tuple[str, ...] = ()
    calls: Callable[[list[str]], list[list[str]]] = one_call
    reuses_buffers: bool = False
    is_stray: bool = False


def pair(wk, gate="bf16"):
    return {"wk": EXPORTS[wk], "weights_proj": EXPORTS[gate]}


def renamed(make, **leaves):
    """The same with other last parts of names."""

    def remake(n, k):
        export = make(n, k)
        export.tensors = {leaves.get(leaf, leaf): tensor for leaf, tensor in export.tensors.items()}
        return export

    return remake


BF16, FP8, FUSED = pair("bf16"), pair("fp8_block"), {"wk_weights_proj": EXPORTS["bf16"]}
QUARK = {"wk": renamed(EXPORTS["fp8_block"], weight_scale_inv="weight_scale"), "weights_proj": EXPORTS["bf16"]}

KINDS = (
    Kind("BF16", BF16),
    Kind("BF16, stored as one", FUSED),
    Kind("F32", pair("f32", "f32")),
    Kind("FP8 128x128", FP8),
    Kind("FP8 128x128, names of Quark", QUARK),
    Kind("FP8 128x128, UE8M0 scales", pair("fp8_block_e8m0")),
    Kind("FP8 128x128, `weights_proj` too", pair("fp8_block", "fp8_block")),
    Kind("FP8 128x128, e4m3fnuz", pair("fp8_block_fnuz")),
    Kind("FP8 128x128, scales in another call", FP8, calls=scales_later),
    Kind("FP8 128x128, from buffers used again", FP8, reuses_buffers=True),
    Kind("FP8 per row", pair("fp8_row")),
    Kind("FP8 per tensor", pair("fp8_tensor_flat")),
    Kind("FP8 per tensor, `input_scale` beside it", pair("fp8_tensor")),
    Kind("FP8 with packed UE8M0 scales", pair("fp8_packed")),
    Kind("MXFP8", pair("mxfp8")),
    Kind("NVFP4 (ModelOpt)", pair("nvfp4")),
    Kind("NVFP4 (compressed-tensors)", pair("nvfp4_divisor", "nvfp4_divisor")),
    Kind("MXFP4", pair("mxfp4_e8m0", "mxfp4_e8m0")),
    Kind("INT4", pair("int4", "int4")),
    Kind("FP8 128x128, scales lost", FP8, lost=("weight_scale_inv",)),
    Kind("BF16, `weights_proj` lost", BF16, lost=("weights_proj.weight",)),
    Kind("BF16 with a scale", {"wk": lambda n, k: with_scale(n, k), "weights_proj": EXPORTS["bf16"]}, is_stray=True),
)


def with_scale(n, k):
    export = EXPORTS["bf16"](n, k)
    export.tensors["weight_scale_inv"] = torch.ones(-(-n // 128), -(-k // 128))
    return export


def exports_of(makers, truth, lost=()):
    """What `with_projection` asks for; puts [D + H, K] fp64, what they say, into truth by layer."""

    def matrices(stem):
        exports = {name: make(ROWS[name], K) for name, make in makers.items()}
        truth[checkpoint_layer(stem)] = torch.cat([export.loaded for export in exports.values()])
        tensors = {}
        for name, export in exports.items():
            tensors |= named(stem, name, export)
        return {name: tensor for name, tensor in tensors.items() if not name.endswith(lost or "-")}

    return matrices


def checkpoint_layer(stem):
    return layer_of(stem) + (LAYERS if "mtp_layers" in stem else 0)


def checkpoint(kind, directory):
    """Writes one; its path, and layer -> [D + H, K] fp64, what it says."""
    truth = {}
    tensors = with_projection(deepseek(), exports_of(kind.matrices, truth, kind.lost))
    return write(directory, tensors), truth


def load(kind, path, switch):
    """A model with the checkpoint in it, before it is post-processed, and what post-processes it."""
    model, config, loader, model_config = create(path, switch)
    for layer in projections(model).values():
        layer.weight.data.fill_(torch.nan)  # it is uninitialised otherwise: any value
    with environment(config):
        if kind.calls is one_call and not kind.reuses_buffers:
            loader.load_weights(model, model_config)  # checks what was loaded, too
        else:
            tensors = dict(loader.get_all_weights(model_config, model))
            for names in kind.calls(list(tensors)):
                pairs = ((name, tensors[name]) for name in names)
                model.load_weights(reused(pairs) if kind.reuses_buffers else pairs)
    return model, lambda: process_weights_after_loading(model, model_config, torch.device("cpu"))


def reused(pairs):
    previous = None
    for name, tensor in pairs:
        if previous is not None:
            previous.view(torch.uint8).fill_(0x3A)
        previous = tensor.clone()
        yield name, previous


def stock(kind, path, truth):
    """What vLLM makes of it, in a word or two."""
    try:
        model, _ = load(kind, path, "0")
    except Exception as error:
        return f"raises {type(error).__name__}"
    for layer, module in projections(model).items():
        values = module.weight.double()
        if values.isnan().any():
            return "rows left uninitialised"
        if ((values - truth[layer]).abs() > 2**-8 * truth[layer].abs() + 1e-6 * truth[layer].abs().max()).any():
            return "wrong values"
    return "right"


def swapped(kind, path, truth):
    """What vLLM with the plugin makes of it, in a word or two."""
    try:
        model, process = load(kind, path, "1")
        process()
    except CheckpointError:
        return "refused"
    methods = model.indexproj.layers
    for layer, method in methods.items():
        weights = method.operands
        values = torch.cat([weights.wk.dequantize(torch.float64), weights.gate.dequantize(torch.float64)])
        if not torch.equal(values, truth[layer]):
            return "wrong values"
    kept = sum(method.operands.nbytes for method in methods.values()) / len(methods)
    return f"right, {kept / (2 * (D + H) * K):.0%} of the bytes"


def outcomes(kind, directory):
    """(vLLM, vLLM with the plugin)"""
    torch.manual_seed(0)
    path, truth = checkpoint(kind, directory)
    return stock(kind, path, truth), swapped(kind, path, truth)


def table():
    """The lines of the table."""
    results = defaultdict(list)
    with tempfile.TemporaryDirectory() as directory, cpu_worker():
        for number, kind in enumerate(KINDS):
            results[kind.name] = outcomes(kind, Path(directory, f"{number}"))
    lines = [f"| checkpoint | vLLM {vllm.__version__} | with indexproj |", "|--|--|--|"]
    return [*lines, *(f"| {name} | {' | '.join(words)} |" for name, words in results.items())]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    print("\n".join(table()))
