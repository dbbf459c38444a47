"""DeepseekV3ForCausalLM, loaded by vLLM's own loader from checkpoints in every encoding: the table of docs/vllm.md."""

import re
from pathlib import Path

import pytest
import torch

from engine.checkpoints import BF16, FP8, FUSED, D, H, K, M, checkpoint, pair, write
from engine.harness import Created, activations, assert_outputs, environment, like, projections
from exports import EXPORTS
from indexproj.loading import CheckpointError

PAGE = (Path(__file__).parent.parent.parent / "docs/vllm.md").read_text()
DOCUMENTED = dict(re.findall(r"^\| ([^|]+) \| (\w[^|]* \| [^|]+) \|$", PAGE, re.MULTILINE))


def quark(n, k):
    export = EXPORTS["fp8_block"](n, k)
    export.tensors["weight_scale"] = export.tensors.pop("weight_scale_inv")
    return export


def bf16_with_scale(n, k):
    export = EXPORTS["bf16"](n, k)
    export.tensors["weight_scale_inv"] = torch.ones(-(-n // 128), -(-k // 128))
    return export


# Name of the case -> name of a matrix -> function that makes an Export from (n, k).
CASES = {
    "BF16": BF16,
    "BF16, stored as one": FUSED,
    "F32": pair("f32", "f32"),
    "FP8 128x128": FP8,
    "FP8 128x128, names of Quark": {**BF16, "wk": quark},
    "FP8 128x128, UE8M0 scales": pair("fp8_block_e8m0"),
    "FP8 128x128, `weights_proj` too": pair("fp8_block", "fp8_block"),
    "FP8 128x128, e4m3fnuz": pair("fp8_block_fnuz"),
    "FP8 128x128, scales in another call": FP8,
    "FP8 128x128, from reused buffers": FP8,
    "FP8 per row": pair("fp8_row"),
    "FP8 per tensor": pair("fp8_tensor_flat"),
    "FP8 per tensor, with `input_scale`": pair("fp8_tensor"),
    "FP8 with packed UE8M0 scales": pair("fp8_packed"),
    "MXFP8": pair("mxfp8"),
    "NVFP4 (ModelOpt)": pair("nvfp4"),
    "NVFP4 (compressed-tensors)": pair("nvfp4_divisor", "nvfp4_divisor"),
    "MXFP4": pair("mxfp4_e8m0", "mxfp4_e8m0"),
    "INT4": pair("int4", "int4"),
    "FP8 128x128, scales lost": FP8,
    "BF16, `weights_proj` lost": BF16,
    "BF16 with a scale": {**BF16, "wk": bf16_with_scale},
}
LOST = {"FP8 128x128, scales lost": "weight_scale_inv", "BF16, `weights_proj` lost": "weights_proj.weight"}
REFUSED = {*LOST, "BF16 with a scale"}


def scales_first(pairs):
    """Calls of load_weights without a weight and its scale in the same one, like those of loaders that reorder."""
    is_scale = {name: name.endswith("_scale_inv") for name, _ in pairs}
    return [[pair for pair in pairs if is_scale[pair[0]] == which] for which in (True, False)]


def reused(pairs):
    """The tensors, each overwritten when the next one is requested."""
    previous = torch.empty(0)
    for name, tensor in pairs:
        previous.view(torch.uint8).fill_(0x3A)
        previous = tensor.clone()
        yield name, previous


CALLS = {"FP8 128x128, scales in another call": scales_first, "FP8 128x128, from reused buffers": lambda p: [reused(p)]}


def load(name, path, switch):
    """A model that has loaded the checkpoint but has not processed it: on a CPU, vLLM then packs weights away."""
    created = Created(path, switch)
    for module in projections(created.model).values():
        module.weight.data.fill_(torch.nan)  # instead of uninitialized memory
    if name not in CALLS:
        created.load()  # vLLM's loader also checks what was loaded
        return created
    pairs = list(created.loader.get_all_weights(created.config.model_config, created.model))
    with environment(created.config):
        for call in CALLS[name](pairs):
            created.model.load_weights(call)
    return created


def outcome_of_vllm(name, path, truth):
    try:
        model = load(name, path, "0").model
    except Exception as error:
        return f"raises {type(error).__name__}"
    for layer, module in projections(model).items():
        found, expected = module.weight.double(), truth[layer]
        if found.isnan().any():
            return "rows left uninitialized"
        if ((found - expected).abs() > 2**-8 * expected.abs() + 1e-6 * expected.abs().max()).any():
            return "wrong values"
    return "right"


@pytest.mark.parametrize("name", CASES)
def test_encoding_matches_documented_table(tmp_path, name):
    """The plugin loads exact values or refuses, and vLLM's forward of the module computes with them."""
    tensors, truth = checkpoint(CASES[name], lost=LOST.get(name, ()))
    path = write(tmp_path, tensors)
    stock = outcome_of_vllm(name, path, truth)
    created = load(name, path, "1")
    if name in REFUSED:
        with pytest.raises(CheckpointError):
            created.process()
        assert DOCUMENTED[name] == f"{stock} | refused"
        return
    created.process()
    for number, layer in created.model.indexproj.layers.items():
        weights, module = layer.operands, layer.module
        values = [matrix.dequantize(torch.float64) for matrix in (weights.wk, weights.gate)]
        assert torch.equal(torch.cat(values), truth[number])
        assert DOCUMENTED[name] == f"{stock} | right, {weights.nbytes / (2 * (D + H) * K):.0%} of the bytes"
        output, bias = module(activations()[0])
        assert bias is None
        assert like(output) == (torch.bfloat16, (M, D + H), (D + H, 1))
        # Other code in vLLM finds `.weight` if it can hold the values.
        is_dense = sum(tensor.nbytes for tensor in module.parameters()) == 2 * (D + H) * K
        assert hasattr(module, "weight") == is_dense
        if is_dense:
            assert torch.equal(module.weight.double(), truth[number])
    assert_outputs(created.model, truth)
