"""Loads that are cut short, come in parts, or bring nothing."""

import gc
import logging
import weakref

import pytest
import torch
from safetensors.torch import save_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.utils import process_weights_after_loading
from vllm.model_executor.model_loader.weight_cache.protocol import UnsupportedQuantForIPCError, check_ipc_quant_support

from engine.harness import (
    DEEPSEEK,
    INDEXER,
    LAYERS,
    K,
    activations,
    build,
    create,
    deepseek,
    engine_config,
    environment,
    outputs_are_right,
    plugin,
    projections,
    with_projection,
    write,
)
from engine.kinds import FP8, exports_of, pair
from indexproj.loading import CheckpointError


@pytest.fixture
def fp8(tmp_path):
    """Path, tensors and, by layer, values of an FP8 checkpoint."""
    truth = {}
    tensors = with_projection(deepseek(), exports_of(FP8, truth))
    return write(tmp_path, tensors), tensors, truth


@pytest.fixture
def empty(fp8):
    """A model before its weights are loaded, and what ends the load."""
    model, config, _, model_config = create(fp8[0])

    def process():
        with environment(config):
            process_weights_after_loading(model, model_config, torch.device("cpu"))

    return model, process


def error(error):
    return [(problem.subject, problem.found) for problem in error.value.problems]


def input_scales_last(items):
    return sorted(items, key=lambda item: "input_scale" in item[0])


@pytest.mark.parametrize("order", [list, reversed, input_scales_last])
@pytest.mark.parametrize("makers", [FP8, pair("nvfp4"), pair("int4")], ids=["fp8", "nvfp4", "int4"])
def test_one_tensor_in_each_call(empty, makers, order):
    model, process = empty
    truth = {}
    for name, tensor in order(with_projection(deepseek(), exports_of(makers, truth)).items()):
        model.load_weights([(name, tensor)])
    process()
    outputs_are_right(model, truth)


def test_everything_missing_is_listed_at_once(fp8, empty):
    (_, tensors, _), (model, process) = fp8, empty
    lost = {f"{INDEXER.format(0)}wk.weight_scale_inv", f"{INDEXER.format(1)}weights_proj.weight"}
    model.load_weights((name, tensor) for name, tensor in tensors.items() if name not in lost)
    with pytest.raises(CheckpointError) as caught:
        process()
    assert error(caught) == [
        (f"{INDEXER.format(0)}wk.weight_scale_inv", "no such tensor"),
        (f"{INDEXER.format(1)}weights_proj.weight", "no tensor of it"),
    ]


def test_a_checkpoint_without_indexers(fp8, empty):
    (_, tensors, _), (model, process) = fp8, empty
    model.load_weights((name, tensor) for name, tensor in tensors.items() if ".indexer.w" not in name)
    with pytest.raises(CheckpointError) as caught:
        process()
    assert [subject for subject, _ in error(caught)] == list(INDEXER_MODULES)
    with pytest.raises(RuntimeError, match="no weights have been loaded"):
        projections(model)[0](activations()[0])


INDEXER_MODULES = [f"{INDEXER.format(layer)}wk_weights_proj" for layer in range(LAYERS)]


def test_bad_values_of_several_layers_are_listed_at_once(fp8, empty):
    (_, tensors, _), (model, process) = fp8, empty
    for layer in range(LAYERS):
        tensors[f"{INDEXER.format(layer)}wk.weight_scale_inv"][0, 1] = torch.nan
    model.load_weights(tensors.items())
    with pytest.raises(CheckpointError) as caught:
        process()
    assert len(error(caught)) == LAYERS


def test_another_shape_than_the_models(fp8, empty):
    (_, tensors, _), (model, process) = fp8, empty
    gate = f"{INDEXER.format(1)}weights_proj.weight"
    tensors[gate] = tensors[gate][:8]
    model.load_weights(tensors.items())
    with pytest.raises(CheckpointError, match=r"expected \(D, H, K\) = \(128, 16, 256\), the model's shape"):
        process()


def test_a_tensor_that_comes_twice(fp8, empty):
    (_, tensors, _), (model, process) = fp8, empty
    name = f"{INDEXER.format(0)}wk.weight"
    model.load_weights([*tensors.items(), (name, tensors[name])])
    with pytest.raises(CheckpointError, match="no more tensors for a complete layer"):
        process()


def test_a_load_that_fails_leaves_nothing_behind(fp8, empty):
    """Otherwise the scale of one load would meet the weight of the next."""
    (_, tensors, truth), (model, process) = fp8, empty
    scale = f"{INDEXER.format(0)}wk.weight_scale_inv"

    def cut_short():
        yield scale, 3 * tensors[scale]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        model.load_weights(cut_short())
    model.load_weights(tensors.items())
    process()
    outputs_are_right(model, truth)


@pytest.mark.parametrize("architecture", ["DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"])
def test_layers_that_share_an_earlier_choice_have_no_indexer(fp8, architecture):
    """vLLM builds none there, the checkpoint holds their tensors all the same."""
    _, tensors, truth = fp8
    config = {**DEEPSEEK, "architectures": [architecture], "index_topk_pattern": "FS"}
    model = build(write(fp8[0], tensors, config))
    assert list(projections(model)) == [0]
    outputs_are_right(model, truth)


def test_dummy_weights(fp8):
    """No tensor of a checkpoint comes, and the random ones that vLLM writes are used."""
    model = build(fp8[0], load_format="dummy")
    x, *_ = activations()
    for module in projections(model).values():
        exact = x.double() @ module.weight.double().T
        assert exact.abs().max() > 0
        assert (module(x)[0].double() - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_sharded_state(tmp_path):
    """vLLM's loader of saved parameters writes to them, past any load_weights."""
    truth = {}
    tensors = with_projection(deepseek(), exports_of(pair("bf16"), truth))
    model, config, loader, model_config = create(write(tmp_path, tensors), "0")
    with environment(config):
        loader.load_weights(model, model_config)
    save_file(ShardedStateLoader._filter_subtensors(model.state_dict()), tmp_path / "model-rank-0-part-0.safetensors")
    outputs_are_right(build(tmp_path, load_format="sharded_state"), truth)


def test_loading_past_the_plugin_is_vllms_own(fp8, tmp_path):
    """The inner model's load_weights, called directly, writes to `.weight` as without the plugin."""
    tensors = deepseek()
    model, config, _, model_config = create(write(tmp_path / "bf16", tensors))
    with environment(config):
        model.model.load_weights((n.removeprefix("model."), t) for n, t in tensors.items() if n.startswith("model."))
        process_weights_after_loading(model, model_config, torch.device("cpu"))
    stem = INDEXER.format(0)
    expected = torch.cat([tensors[f"{stem}wk.weight"], tensors[f"{stem}weights_proj.weight"]])
    assert torch.equal(projections(model)[0].weight, expected)
    assert projections(model)[0](torch.ones(1, K).bfloat16())[0].isfinite().all()


def test_the_dense_weight_is_gone_once_another_is_there(fp8, empty):
    (_, tensors, _), (model, _) = fp8, empty
    dense = [weakref.ref(module.weight) for module in projections(model).values()]
    model.load_weights(tensors.items())
    gc.collect()
    assert [reference() for reference in dense] == [None] * LAYERS


def test_the_log_says_what_runs(fp8, caplog):
    with caplog.at_level(logging.INFO, "vllm.indexproj"):
        build(fp8[0])
    (record,) = [record for record in caplog.records if record.name == "vllm.indexproj"]
    assert record.getMessage().endswith(
        "runs 2 indexer projections of DeepseekV3ForCausalLM: wk in FP8 with a scale per 128x128, weights_proj in BF16"
    )


def test_weights_are_not_for_the_weight_cache(empty):
    """Its clients know `.weight` alone, and leave it uninitialised where the daemon has none."""
    with pytest.raises(UnsupportedQuantForIPCError, match="IndexerMethod"):
        check_ipc_quant_support(empty[0])


def test_ranks_that_get_their_weights_from_others_agree_on_the_layout(fp8):
    """Elastic expert parallelism gives a new rank dummy weights, and then the tensors of another one, in order."""
    dtypes = []
    for load_format in ("auto", "dummy"):
        config = engine_config(fp8[0], load_format=load_format)
        config.parallel_config.enable_elastic_ep = True
        with plugin("1"), set_current_vllm_config(config):
            model = get_model_loader(config.load_config).load_model(config, config.model_config)
        dtypes.append([(name, tensor.dtype, tensor.shape) for name, tensor in model.state_dict().items()])
        assert hasattr(model, "indexproj")
    assert dtypes[0] == dtypes[1]


def test_compiled_code_is_told_apart(fp8):
    """vLLM keeps compiled code on disk under a hash of its config, whatever that code calls."""
    hashes = set()
    for switch in ("0", "1", "bf16"):
        model, config, loader, model_config = create(fp8[0], switch)
        with environment(config):
            loader.load_weights(model, model_config)
            process_weights_after_loading(model, model_config, torch.device("cpu"))
        hashes.add(config.compute_hash())
    assert len(hashes) == 3
