"""What vLLM makes of checkpoints in every encoding, with and without the plugin.

`python report.py` prints the table of docs/vllm.md.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import vllm

from engine.checkpoints import BF16, FP8, FUSED, D, H, K, checkpoint, pair, write
from engine.harness import cpu_worker, create, environment, projections
from exports import EXPORTS, Export
from indexproj.loading import CheckpointError


def scales_later(names):
    """No weight in the same call as its scale, like loaders that reorder tensors."""
    return [[n for n in names if n.endswith("_scale_inv")], [n for n in names if not n.endswith("_scale_inv")]]


@dataclass(frozen=True)
class Case:
    """One way to store the projection and to load it.

    Attributes:
        name: for the table.
        makers: name of a matrix -> function that makes an Export from (n, k).
        lost: suffixes of names that are missing from the checkpoint.
        calls: names of all tensors -> those of each call of load_weights; None for vLLM's own loader.
        reuses_buffers: True if a tensor is overwritten when the next one is requested.
        loads: False if the plugin has to refuse it.
    """

    name: str
    makers: dict[str, Callable[[int, int], Export]]
    lost: tuple[str, ...] = ()
    calls: Callable[[list[str]], list[list[str]]] | None = None
    reuses_buffers: bool = False
    loads: bool = True


def quark(n, k):
    export = EXPORTS["fp8_block"](n, k)
    export.tensors["weight_scale"] = export.tensors.pop("weight_scale_inv")
    return export


def bf16_with_scale(n, k):
    export = EXPORTS["bf16"](n, k)
    export.tensors["weight_scale_inv"] = torch.ones(-(-n // 128), -(-k // 128))
    return export


CASES = (
    Case("BF16", BF16),
    Case("BF16, stored as one", FUSED),
    Case("F32", pair("f32", "f32")),
    Case("FP8 128x128", FP8),
    Case("FP8 128x128, names of Quark", {**BF16, "wk": quark}),
    Case("FP8 128x128, UE8M0 scales", pair("fp8_block_e8m0")),
    Case("FP8 128x128, `weights_proj` too", pair("fp8_block", "fp8_block")),
    Case("FP8 128x128, e4m3fnuz", pair("fp8_block_fnuz")),
    Case("FP8 128x128, scales in another call", FP8, calls=scales_later),
    Case("FP8 128x128, from reused buffers", FP8, calls=lambda names: [names], reuses_buffers=True),
    Case("FP8 per row", pair("fp8_row")),
    Case("FP8 per tensor", pair("fp8_tensor_flat")),
    Case("FP8 per tensor, with `input_scale`", pair("fp8_tensor")),
    Case("FP8 with packed UE8M0 scales", pair("fp8_packed")),
    Case("MXFP8", pair("mxfp8")),
    Case("NVFP4 (ModelOpt)", pair("nvfp4")),
    Case("NVFP4 (compressed-tensors)", pair("nvfp4_divisor", "nvfp4_divisor")),
    Case("MXFP4", pair("mxfp4_e8m0", "mxfp4_e8m0")),
    Case("INT4", pair("int4", "int4")),
    Case("FP8 128x128, scales lost", FP8, lost=("weight_scale_inv",), loads=False),
    Case("BF16, `weights_proj` lost", BF16, lost=("weights_proj.weight",), loads=False),
    Case("BF16 with a scale", {**BF16, "wk": bf16_with_scale}, loads=False),
)


def load(case, path, switch):
    """A model that has loaded the checkpoint but has not processed it: on a CPU, vLLM then packs weights away."""
    created = create(path, switch)
    for module in projections(created.model).values():
        module.weight.data.fill_(torch.nan)  # instead of uninitialized memory
    if case.calls is None:
        created.load()  # vLLM's loader also checks what was loaded
        return created
    tensors = dict(created.loader.get_all_weights(created.model_config, created.model))
    with environment(created.config):
        for names in case.calls(list(tensors)):
            pairs = ((name, tensors[name]) for name in names)
            created.model.load_weights(reused(pairs) if case.reuses_buffers else pairs)
    return created


def reused(pairs):
    previous = None
    for name, tensor in pairs:
        if previous is not None:
            previous.view(torch.uint8).fill_(0x3A)
        previous = tensor.clone()
        yield name, previous


def stock(case, path, truth):
    """In a few words, what vLLM makes of it."""
    try:
        model = load(case, path, "0").model
    except Exception as error:
        return f"raises {type(error).__name__}"
    for layer, module in projections(model).items():
        found, expected = module.weight.double(), truth[layer]
        if found.isnan().any():
            return "rows left uninitialized"
        if ((found - expected).abs() > 2**-8 * expected.abs() + 1e-6 * expected.abs().max()).any():
            return "wrong values"
    return "right"


def swapped(case, path, truth):
    """In a few words, what vLLM with the plugin makes of it; and the model, if it loads."""
    try:
        created = load(case, path, "1")
        created.process()
    except CheckpointError:
        return "refused", None
    layers = created.model.indexproj.layers
    for number, layer in layers.items():
        weights = layer.operands
        found = torch.cat([weights.wk.dequantize(torch.float64), weights.gate.dequantize(torch.float64)])
        if not torch.equal(found, truth[number]):
            return "wrong values", created.model
    kept = sum(layer.operands.nbytes for layer in layers.values()) / len(layers)
    return f"right, {kept / (2 * (D + H) * K):.0%} of the bytes", created.model


def outcomes(case, directory):
    """Both in words, the model with the plugin, and layer -> [D + H, K] fp64, the values in the checkpoint."""
    torch.manual_seed(0)
    tensors, truth = checkpoint(case.makers, lost=case.lost)
    path = write(directory, tensors)
    return stock(case, path, truth), *swapped(case, path, truth), truth


def table():
    """The lines of the table."""
    lines = [f"| checkpoint | vLLM {vllm.__version__} | with indexproj |", "|--|--|--|"]
    with tempfile.TemporaryDirectory() as directory, cpu_worker():
        for number, case in enumerate(CASES):
            stock, swapped, *_ = outcomes(case, Path(directory, f"{number}"))
            lines.append(f"| {case.name} | {stock} | {swapped} |")
    return lines


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    print("\n".join(table()))
