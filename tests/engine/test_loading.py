"""First loads by vLLM's own loader: every encoding, in parts, incomplete, interrupted, or past any checkpoint."""

import gc
import re
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.weight_cache.protocol import UnsupportedQuantForIPCError, check_ipc_quant_support

from engine.checkpoints import BF16, BOTH_FP8, FP8, FUSED, LAYERS, D, H, K, M, checkpoint, pair, write
from engine.harness import Server, Worker, X, assert_outputs, like, projections, rounded
from exports import EXPORTS, block
from indexproj.loading import CheckpointError
from indexproj.loading.headers import parse

PAGE = (Path(__file__).parent.parent.parent / "docs/vllm.md").read_text()
DOCUMENTED = dict(re.findall(r"^\| ([^|]+) \| (\w[^|]* \| [^|]+) \|$", PAGE, re.MULTILINE))
QUARK = block(leaf="weight_scale")


def bf16_with_scale(n, k):
    export = EXPORTS["bf16"](n, k)
    export.tensors["weight_scale_inv"] = torch.ones(-(-n // 128), -(-k // 128))
    return export


def scales_first(pairs):
    """A weight and its scale are in different calls, like those of loaders that reorder."""
    return [[pair for pair in pairs if pair[0].endswith("_scale_inv") == which] for which in (True, False)]


def overwritten(pairs):
    previous = torch.empty(0)
    for name, tensor in pairs:
        previous.view(torch.uint8).fill_(0x3A)
        previous = tensor.clone()
        yield name, previous


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
    "FP8 128x128, from reused buffers": (FP8, lambda pairs: [overwritten(pairs)]),
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


def load(path, switch, tensors, calls):
    """A model that has loaded the checkpoint but has not processed it: on a CPU, vLLM then packs weights away."""
    worker = Worker(path, switch, load=False)
    for module in projections(worker.model).values():
        module.weight.data.fill_(torch.nan)  # instead of uninitialized memory
        module.dense = weakref.ref(module.weight)
    if calls:
        for call in calls(tensors.items()):
            worker.model.load_weights(call)
    else:
        worker.load()  # also checks what was loaded
    return worker


def outcome_of_vllm(*arguments, truth):
    try:
        model = load(*arguments).model
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
    stock = outcome_of_vllm(path, "0", tensors, calls, truth=truth)
    worker = load(path, "1", tensors, calls)
    if DOCUMENTED[name].endswith("refused"):
        with pytest.raises(CheckpointError) as caught:
            worker.process()
        assert [parse(problem.subject).layer(LAYERS) for problem in caught.value.problems] == [0, 1]
        assert DOCUMENTED[name] == f"{stock} | refused"
        return
    worker.process()
    gc.collect()
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
        assert (module.dense() is not None) == is_dense  # or its memory has been freed
        assert not is_dense or torch.equal(module.weight.double(), values)
    assert_outputs(worker.model, truth)


@pytest.mark.parametrize("saver", ["0", "1", "bf16"])
def test_save_sharded_state_loads_again(tmp_path, saver):
    server, saved = Server(tmp_path, FP8, saver, load=False), tmp_path / "saved"
    server.load()  # other weights, once processed for a CPU, are not contiguous, which vLLM does not save
    saved.mkdir()
    ShardedStateLoader.save_model(server.model, str(saved))
    shutil.copy(tmp_path / "config.json", saved)
    for switch in ("0", "1", "bf16"):
        truth = {layer: rounded(values) for layer, values in server.truth.items()}
        assert_outputs(Worker(saved, switch, load_format="sharded_state").model, truth)


def test_empty_model_is_refused(tmp_path):
    """Also by the weight cache: its clients know `.weight` only, and leave it uninitialized if the daemon has none."""
    empty = Server(tmp_path, FP8, load=False)
    with pytest.raises(RuntimeError, match="no weights have been loaded"):
        projections(empty.model)[0](X)
    with pytest.raises(UnsupportedQuantForIPCError, match="IndexerMethod"):
        check_ipc_quant_support(empty.model)
