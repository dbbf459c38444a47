"""First loads: in parts, incomplete, wrong, interrupted, or past any checkpoint."""

import gc
import re
import weakref

import pytest
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.weight_cache.protocol import UnsupportedQuantForIPCError, check_ipc_quant_support

from engine.checkpoints import (
    FP8,
    INDEXER,
    INT4,
    LAYERS,
    NVFP4,
    checkpoint,
    write,
)  # fmt: skip
from engine.harness import Worker, X, assert_outputs, engine_config, layerwise, projections
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


def test_error_lists_the_problems_of_all_layers(fp8, empty):
    tensors = {name: tensor for name, tensor in fp8[1].items() if name not in (SCALE, LAST_GATE)}
    empty.model.load_weights(tensors.items())
    with pytest.raises(CheckpointError) as caught:
        empty.process()
    expected = [f"{SCALE}: expected .* found no such", f"{LAST_GATE}: expected .* found no tensor of it"]
    for found, pattern in zip(caught.value.problems, expected, strict=True):
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
