"""First loads by vLLM's own loader: every encoding, in parts, incomplete, interrupted, or past any checkpoint."""

import gc
import re
import weakref
from pathlib import Path

import pytest
import torch
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.weight_cache.protocol import UnsupportedQuantForIPCError, check_ipc_quant_support

from engine.checkpoints import BF16, BOTH_FP8, FP8, FUSED, INDEXER, INT4, NVFP4, D, H, K, M, checkpoint, pair, write
from engine.harness import Worker, X, assert_outputs, engine_config, layerwise, like, projections
from exports import EXPORTS, block
from indexproj.loading import CheckpointError

PAGE = (Path(__file__).parent.parent.parent / "docs/vllm.md").read_text()
DOCUMENTED = dict(re.findall(r"^\| ([^|]+) \| (\w[^|]* \| [^|]+) \|$", PAGE, re.MULTILINE))
QUARK = block(leaf="weight_scale")


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


WK, SCALE = INDEXER.format(0) + "wk.weight", INDEXER.format(0) + "wk.weight_scale_inv"
LAST_GATE = INDEXER.format(1) + "weights_proj.weight"


@pytest.fixture
def fp8(tmp_path):
    """Path, tensors, and the values of the projection by layer."""
    tensors, truth = checkpoint(FP8)
    return write(tmp_path, tensors), tensors, truth


@pytest.fixture
def empty(fp8):
    """A model before its weights are loaded."""
    return Worker(fp8[0], load=False)


@pytest.mark.parametrize("order", [list, reversed, lambda items: sorted(items, key=lambda each: "input" in each[0])])
@pytest.mark.parametrize("makers", [FP8, NVFP4, INT4], ids=["fp8", "nvfp4", "int4"])
def test_one_tensor_per_call(empty, makers, order):
    tensors, truth = checkpoint(makers)
    for item in order(tensors.items()):
        empty.model.load_weights([item])
    empty.process()
    assert_outputs(empty.model, truth)


def test_error_lists_the_problems_of_all_layers(fp8, empty):
    tensors = {name: tensor for name, tensor in fp8[1].items() if name not in (SCALE, LAST_GATE)}
    empty.model.load_weights(tensors.items())
    with pytest.raises(CheckpointError) as caught:
        empty.process()
    expected = [f"{SCALE}: expected .* found no such", f"{LAST_GATE}: expected .* found no tensor of it"]
    for found, pattern in zip(caught.value.problems, expected, strict=True):
        assert re.match(pattern, str(found))


def test_load_after_interrupted_load(fp8, empty):
    """Otherwise the scale of one load would meet the weight of the next."""
    _, tensors, truth = fp8

    def interrupted():
        yield SCALE, 3 * tensors[SCALE]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        empty.model.load_weights(interrupted())
    empty.load()
    empty.process()
    assert_outputs(empty.model, truth)
    # A second load, by load_weights and the processing of weights alone, without vLLM's reload.
    empty.model.load_weights([(WK, tensors[WK])])
    with pytest.raises(CheckpointError, match="no such tensor"):
        empty.process()


def test_load_that_ends_like_a_reload(fp8, empty):
    """With online quantization of other layers, vLLM calls the end of reloads in first loads."""
    empty.load()
    with empty.environment():
        layerwise.finalize_layerwise_processing(empty.model, empty.model_config)
    empty.process()
    assert_outputs(empty.model, fp8[2])


@pytest.mark.parametrize("saver", ["0", "1", "bf16"])
def test_save_sharded_state_loads_again(fp8, tmp_path, saver):
    """With the plugin and without, as bf16."""
    path, _, truth = fp8
    (saved := tmp_path / "saved").mkdir()
    worker = Worker(path, saver, load=False)
    worker.load()  # other weights, once processed for a CPU, are not contiguous, which vLLM does not save
    ShardedStateLoader.save_model(worker.model, str(saved))
    (saved / "config.json").write_text((path / "config.json").read_text())
    rounded = {layer: values.bfloat16().double() for layer, values in truth.items()}
    for switch in ("0", "1", "bf16"):
        assert_outputs(Worker(saved, switch, load_format="sharded_state").model, rounded)


def test_dense_weight_is_freed(empty):
    dense = [weakref.ref(module.weight) for module in projections(empty.model).values()]
    empty.load()
    gc.collect()
    assert {reference() for reference in dense} == {None}


def test_empty_model_is_refused(empty):
    """Also by the weight cache: its clients know `.weight` only, and leave it uninitialized if the daemon has none."""
    with pytest.raises(RuntimeError, match="no weights have been loaded"):
        projections(empty.model)[0](X)
    with pytest.raises(UnsupportedQuantForIPCError, match="IndexerMethod"):
        check_ipc_quant_support(empty.model)


def test_elastic_ep_ranks_have_the_same_layout(fp8):
    """A new rank gets dummy weights, and then the tensors of another rank in order, into those of its state_dict."""
    layouts = []
    for load_format in ("auto", "dummy"):
        config = engine_config(fp8[0], load_format=load_format)
        config.parallel_config.enable_elastic_ep = True
        model = Worker(None, config=config).model
        layouts.append([(name, tensor.dtype, tensor.shape) for name, tensor in model.named_parameters()])
        assert hasattr(model, "indexproj")
    assert layouts[0] == layouts[1]
