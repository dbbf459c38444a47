"""First loads: in parts, incomplete, wrong, interrupted, or past any checkpoint."""

import gc
import re
import weakref

import pytest
import torch
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.weight_cache.protocol import UnsupportedQuantForIPCError, check_ipc_quant_support

from engine import checkpoints, harness
from engine.checkpoints import DEEPSEEK, ENCODINGS, FP8, INDEXER, LAYERS, K, checkpoint, deepseek, write
from engine.harness import Created, activations, assert_outputs, build, projections
from indexproj.loading import CheckpointError

FIRST_WK, FIRST_SCALE = INDEXER.format(0) + "wk.weight", INDEXER.format(0) + "wk.weight_scale_inv"
LAST_GATE = INDEXER.format(1) + "weights_proj.weight"
MODULES = [f"{INDEXER.format(layer)}wk_weights_proj" for layer in range(LAYERS)]


@pytest.fixture
def fp8(tmp_path):
    """Path, tensors, and the values of the projection by layer."""
    tensors, truth = checkpoint(FP8)
    return write(tmp_path, tensors), tensors, truth


@pytest.fixture
def empty(fp8):
    """A model before its weights are loaded."""
    return Created(fp8[0])


def input_scales_last(items):
    return sorted(items, key=lambda item: "input_scale" in item[0])


@pytest.mark.parametrize("order", [list, reversed, input_scales_last])
@pytest.mark.parametrize("encoding", ["fp8", "nvfp4", "int4"])
def test_one_tensor_per_call(empty, encoding, order):
    tensors, truth = checkpoint(ENCODINGS[encoding])
    for item in order(tensors.items()):
        empty.model.load_weights([item])
    empty.process()
    assert_outputs(empty.model, truth)


def missing(tensors):
    return [item for item in tensors.items() if item[0] not in (FIRST_SCALE, LAST_GATE)]


def no_indexers(tensors):
    return checkpoints.without_projections(tensors).items()


def bad_scales(tensors):
    for layer in range(LAYERS):
        tensors[f"{INDEXER.format(layer)}wk.weight_scale_inv"][0, 1] = torch.nan
    return tensors.items()


def fewer_heads(tensors):
    return {**tensors, LAST_GATE: tensors[LAST_GATE][:8]}.items()


def duplicate(tensors):
    return [*tensors.items(), (FIRST_WK, tensors[FIRST_WK])]


@pytest.mark.parametrize(
    ("change", "problems"),
    [
        (missing, [f"{FIRST_SCALE}: expected .* found no such", f"{LAST_GATE}: expected .* found no tensor of it"]),
        (no_indexers, [f"{module}: expected tensors of wk and weights_proj" for module in MODULES]),
        (bad_scales, [f"{INDEXER.format(layer)}wk.weight_scale_inv: " for layer in range(LAYERS)]),
        (fewer_heads, [f"{LAST_GATE}: expected 16 in dimension 0 of the matrix"]),
        (duplicate, [f"{FIRST_WK}: expected no more tensors for a complete layer"]),
    ],
)
def test_wrong_checkpoint_is_refused(fp8, empty, change, problems):
    """One error lists the problems of all layers."""
    empty.model.load_weights(change(fp8[1]))
    with pytest.raises(CheckpointError) as caught:
        empty.process()
    for found, pattern in zip(caught.value.problems, problems, strict=True):
        assert re.match(pattern, str(found))


def test_empty_model_raises(empty):
    with pytest.raises(RuntimeError, match="no weights have been loaded"):
        projections(empty.model)[0](activations()[0])


def test_load_after_interrupted_load(fp8, empty):
    """Otherwise the scale of one load would meet the weight of the next."""
    _, tensors, truth = fp8

    def interrupted():
        yield FIRST_SCALE, 3 * tensors[FIRST_SCALE]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        empty.model.load_weights(interrupted())
    empty.model.load_weights(tensors.items())
    empty.process()
    assert_outputs(empty.model, truth)


def test_second_load_is_processed_again(fp8, empty):
    """By load_weights and the processing of weights alone, without vLLM's reload."""
    empty.model.load_weights(fp8[1].items())
    empty.process()
    empty.model.load_weights([(FIRST_WK, fp8[1][FIRST_WK])])
    with pytest.raises(CheckpointError, match="no such tensor"):
        empty.process()


def test_load_that_ends_like_a_reload(fp8, empty):
    """With online quantization of other layers, vLLM calls the end of reloads in first loads."""
    empty.load()
    with harness.plugin("1"), harness.environment(empty.config):
        harness.reload.layerwise.finalize_layerwise_processing(empty.model, empty.config.model_config)
    empty.process()
    assert_outputs(empty.model, fp8[2])


@pytest.mark.parametrize("architecture", ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"])
def test_layers_that_share_a_top_k_have_no_indexer(fp8, architecture):
    """vLLM builds none there, but the checkpoint has their tensors."""
    path, tensors, truth = fp8
    config = {**DEEPSEEK, "architectures": [architecture], "index_topk_pattern": "FS"}
    model = build(write(path, tensors, config))
    assert list(projections(model)) == [0]
    assert_outputs(model, truth)


@pytest.mark.parametrize("saver", ["0", "1", "bf16"])
def test_save_sharded_state_loads_again(fp8, tmp_path, saver):
    """With the plugin and without, as bf16."""
    path, _, truth = fp8
    (saved := tmp_path / "saved").mkdir()
    server = Created(path, saver)
    server.load()  # other weights, once processed for a CPU, are not contiguous, which vLLM does not save
    ShardedStateLoader.save_model(server.model, str(saved))
    (saved / "config.json").write_text((path / "config.json").read_text())
    rounded = {layer: values.bfloat16().double() for layer, values in truth.items()}
    for switch in ("0", "1", "bf16"):
        assert_outputs(build(saved, switch, load_format="sharded_state"), rounded)


def test_inner_load_weights_writes_to_weight(tmp_path):
    """load_weights of the inner model, called directly, is vLLM's own."""
    tensors = deepseek()
    created = Created(write(tmp_path, tensors))
    inner = ((n.removeprefix("model."), t) for n, t in tensors.items() if n.startswith("model."))
    with harness.environment(created.config):
        created.model.model.load_weights(inner)
    created.process()
    expected = torch.cat([tensors[f"{INDEXER.format(0)}{matrix}.weight"] for matrix in ("wk", "weights_proj")])
    assert torch.equal(projections(created.model)[0].weight, expected)
    assert projections(created.model)[0](torch.ones(1, K).bfloat16())[0].isfinite().all()


def test_dense_weight_is_freed(fp8, empty):
    dense = [weakref.ref(module.weight) for module in projections(empty.model).values()]
    empty.model.load_weights(fp8[1].items())
    gc.collect()
    assert [reference() for reference in dense] == [None] * LAYERS


def test_weight_cache_refuses_the_model(empty):
    """Its clients know `.weight` only, and leave it uninitialized if the daemon has none."""
    with pytest.raises(UnsupportedQuantForIPCError, match="IndexerMethod"):
        check_ipc_quant_support(empty.model)


def test_elastic_ep_ranks_have_the_same_layout(fp8):
    """A new rank gets dummy weights, and then the tensors of another rank in order."""
    layouts = []
    for load_format in ("auto", "dummy"):
        config = harness.engine_config(fp8[0], load_format=load_format)
        config.parallel_config.enable_elastic_ep = True
        model = harness.load_model(config)
        layouts.append([(name, tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()])
        assert hasattr(model, "indexproj")
    assert layouts[0] == layouts[1]


def test_compile_cache_key_depends_on_switch(fp8):
    """vLLM caches compiled code on disk by a hash of its config, whatever that code calls."""
    hashes = set()
    for switch in ("0", "1", "bf16"):
        created = Created(fp8[0], switch)
        created.load()
        created.process()
        hashes.add(created.config.compute_hash())
    assert len(hashes) == 3
