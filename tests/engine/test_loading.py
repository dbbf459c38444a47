"""First loads: in parts, incomplete, wrong, interrupted, or past any checkpoint."""

import gc
import re
import weakref

import pytest
import torch
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.weight_cache.protocol import UnsupportedQuantForIPCError, check_ipc_quant_support

from engine.checkpoints import (
    DEEPSEEK,
    FP8,
    INDEXER,
    INT4,
    LAYERS,
    NVFP4,
    K,
    checkpoint,
    deepseek,
    only_projections,
    write,
)  # fmt: skip
from engine.harness import Worker, X, assert_outputs, engine_config, layerwise, plugin, projections
from indexproj.loading import CheckpointError

WK, SCALE = INDEXER.format(0) + "wk.weight", INDEXER.format(0) + "wk.weight_scale_inv"
LAST_SCALE, LAST_GATE = INDEXER.format(1) + "wk.weight_scale_inv", INDEXER.format(1) + "weights_proj.weight"


@pytest.fixture
def fp8(tmp_path):
    """Path, tensors, and the values of the projection by layer."""
    tensors, truth = checkpoint(FP8)
    return write(tmp_path, tensors), tensors, truth


@pytest.fixture
def empty(fp8):
    """A model before its weights are loaded."""
    return Worker(fp8[0], load=False)


def input_scales_last(items):
    return sorted(items, key=lambda item: "input_scale" in item[0])


@pytest.mark.parametrize("order", [list, reversed, input_scales_last])
@pytest.mark.parametrize("makers", [FP8, NVFP4, INT4], ids=["fp8", "nvfp4", "int4"])
def test_one_tensor_per_call(empty, makers, order):
    tensors, truth = checkpoint(makers)
    for item in order(tensors.items()):
        empty.model.load_weights([item])
    empty.process()
    assert_outputs(empty.model, truth)


NO_TENSORS = "{}wk_weights_proj: expected tensors of wk and weights_proj"
# How the items of a checkpoint differ, and all problems of the error.
WRONG = {
    "missing": (
        lambda tensors: [item for item in tensors.items() if item[0] not in (SCALE, LAST_GATE)],
        [f"{SCALE}: expected .* found no such", f"{LAST_GATE}: expected .* found no tensor of it"],
    ),
    "no indexers": (
        lambda tensors: only_projections(tensors, False).items(),
        [NO_TENSORS.format(INDEXER.format(layer)) for layer in range(LAYERS)],
    ),
    "NaN": (
        lambda tensors: {**tensors, **dict.fromkeys([SCALE, LAST_SCALE], torch.full((1, 2), torch.nan))}.items(),
        [f"{SCALE}: ", f"{LAST_SCALE}: "],
    ),
    "fewer heads": (
        lambda tensors: {**tensors, LAST_GATE: tensors[LAST_GATE][:8]}.items(),
        [f"{LAST_GATE}: expected 16 in dimension 0 of the matrix"],
    ),
    "twice": (
        lambda tensors: [*tensors.items(), (WK, tensors[WK])],
        [f"{WK}: expected no more tensors for a complete layer"],
    ),
}


@pytest.mark.parametrize(("change", "problems"), WRONG.values(), ids=WRONG)
def test_wrong_checkpoint_is_refused(fp8, empty, change, problems):
    """One error lists the problems of all layers."""
    empty.model.load_weights(change(fp8[1]))
    with pytest.raises(CheckpointError) as caught:
        empty.process()
    for found, pattern in zip(caught.value.problems, problems, strict=True):
        assert re.match(pattern, str(found))


def test_empty_model_raises(empty):
    with pytest.raises(RuntimeError, match="no weights have been loaded"):
        projections(empty.model)[0](X)


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
    with plugin("1"), empty.environment():
        layerwise.finalize_layerwise_processing(empty.model, empty.model_config)
    empty.process()
    assert_outputs(empty.model, fp8[2])


@pytest.mark.parametrize("architecture", ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"])
def test_layers_that_share_a_top_k_have_no_indexer(fp8, architecture):
    """vLLM builds none there, but the checkpoint has their tensors."""
    path, tensors, truth = fp8
    write(path, tensors, {**DEEPSEEK, "architectures": [architecture], "index_topk_pattern": "FS"})
    model = Worker(path).model
    assert list(projections(model)) == [0]
    assert_outputs(model, truth)


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


def test_inner_load_weights_writes_to_weight(empty):
    """load_weights of the inner model, called directly, is vLLM's own."""
    tensors = deepseek()
    with empty.environment():
        empty.model.model.load_weights((n.removeprefix("model."), t) for n, t in tensors.items() if n[:6] == "model.")
    empty.process()
    expected = torch.cat([tensors[f"{INDEXER.format(0)}{matrix}.weight"] for matrix in ("wk", "weights_proj")])
    module = projections(empty.model)[0]
    assert torch.equal(module.weight, expected)
    assert module(torch.ones(1, K).bfloat16())[0].isfinite().all()


def test_dense_weight_is_freed(empty):
    dense = [weakref.ref(module.weight) for module in projections(empty.model).values()]
    empty.load()
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
        config = engine_config(fp8[0], load_format=load_format)
        config.parallel_config.enable_elastic_ep = True
        model = Worker(None, config=config).model
        layouts.append([(name, tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()])
        assert hasattr(model, "indexproj")
    assert layouts[0] == layouts[1]


def test_compile_cache_key_depends_on_switch(fp8):
    """vLLM caches compiled code on disk by a hash of its config, whatever that code calls."""
    assert len({Worker(fp8[0], switch).config.compute_hash() for switch in ("0", "1", "bf16")}) == 3
