"""GLM-5.3-Flash, whose gate vLLM computes a second time in fp32.

Its modules import torchvision, for images; and its query is rotated and quantized by a Triton kernel. Both are replaced
here: neither affects the projection.
"""

import importlib.machinery
import inspect
import logging
import sys
from unittest import mock

import pytest
import torch
from vllm.config import LoRAConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager

from engine import checkpoints, harness
from engine.checkpoints import (
    DEEPSEEK,
    ENCODINGS,
    HEADS,
    INDEXER,
    KV_RANK,
    LAYERS,
    NOPE,
    Q_RANK,
    D,
    H,
    K,
    M,
    only_projections,
    value,
    values,
    write,
)
from engine.harness import activations, assert_close, assert_neighbors_equal, bits, build, projections
from indexproj.indexer.vllm import glm5next as vllm_glm5next
from indexproj.indexer.vllm import plugin as vllm_plugin

CONFIG = {
    **{name: setting for name, setting in DEEPSEEK.items() if name != "rope_theta"},
    "architectures": ["TinyGlm5Next"], "model_type": "glm5_next_text", "qk_rope_head_dim": 0, "index_kpool": 4,
    "layer_types": ["indexed_attention"] * LAYERS, "mlp_layer_types": ["dense"] * LAYERS,
    "indexer_types": ["full"] * LAYERS, "indexer_rope_interleave": True,
    "mhc": False, "mla_use_nope": True, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def glm5next():
    """vLLM's module with the indexer."""
    stubs = {}
    for name in ("torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.v2"):
        stubs[name] = mock.MagicMock(__path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
    with mock.patch.dict(sys.modules, stubs):
        from vllm import ModelRegistry
        from vllm.models.glm5next import Glm5NextForCausalLM, Glm5NextMTP
        from vllm.models.glm5next.common import attention

        with mock.patch.dict(ModelRegistry.models):
            ModelRegistry.register_model("TinyGlm5Next", Glm5NextForCausalLM)
            ModelRegistry.register_model("TinyGlm5NextMtp", Glm5NextMTP)
            yield attention


def checkpoint(encoding):
    """Tensors without RoPE, and with those that pool keys; and the values of the projection by layer."""
    tensors = checkpoints.deepseek()
    for layer in range(LAYERS + 1):
        stem = f"model.layers.{layer}.self_attn."
        tensors |= values(stem, q_b_proj=(HEADS * NOPE, Q_RANK), kv_a_proj_with_mqa=(KV_RANK, K))
        tensors[f"{stem}indexer.index_kpool_compress_gate"] = value(f"{stem}gate", D, K)
        tensors[f"{stem}indexer.index_kpool_compress_ape"] = value(f"{stem}ape", 4, D).float()
    return checkpoints.checkpoint(ENCODINGS[encoding], tensors)


def indexer_inputs(indexer):
    def quantize(q):
        return harness.per_token_group_quant_fp8(q, 128)

    return harness.indexer_inputs(indexer, None, quantizer=("fwht128_quant_fp8", quantize))


def test_bf16_agrees_with_stock(tmp_path):
    tensors, _ = checkpoint("bf16")
    stock, swapped = (build(write(tmp_path, tensors, CONFIG), switch) for switch in ("0", "1"))
    assert_neighbors_equal(stock, swapped)
    theirs, ours = (model.model.layers[0].self_attn.indexer for model in (stock, swapped))
    # vLLM packs the weight away on a CPU, before it makes this copy of it.
    theirs._wp_fp32 = tensors[f"{INDEXER.format(0)}weights_proj.weight"].float().T.contiguous()
    expected, found = indexer_inputs(theirs), indexer_inputs(ours)
    assert torch.equal(bits(expected[0]), bits(found[0]))
    assert_close(found[1], expected[1], 2**-7)
    assert found[2].dtype == expected[2].dtype == torch.float32
    assert_close(found[2], expected[2], 2e-6)
    assert ours._wp_fp32 is None


@pytest.mark.parametrize("encoding", ["bf16", "fp8"])
def test_gate_is_fp32_and_follows_updates(tmp_path, glm5next, encoding):
    tensors, truth = checkpoint(encoding)
    model = build(write(tmp_path, tensors, CONFIG))
    assert projections(model).keys() == {0, 1}
    for _ in range(2):
        with mock.patch.object(glm5next, "_fused_indexer_weight_scale", lambda weights, q_scale, scale: weights):
            gate = indexer_inputs(model.model.layers[1].self_attn.indexer)[2][:, :H]
        assert_close(gate, activations()[0].double() @ truth[1][D:].T, 2e-6)
        tensors, truth = checkpoint(encoding)
        model.load_weights(only_projections(tensors).items())


def test_source_of_changed_forward(tmp_path):
    """For tracebacks and debuggers."""
    model = build(write(tmp_path, checkpoint("bf16")[0], CONFIG))
    assert "k_and_gate" in inspect.getsource(model.model.layers[0].self_attn.indexer.forward)


@pytest.mark.parametrize("encoding", ["bf16", "fp8"])
def test_unknown_statements_keep_the_forward(tmp_path, glm5next, encoding, caplog):
    """The fp32 copy of the gate that it reads is ours, renewed in place by updates and reloads."""
    tensors, truth = checkpoint(encoding)
    with (
        mock.patch.object(vllm_glm5next, "TWO_GEMMS", "other = statements"),
        mock.patch.object(vllm_plugin, "glm5next_forward", vllm_glm5next.glm5next_forward.__wrapped__),
        caplog.at_level(logging.INFO, "vllm.indexproj"),
    ):
        model = build(write(tmp_path, tensors, CONFIG))
    assert "keeps vLLM's forward of model.layers.1.self_attn.indexer" in caplog.text
    indexer = model.model.layers[1].self_attn.indexer
    assert "forward" not in vars(indexer)
    pointer, config = indexer._wp_fp32.data_ptr(), harness.engine_config(tmp_path)
    for update in ("gate", "both", "reload", None):
        with mock.patch.object(glm5next, "_fused_indexer_weight_scale", lambda weights, q_scale, scale: weights):
            gate = indexer_inputs(indexer)[2]
        assert_close(gate[:, :H], activations()[0].double() @ truth[1][D:].T, 2e-6)
        harness.assert_outputs(model, truth)
        tensors, new = checkpoint(encoding)
        if update == "gate":
            model.load_weights([item for item in tensors.items() if "weights_proj" in item[0]])
            truth = {layer: torch.cat([truth[layer][:D], new[layer][D:]]) for layer in truth}
            continue
        truth = new
        if update == "both":
            model.load_weights(only_projections(tensors).items())
        elif update == "reload":
            with harness.plugin("1"), harness.environment(config):
                harness.reload_weights(config, model, tensors.items(), None, True)
    assert indexer._wp_fp32.data_ptr() == pointer


@pytest.mark.parametrize("encoding", ["bf16", "fp8"])
def test_mtp_layer(tmp_path, encoding):
    """As a model of its own: vLLM makes drafts of the multimodal model's config only."""
    tensors, truth = checkpoint(encoding)
    tensors = {name: tensor for name, tensor in tensors.items() if "shared_head.head" not in name}
    config = harness.engine_config(write(tmp_path, tensors, {**CONFIG, "architectures": ["TinyGlm5NextMtp"]}))
    settings = {"draft_model_config": config.model_config, "enable_adaptive_verification": False}
    config.speculative_config = mock.MagicMock(**settings)
    stock, swapped = (harness.load_model(config, switch) for switch in ("0", "1"))
    assert_neighbors_equal(stock, swapped)
    assert list(projections(swapped)) == [LAYERS]
    harness.assert_outputs(swapped, truth)


def test_lora_leaves_the_projection_alone(tmp_path):
    """vLLM refuses adapters of it; if it wrapped the module, it would accept them and the forward would ignore them."""
    path = write(tmp_path, checkpoint("bf16")[0], CONFIG)
    model_class = sys.modules["vllm.models.glm5next"].Glm5NextForCausalLM
    with mock.patch.object(model_class, "packed_modules_mapping", {}, create=True):
        model = build(path, enable_lora=True)
    indexer, config = model.model.layers[0].self_attn.indexer, harness.engine_config(path)
    expected, module = indexer_inputs(indexer), indexer.wk_weights_proj
    with harness.environment(config):
        lora = LoRAConfig(max_lora_rank=8, lora_dtype=torch.bfloat16)
        manager = LoRAModelManager(model, 4, 128, 128, lora, torch.device("cpu"), config)
        manager.set_adapter_mapping(LoRAMapping((0,) * M, (0,), is_prefill=True))
    assert "wk_weights_proj" not in manager.packed_modules_mapping
    assert indexer.wk_weights_proj is module
    for ours, before in zip(indexer_inputs(indexer), expected, strict=True):
        assert torch.equal(bits(ours), bits(before))
