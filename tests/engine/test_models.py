"""Which models the plugin serves, by their own load_weights, and what it says when it leaves them to vLLM."""

import importlib
import logging
import re
from unittest import mock

import pytest
import torch
from torch import nn
from vllm import ModelRegistry
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.reload import layerwise
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from engine import checkpoints, harness
from engine.checkpoints import BF16, BOTH_FP8, FP8, LAYERS, D, H, checkpoint, fp8_checkpoint, only_projections, write
from engine.harness import Worker, X, assert_close, assert_outputs, indexer_inputs, projections
from indexproj.indexer.vllm import plugin as vllm_plugin
from indexproj.kernels import target
from indexproj.loading import CheckpointError

# The module of the class, its name, the architecture under which vLLM looks for it if it is a draft.
MODELS = {
    "deepseek": ("vllm.model_executor.models.deepseek_v2", "DeepseekV3ForCausalLM", None),
    "glm": ("vllm.model_executor.models.deepseek_v2", "GlmMoeDsaForCausalLM", None),
    "deepseek-mtp": ("vllm.model_executor.models.deepseek_mtp", "DeepSeekMTP", "DeepseekV32MTPModel"),
    "v32-nvidia": ("vllm.models.deepseek_v32.nvidia.model", "DeepseekV32ForCausalLM", None),
    "v32-nvidia-mtp": ("vllm.models.deepseek_v32.nvidia.mtp", "DeepseekV32MTP", "DeepseekV32MTPModel"),
    "v32-amd": ("vllm.models.deepseek_v32.amd.model", "DeepseekV32ForCausalLM", None),
    "v32-amd-mtp": ("vllm.models.deepseek_v32.amd.mtp", "DeepseekV32MTP", "DeepseekV32MTPModel"),
    "hy-v4-nvidia": ("vllm.models.hy_v4.nvidia.model", "HYV4ForCausalLM", None),
    "hy-v4-amd": ("vllm.models.hy_v4.amd.model", "HYV4ForCausalLM", None),
    "hy-v4-mtp": ("vllm.models.hy_v4.nvidia.mtp", "HYV4MTP", "HYV4MTPModel"),
    "glm5next": ("vllm.models.glm5next", "Glm5NextForCausalLM", None),
    "glm5next-mtp": ("vllm.models.glm5next", "Glm5NextMTP", None),
    "dots3": ("vllm.models.dots3_note.nvidia.multimodal", "Dots3NoteForCausalLM", None),
}
CHECKPOINTS = {
    "hy": (checkpoints.HY_V4, checkpoints.hy_v4),
    "glm5next": (checkpoints.GLM5NEXT, checkpoints.glm5next),
    "dots3": (checkpoints.DOTS3, checkpoints.dots3),
}
RUN_INDEXER = ("deepseek", "glm", "hy-v4-nvidia", "hy-v4-amd")  # the indexers of the others need a GPU


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    """Its name, a function that builds it, the tensors of a BF16 checkpoint, and the layers with an indexer."""
    module, name, draft = MODELS[request.param]
    config, tensors = CHECKPOINTS.get(request.param.partition("-")[0], (checkpoints.DEEPSEEK, checkpoints.deepseek))
    tensors = tensors()
    if request.param == "glm5next-mtp":
        del tensors[f"model.layers.{LAYERS}.shared_head.head.weight"]
    architecture = draft or f"Tiny{name}"
    config = config if draft else {**config, "architectures": [architecture]}
    (tmp_path / "added_tokens.json").write_text('{"<|imgpad|>": 100}')  # dots3-note reads it

    def make(tensors, switch="1", **arguments):
        path, settings = write(tmp_path, tensors, config), None
        if request.param == "glm5next-mtp":  # vLLM makes drafts of the multimodal model's config only
            settings = harness.engine_config(path)
            of_draft = {"draft_model_config": settings.model_config, "enable_adaptive_verification": False}
            settings.speculative_config = mock.MagicMock(**of_draft)
        return Worker(path, switch, draft=bool(draft), config=settings, **arguments)

    with (
        mock.patch.dict(ModelRegistry.models),
        mock.patch("vllm.models.deepseek_v32.amd.rocm.ROCMAiterMLASparseBackend", CPUMLABackend),
        mock.patch("vllm.models.dots3_note.nvidia.model.Dots3NotePaddedSparseBackend", CPUMLABackend),
    ):
        ModelRegistry.register_model(architecture, getattr(importlib.import_module(module), name))
        yield request.param, make, tensors, [LAYERS] if "mtp" in request.param else list(range(LAYERS))


@pytest.mark.parametrize("makers", [BF16, FP8, BOTH_FP8], ids=["bf16", "fp8", "both"])
def test_model_agrees_with_stock(model, makers, caplog):
    name, make, tensors, layers = model
    tensors, truth = checkpoint(makers, tensors)
    swapped = make(tensors).model
    assert not [record for record in caplog.records if "wk_weights_proj" in record.getMessage()]  # as not loaded
    assert list(projections(swapped)) == layers
    assert_outputs(swapped, truth)
    if makers is not BOTH_FP8:  # which vLLM does not load
        stock = make(tensors, "0").model
        assert harness.neighbors(stock) == harness.neighbors(swapped)
        if name in RUN_INDEXER:
            harness.assert_indexer_inputs_agree(stock, swapped)


@pytest.mark.parametrize("draft", [False, True], ids=["main", "mtp"])
@pytest.mark.parametrize("published", ["deepseek-v3.2", "glm-5.2-fp8"])
def test_fp8_throughout_agrees_with_stock(tmp_path, published, draft):
    """As published: the neighbors are in FP8 too. k and weights differ by vLLM's rounding of wk to bf16."""
    path, truth = fp8_checkpoint(tmp_path, published)
    stock, swapped = (Worker(path, switch, draft=draft).model for switch in ("0", "1"))
    assert harness.neighbors(stock) == harness.neighbors(swapped)
    methods = [type(module.quant_method) for name, module in swapped.named_modules() if name.endswith("wq_b")]
    assert methods == len(projections(swapped)) * [Fp8LinearMethod]
    assert_outputs(swapped, truth)
    if not draft:
        harness.assert_indexer_inputs_agree(stock, swapped)


GLM5NEXT = pytest.mark.parametrize("model", ["glm5next"], indirect=True)


@GLM5NEXT
@pytest.mark.parametrize("makers", [BF16, FP8], ids=["bf16", "fp8"])
def test_glm5next_gate_is_fp32_and_follows_updates(model, makers):
    """vLLM computes it a second time, in fp32, from a copy of its weights that no update renews."""
    _, make, bf16, _ = model
    tensors, truth = checkpoint(makers, bf16)
    stock, swapped = make(tensors, "0").model, make(tensors).model
    for layer in range(LAYERS):  # vLLM would copy it here, but on a CPU it has packed the weight away
        stock.model.layers[layer].self_attn.indexer._wp_fp32 = truth[layer][D:].T.float()
    harness.assert_indexer_inputs_agree(stock, swapped)
    indexer = swapped.model.layers[1].self_attn.indexer
    for _ in range(2):
        with mock.patch("vllm.models.glm5next.common.attention._fused_indexer_weight_scale", lambda gate, *_: gate):
            gate = indexer_inputs(indexer)[2][:, :H]
        assert_close(gate, X.double() @ truth[1][D:].T, 2e-6)
        tensors, truth = checkpoint(makers, bf16)
        swapped.load_weights(only_projections(tensors).items())


@GLM5NEXT
def test_glm5next_lora_leaves_the_projection_alone(model):
    """vLLM refuses adapters of it. With a mapping, it would wrap the module, whose adapters the forward ignores."""
    _, make, tensors, _ = model
    mapping = {"qkv_proj": ["q_proj"]}
    with mock.patch("vllm.models.glm5next.Glm5NextForCausalLM.packed_modules_mapping", mapping, create=True):
        assert make(tensors, enable_lora=True).model.packed_modules_mapping == mapping


UNKNOWN = "indexproj 0.1.0 does not support vLLM 0.32.0 and leaves its indexers alone: "
LEFT = "indexproj leaves the indexer projections to vLLM: "


def test_unknown_switch_raises(monkeypatch):
    monkeypatch.setenv("INDEXPROJ_VLLM", "yes")
    with pytest.raises(ValueError, match=r"INDEXPROJ_VLLM: expected 0 .*, got 'yes'"):
        vllm_plugin.register()


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
    vllm_plugin.swap(nn.Linear(1, 1), None, None, False)
    assert not caplog.records


TUNED = type("TunedMethod", (linear.UnquantizedLinearMethod,), {})
SUBCLASS = type("Subclass", (linear.MergedColumnParallelLinear,), {})
OTHER = type("Indexer", (nn.Module,), {"__module__": "vllm.other"})
OF_GLM5NEXT = {"__module__": vllm_plugin.GLM5NEXT.rpartition(".")[0], "forward": eval("lambda self: None")}
NO_SOURCE = type("Indexer", (nn.Module,), OF_GLM5NEXT)
NO_GPU = mock.Mock(side_effect=RuntimeError("expected a GPU"))
LAYER = r"layers\.1\.self_attn\.indexer\.wk_weights_proj: expected an unquantized MergedColumn.* with .*found "
# Where, which attribute, its new value (... deletes it), the level of the log line, and a pattern of it.
UNSUPPORTED = {
    "indexer": ("indexer", "__class__", OTHER, "WARNING", r"layers\.1.*vllm\.other"),
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
    # another vLLM, which `register` does not patch
    "no create_model": ("loader", "create_model", ..., "WARNING", "create_model"),
    "create_model": ("loader", "create_model", lambda self: None, "WARNING", r"found \['self'\]"),
    "finalize": ("layerwise", "finalize_layerwise_processing", lambda model: None, "WARNING", r"found \['model'\]"),
    "no get_layerwise_info": ("layerwise", "get_layerwise_info", ..., "WARNING", "get_layerwise_info"),
    "one layer": ("plugin", "layer_of", lambda name: 1, "WARNING", "expected one indexer per layer"),
}


@pytest.mark.parametrize(("owner", "name", "value", "level", "pattern"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_is_left_to_vllm(stock, monkeypatch, caplog, owner, name, value, level, pattern):
    last, of_vllm = stock.model.model.layers[1].self_attn.indexer, {"loader": BaseModelLoader, "layerwise": layerwise}
    owners = {"indexer": last, "projection": last.wk_weights_proj, "model": stock.model, "config": stock.config}
    owners |= {"linear": linear, "target": target, "plugin": vllm_plugin, **of_vllm}
    if value is ...:
        monkeypatch.delattr(owners[owner], name)
    else:
        monkeypatch.setattr(owners[owner], name, value)
    before = stock.model.load_weights, dict(vars(BaseModelLoader)), dict(vars(layerwise))
    if owner in of_vllm:
        vllm_plugin.register()
    else:
        swap(stock)
    (record,) = caplog.records
    assert record.levelname == level
    assert record.getMessage().startswith(UNKNOWN if level == "WARNING" else LEFT)
    assert re.search(pattern, record.getMessage())
    assert before == (stock.model.load_weights, dict(vars(BaseModelLoader)), dict(vars(layerwise)))
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
