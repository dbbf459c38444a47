"""Which vLLM the plugin patches, which models it serves, and what it says when it leaves them to vLLM."""

import logging
import re
from unittest import mock

import pytest
import torch
from torch import nn
from vllm.model_executor.layers import linear
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload import layerwise

from engine.checkpoints import BF16, checkpoint, write
from engine.harness import Worker
from indexproj.indexer.vllm import plugin as vllm_plugin
from indexproj.kernels import target
from indexproj.loading import CheckpointError

UNKNOWN = "indexproj 0.1.0 does not support vLLM 0.32.0 and leaves its indexers alone: "
LEFT = "indexproj leaves the indexer projections to vLLM: "


def test_unknown_switch_raises(monkeypatch):
    monkeypatch.setenv("INDEXPROJ_VLLM", "yes")
    with pytest.raises(ValueError, match=r"INDEXPROJ_VLLM: expected 0 .*, got 'yes'"):
        vllm_plugin.register()


@pytest.mark.parametrize(
    ("owner", "name", "function", "found"),
    [
        (BaseModelLoader, "create_model", ..., "create_model"),
        (BaseModelLoader, "create_model", lambda self, vllm_config, model_config: None, "['self', 'vllm_config', 'mod"),
        (layerwise, "finalize_layerwise_processing", lambda model: None, "['model']"),
        (layerwise, "get_layerwise_info", ..., "get_layerwise_info"),
    ],
)
def test_unknown_vllm_is_not_patched(monkeypatch, caplog, owner, name, function, found):
    change(monkeypatch, owner, name, function)
    before = dict(vars(BaseModelLoader)), dict(vars(layerwise))
    vllm_plugin.register()
    assert before == (dict(vars(BaseModelLoader)), dict(vars(layerwise)))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith(UNKNOWN)
    assert found in record.getMessage()


def change(monkeypatch, owner, name, value):
    """Sets an attribute; `...` deletes it."""
    if value is ...:
        monkeypatch.delattr(owner, name)
    else:
        monkeypatch.setattr(owner, name, value)


@pytest.fixture
def stock(tmp_path, caplog):
    """A model of vLLM, before it is swapped and before its weights are loaded."""
    worker = Worker(write(tmp_path, checkpoint(BF16)[0]), "0", load=False)
    caplog.set_level(logging.INFO, "vllm.indexproj")
    caplog.clear()
    return worker


def swap(stock):
    vllm_plugin.swap(stock.model, stock.config, stock.model_config, False)


def test_model_without_indexer_is_not_logged(caplog):
    """Nor does it need any of the configs."""
    vllm_plugin.swap(nn.Linear(1, 1), None, None, False)
    assert not caplog.records


def indexer_class(name, **attributes):
    module, _, qualname = name.rpartition(".")
    return type(qualname, (nn.Module,), {"__module__": module, **attributes})


TUNED = type("TunedMethod", (linear.UnquantizedLinearMethod,), {})
SUBCLASS = type("Subclass", (linear.MergedColumnParallelLinear,), {})
exec("def forward(self): pass", SOURCELESS := {})
NO_SOURCE = indexer_class(vllm_plugin.GLM5NEXT, forward=SOURCELESS["forward"])
NO_GPU = mock.Mock(side_effect=RuntimeError("expected a GPU"))
LAYER = r"layers\.1\.self_attn\.indexer\.wk_weights_proj: expected an unquantized MergedColumn.* with .*found "
# Where, which attribute, its new value (... deletes it), the level of the log line, and a pattern of it.
UNSUPPORTED = {
    "indexer": ("indexer", "__class__", indexer_class("vllm.other.Indexer"), "WARNING", r"layers\.1.*vllm\.other"),
    "class": ("projection", "__class__", SUBCLASS, "WARNING", LAYER + "Subclass with UnquantizedLinearMethod"),
    "rows": ("projection", "output_sizes", [16, 128], "WARNING", LAYER + r".*\[16, 128\]"),
    "bias": ("projection", "bias", nn.Parameter(torch.zeros(144)), "WARNING", LAYER + ".*Parameter"),
    "skip_bias_add": ("projection", "skip_bias_add", True, "WARNING", LAYER + ".*'skip_bias_add': True"),
    "return_bias": ("projection", "return_bias", False, "WARNING", LAYER + ".*'return_bias': False"),
    "tp_size": ("projection", "tp_size", 2, "WARNING", LAYER + ".*'tp_size': 2"),
    "method": ("projection", "quant_method", None, "WARNING", LAYER + ".* with NoneType"),
    "no heads": ("indexer", "n_head", ..., "WARNING", "no attribute 'n_head'"),
    "no class": ("linear", "UnquantizedLinearMethod", ..., "WARNING", "cannot import name"),
    "source": ("indexer", "__class__", NO_SOURCE, "WARNING", "could not get source code"),
    "load_weights": ("model", "load_weights", print, "INFO", "load_weights of .* is from builtins"),
    "fp16": ("projection", "weight", nn.Parameter(torch.zeros(144, 256).half()), "INFO", r"is in torch\.float16"),
    "tuned": ("projection", "quant_method", TUNED(), "INFO", "has TunedMethod, which vLLM has tuned"),
    "device": ("target", "target_of", NO_GPU, "INFO", "is on cpu, maybe because .*: expected a GPU"),
    "config": ("config", "additional_config", "", "INFO", "additional_config is not a dict"),
    "one layer": ("plugin", "layer_of", lambda name: 1, "WARNING", "expected one indexer per layer"),
}


@pytest.mark.parametrize(("owner", "name", "value", "level", "pattern"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_model_is_not_swapped(stock, monkeypatch, caplog, owner, name, value, level, pattern):
    last = stock.model.model.layers[1].self_attn.indexer
    owners = {"indexer": last, "projection": last.wk_weights_proj, "model": stock.model, "config": stock.config}
    change(monkeypatch, {**owners, "linear": linear, "target": target, "plugin": vllm_plugin}[owner], name, value)
    before = stock.model.load_weights
    swap(stock)
    (record,) = caplog.records
    assert record.levelname == level
    assert record.getMessage().startswith(UNKNOWN if level == "WARNING" else LEFT)
    assert re.search(pattern, record.getMessage())
    assert stock.model.load_weights == before
    assert not hasattr(stock.model, "indexproj")
    assert type(last.wk_weights_proj.quant_method).__name__ != "IndexerMethod"


def test_quantization_config_has_a_veto(stock):
    stock.model_config.hf_config.quantization_config = {"rotation_config": {"block_size": 32}}
    swap(stock)
    stock.load()
    with pytest.raises(CheckpointError, match="rotation_config"):
        stock.process()


def test_log_line_and_compile_key(stock, caplog):
    """additional_config is a part of the key of vLLM's compile cache."""
    stock.config.additional_config["other"] = 1
    swap(stock)
    stock.load()
    stock.process()
    layouts = "wk in BF16, weights_proj in BF16"
    assert f"indexproj 0.1.0 runs 2 indexer projections of DeepseekV3ForCausalLM: {layouts}" in caplog.messages
    expected = {"other": 1, "indexproj": {"DeepseekV3ForCausalLM": f"0.1.0: {layouts}"}}
    assert stock.config.additional_config == expected
    assert "wk_weights_proj" not in stock.model.packed_modules_mapping  # LoRA is off
    with mock.patch.object(stock.model.indexproj, "finish") as finish:
        stock.process()  # every layer calls this, but finish is for all of them
    assert not finish.called
