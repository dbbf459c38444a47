"""Loads of a swapped model with a fake vLLM; tests/engine runs the real one."""

from types import SimpleNamespace

import pytest
import torch

from fake_vllm import (
    D,
    MergedColumnParallelLinear,
    Model,
    create,
)
from indexproj.indexer.vllm.model import IndexerLayer, State
from indexproj.indexer.vllm.plugin import register
from indexproj.loading import CheckpointError
from indexproj.loading.config import Config
from indexproj.loading.names import parse
from support import bf16_layer, fp8_layer


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model."])
def test_load_weights_takes_projections_with_any_prefix(vllm, prefix):
    register()
    model = create(vllm, Model((1, 3)))
    tensors = {}
    for layer in (0, 1, 3):
        tensors |= {name.replace("model.", prefix, 1): tensor for name, tensor in fp8_layer(layer).items()}
    passed_on = model.load_weights(tensors.items())
    ours = {f"prefix.layers.{n}.self_attn.indexer.wk_weights_proj.{p}" for n in (1, 3) for p in PARAMETERS}
    assert passed_on == ours | {name for name in tensors if "k_norm" in name or "wq_b" in name}
    for layer in (1, 3):
        expected = tensors[f"{prefix}layers.{layer}.self_attn.indexer.wk.weight"]
        assert torch.equal(model.projection(layer).qweight.view(torch.uint8), expected.view(torch.uint8))
        assert not hasattr(model.projection(layer), "weight")


PARAMETERS = ["qweight", "wk_scale", "weights_proj_weight"]


def test_mtp_layer_and_additional_config(vllm):
    register()
    model = create(vllm, Model((4,)))
    tensors = {name.replace("layers.0", "mtp_layers.0"): tensor for name, tensor in bf16_layer(0).items()}
    model.load_weights(tensors.items())
    model.projection(4).quant_method.process_weights_after_loading(model.projection(4))
    assert model.projection(4).weight.isfinite().all()
    # This is part of the key of vLLM's compile cache.
    assert vllm.config.additional_config == {
        "other": 1, "indexproj": {"Model": "0.1.0: wk in BF16, weights_proj in BF16"}
    }  # fmt: skip


@pytest.mark.parametrize("where", ["hf_config", "hf_text_config"])
def test_quantization_config_has_a_veto(vllm, where):
    register()
    model = vllm.model = Model()
    config = SimpleNamespace(hf_text_config=SimpleNamespace(num_hidden_layers=4), hf_config=SimpleNamespace())
    config.hf_config.quantization_config = config.hf_text_config.quantization_config = {}
    getattr(config, where).quantization_config = {"rotation_config": {"block_size": 32}}
    vllm.loader(None).create_model(vllm.config, config)
    model.load_weights(bf16_layer().items())
    with pytest.raises(CheckpointError, match="rotation_config"):
        model.projection().quant_method.process_weights_after_loading(None)


def test_rounding_is_logged_once(vllm, caplog):
    register()
    model = Model(layers=(0, 1, 2))
    create(vllm, model)
    for layer in range(3):
        weights = {name: (tensor.float() * 1.001) for name, tensor in bf16_layer(layer).items()}
        model.load_weights(weights.items())
    with caplog.at_level("WARNING"):
        model.projection().quant_method.process_weights_after_loading(None)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "model.layers.{0-2}.self_attn.indexer.wk.weight" in lines[0]
    assert "rounded to BF16" in lines[0]


@pytest.mark.parametrize("rows", [slice(0), slice(D), slice(D, None)], ids=["none", "wk", "weights_proj"])
def test_uninitialized_rows_are_refused(vllm, rows):
    register()
    model = create(vllm, Model((0, 1)))
    model.projection().weight.data[rows] = 1  # the others are NaN
    with pytest.raises(CheckpointError) as caught:
        model.projection().quant_method.process_weights_after_loading(model.projection())
    assert [problem.subject for problem in caught.value.problems] == [
        f"prefix.layers.{layer}.self_attn.indexer.wk_weights_proj" for layer in (0, 1)
    ]


def test_layer_states():
    """What each call leaves."""
    layer = IndexerLayer("layer", 0, MergedColumnParallelLinear(), Config(), to_bf16=False)
    _, gate, wk, scale, _ = [(parse(name), tensor) for name, tensor in fp8_layer().items()]

    def after(call, *arguments):
        call(*arguments)
        return layer.state.name, len(layer.problems)

    assert after(layer.finish) == ("EMPTY", 1)  # there are no weights
    assert after(layer.abandon) == ("EMPTY", 0)
    assert after(layer.offer, *wk) == ("COLLECTING", 0)
    assert after(layer.finish) == ("EMPTY", 2)  # tensors are missing
    assert after(layer.abandon) == ("EMPTY", 0)
    assert after(layer.offer, *wk) == ("COLLECTING", 0)
    assert after(layer.abandon) == ("EMPTY", 0)
    assert [after(layer.offer, *item)[0] for item in (wk, gate, scale)] == ["COLLECTING", "COLLECTING", "UPDATED"]
    assert after(layer.finish) == ("UPDATED", 0)
    assert after(layer.offer, *wk) == ("UPDATED", 1)  # one too many
    layer.state, layer.problems = State.READY, []  # as IndexerModel does after a load
    assert after(layer.finish) == ("READY", 0)
    assert after(layer.offer, *wk) == ("COLLECTING", 0)
    assert after(layer.settle) == ("COLLECTING", 0)  # without its scale
    assert after(layer.abandon) == ("READY", 0)
    assert after(layer.offer, *gate) == ("COLLECTING", 0)
    assert after(layer.settle) == ("UPDATED", 0)
