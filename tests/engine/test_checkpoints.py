"""DeepseekV3ForCausalLM, loaded by vLLM's own loader from checkpoints in every encoding: the table of docs/vllm.md."""

import functools
import re
from pathlib import Path

import pytest
import torch

from engine.checkpoints import BF16, BOTH_FP8, FP8, FUSED, D, H, K, M, checkpoint, pair, write
from engine.harness import Worker, X, assert_outputs, like, projections
from exports import EXPORTS
from indexproj.loading import CheckpointError

PAGE = (Path(__file__).parent.parent.parent / "docs/vllm.md").read_text()
DOCUMENTED = dict(re.findall(r"^\| ([^|]+) \| (\w[^|]* \| [^|]+) \|$", PAGE, re.MULTILINE))
QUARK = functools.partial(EXPORTS["fp8_block"], leaf="weight_scale")


def bf16_with_scale(n, k):
    export = EXPORTS["bf16"](n, k)
    export.tensors["weight_scale_inv"] = torch.ones(-(-n // 128), -(-k // 128))
    return export


def scales_first(pairs):
    """Calls of load_weights without a weight and its scale in the same one, like those of loaders that reorder."""
    return [[pair for pair in pairs if pair[0].endswith("_scale_inv") == which] for which in (True, False)]


def reused(pairs):
    """One call, with tensors that are overwritten when the next one is requested."""

    def tensors():
        previous = torch.empty(0)
        for name, tensor in pairs:
            previous.view(torch.uint8).fill_(0x3A)
            previous = tensor.clone()
            yield name, previous

    return [tensors()]


# Name of the case -> encodings as in checkpoints.py, and either a function from all pairs (name, tensor) to calls of
# load_weights, or the suffix of tensors that are lost.
CASES = {
    "BF16": (BF16, None),
    "BF16, stored as one": (FUSED, None),
    "F32": (pair("f32", "f32"), None),
    "FP8 128x128": (FP8, None),
    "FP8 128x128, names of Quark": ({**BF16, "wk": QUARK}, None),
    "FP8 128x128, UE8M0 scales": (pair("fp8_block_e8m0"), None),
    "FP8 128x128, `weights_proj` too": (BOTH_FP8, None),
    "FP8 128x128, e4m3fnuz": (pair("fp8_block_fnuz"), None),
    "FP8 128x128, scales in another call": (FP8, scales_first),
    "FP8 128x128, from reused buffers": (FP8, reused),
    "FP8 per row": (pair("fp8_row"), None),
    "FP8 per tensor": (pair("fp8_tensor_flat"), None),
    "FP8 per tensor, with `input_scale`": (pair("fp8_tensor"), None),
    "FP8 with packed UE8M0 scales": (pair("fp8_packed"), None),
    "MXFP8": (pair("mxfp8"), None),
    "NVFP4 (ModelOpt)": (pair("nvfp4"), None),
    "NVFP4 (compressed-tensors)": (pair("nvfp4_divisor", "nvfp4_divisor"), None),
    "MXFP4": (pair("mxfp4_e8m0", "mxfp4_e8m0"), None),
    "INT4": (pair("int4", "int4"), None),
    "FP8 128x128, scales lost": (FP8, "weight_scale_inv"),
    "BF16, `weights_proj` lost": (BF16, "weights_proj.weight"),
    "BF16 with a scale": ({**BF16, "wk": bf16_with_scale}, None),
}


def load(path, switch, calls):
    """A model that has loaded the checkpoint but has not processed it: on a CPU, vLLM then packs weights away."""
    worker = Worker(path, switch, load=False)
    for module in projections(worker.model).values():
        module.weight.data.fill_(torch.nan)  # instead of uninitialized memory
    if calls is None:
        worker.load()  # vLLM's loader also checks what was loaded
        return worker
    pairs = list(worker.loader.get_all_weights(worker.model_config, worker.model))
    with worker.environment():
        for call in calls(pairs):
            worker.model.load_weights(call)
    return worker


def outcome_of_vllm(path, calls, truth):
    try:
        model = load(path, "0", calls).model
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
    makers, special = CASES[name]
    lost, calls = (special, None) if isinstance(special, str) else ((), special)
    tensors, truth = checkpoint(makers)
    path = write(tmp_path, {name: tensor for name, tensor in tensors.items() if not name.endswith(lost)})
    stock, worker = outcome_of_vllm(path, calls, truth), load(path, "1", calls)
    if DOCUMENTED[name].endswith("refused"):
        with pytest.raises(CheckpointError):
            worker.process()
        assert DOCUMENTED[name] == f"{stock} | refused"
        return
    worker.process()
    for number, layer in worker.model.indexproj.layers.items():
        weights, module = layer.operands, layer.module
        values = torch.cat([matrix.dequantize(torch.float64) for matrix in (weights.wk, weights.gate)])
        assert torch.equal(values, truth[number])
        assert DOCUMENTED[name] == f"{stock} | right, {weights.nbytes / (2 * (D + H) * K):.0%} of the bytes"
        output, bias = module(X)
        assert (like(output), bias) == ((torch.bfloat16, (M, D + H), (D + H, 1)), None)
        # Other code in vLLM finds `.weight` if it can hold the values.
        is_dense = sum(tensor.nbytes for tensor in module.parameters()) == 2 * (D + H) * K
        assert hasattr(module, "weight") == is_dense
        assert not is_dense or torch.equal(module.weight.double(), values)
    assert_outputs(worker.model, truth)
