"""GLM-5.3-Flash, whose gate vLLM computes again in fp32.

Its files import torchvision, for images; and its query is rotated and quantized by a Triton kernel. Here both are
replaced: the rotation does not pass through the projection.
"""

import importlib.machinery
import sys
from unittest import mock

import pytest
import torch
from vllm.config import LoRAConfig, set_current_vllm_config
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager
from vllm.model_executor.model_loader import get_model_loader

from engine.harness import (
    DEEPSEEK,
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
    Recorder,
    activations,
    build,
    deepseek,
    engine_config,
    environment,
    is_projection,
    outputs_are_right,
    per_token_group_quant_fp8,
    plugin,
    projections,
    value,
    with_projection,
    write,
)
from engine.kinds import BF16, FP8, exports_of

CONFIG = {
    **{name: setting for name, setting in DEEPSEEK.items() if name != "rope_theta"},
    "architectures": ["TinyGlm5Next"],
    "model_type": "glm5_next_text",
    "qk_rope_head_dim": 0,
    "index_kpool": 4,
    "layer_types": ["indexed_attention"] * LAYERS,
    "mlp_layer_types": ["dense"] * LAYERS,
    "indexer_types": ["full"] * LAYERS,
    "indexer_rope_interleave": True,
    "mhc": False,
    "mla_use_nope": True,
    "pad_token_id": 0,
}


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


def checkpoint(makers):
    """Tensors without RoPE and with what pools keys; and the projection's values by layer."""
    tensors = deepseek()
    for layer in range(LAYERS + 1):
        stem = f"model.layers.{layer}.self_attn."
        tensors[f"{stem}q_b_proj.weight"] = value(f"{stem}q_b_proj.weight", HEADS * NOPE, Q_RANK)
        tensors[f"{stem}kv_a_proj_with_mqa.weight"] = value(f"{stem}kv_a_proj_with_mqa.weight", KV_RANK, K)
        tensors[f"{stem}indexer.index_kpool_compress_gate"] = value(f"{stem}gate", D, K)
        tensors[f"{stem}indexer.index_kpool_compress_ape"] = value(f"{stem}ape", 4, D).float()
    truth = {}
    return with_projection(tensors, exports_of(makers, truth)), truth


def indexer_inputs(module, indexer):
    recorder, (x, qr, positions) = Recorder(), activations()
    with (
        mock.patch.object(module, "fwht128_quant_fp8", lambda q: per_token_group_quant_fp8(q, 128)),
        mock.patch.dict(indexer._modules, {"indexer_op": recorder}),
        torch.no_grad(),
    ):
        indexer(x, qr, positions, None)
    return recorder.inputs


def test_it_agrees_with_vllm(tmp_path, glm5next):
    tensors, _ = checkpoint(BF16)
    stock, swapped = (build(write(tmp_path, tensors, CONFIG), switch) for switch in ("0", "1"))
    for name, parameter in dict(stock.named_parameters()).items():
        if not is_projection(name):
            assert torch.equal(parameter, swapped.get_parameter(name)), name
    theirs, ours = (model.model.layers[0].self_attn.indexer for model in (stock, swapped))
    # vLLM gives the weight away on a CPU, before it makes this copy of it.
    theirs._wp_fp32 = tensors[f"{INDEXER.format(0)}weights_proj.weight"].float().T.contiguous()
    expected = indexer_inputs(glm5next, theirs)
    found = indexer_inputs(glm5next, ours)
    assert torch.equal(expected[0].view(torch.uint8), found[0].view(torch.uint8))
    assert (found[1].double() - expected[1].double()).abs().max() <= 2**-7 * expected[1].double().abs().max()
    assert found[2].dtype == expected[2].dtype == torch.float32
    assert (found[2].double() - expected[2].double()).abs().max() <= 2e-6 * expected[2].double().abs().max()
    assert ours._wp_fp32 is None


@pytest.mark.parametrize("makers", [BF16, FP8], ids=["bf16", "fp8"])
def test_the_gate_is_exact_and_never_stale(tmp_path, glm5next, makers):
    tensors, truth = checkpoint(makers)
    model = build(write(tmp_path, tensors, CONFIG))
    indexer = model.model.layers[1].self_attn.indexer
    for _ in range(2):
        with mock.patch.object(glm5next, "_fused_indexer_weight_scale", lambda weights, q_scale, scale: weights):
            gate = indexer_inputs(glm5next, indexer)[2][:, :H]
        exact = activations()[0].double() @ truth[1][D:].T
        assert (gate.double() - exact).abs().max() <= 2e-6 * exact.abs().max()
        tensors, truth = checkpoint(makers)
        model.load_weights((name, tensor) for name, tensor in tensors.items() if is_projection(name))
    assert projections(model).keys() == {0, 1}


@pytest.mark.parametrize("makers", [BF16, FP8], ids=["bf16", "fp8"])
def test_the_mtp_layer(tmp_path, makers):
    """As a model of its own; what makes a draft of the multimodal model's config is left out."""
    tensors, truth = checkpoint(makers)
    tensors = {name: tensor for name, tensor in tensors.items() if "shared_head.head" not in name}
    config = engine_config(write(tmp_path, tensors, {**CONFIG, "architectures": ["TinyGlm5NextMtp"]}))
    settings = {"draft_model_config": config.model_config, "enable_adaptive_verification": False}
    config.speculative_config = mock.MagicMock(**settings)
    models = []
    for switch in ("0", "1"):
        config.compilation_config.static_forward_context.clear()
        with plugin(switch), set_current_vllm_config(config):
            models.append(get_model_loader(config.load_config).load_model(config, config.model_config))
    stock, swapped = models
    for name, parameter in stock.named_parameters():
        if not is_projection(name):
            assert torch.equal(parameter, swapped.get_parameter(name)), name
    assert list(projections(swapped)) == [LAYERS]
    outputs_are_right(swapped, truth)


def test_lora_leaves_the_projection_alone(tmp_path, glm5next):
    """As in vLLM, which refuses adapters of it; wrapped, it would take them, and the forward would not use them."""
    tensors, _ = checkpoint(BF16)
    path = write(tmp_path, tensors, CONFIG)
    model_class = sys.modules["vllm.models.glm5next"].Glm5NextForCausalLM
    with mock.patch.object(model_class, "packed_modules_mapping", {}, create=True):
        model = build(path)
    indexer = model.model.layers[0].self_attn.indexer
    expected, config, module = indexer_inputs(glm5next, indexer), engine_config(path), indexer.wk_weights_proj
    with environment(config):
        lora = LoRAConfig(max_lora_rank=8, lora_dtype=torch.bfloat16)
        manager = LoRAModelManager(model, 4, 128, 128, lora, torch.device("cpu"), config)
        manager.set_adapter_mapping(LoRAMapping((0,) * M, (0,), is_prefill=True))
    assert "wk_weights_proj" not in manager.packed_modules_mapping
    assert indexer.wk_weights_proj is module
    for ours, before in zip(indexer_inputs(glm5next, indexer), expected, strict=True):
        assert torch.equal(ours.view(torch.uint8), before.view(torch.uint8))
