"""GLM-5.3-Flash, whose gate vLLM computes a second time in fp32.

Its query is rotated and quantized by a Triton kernel, which is replaced here: it does not affect the projection.
"""

import sys
from unittest import mock

import pytest
import torch
from vllm import ModelRegistry
from vllm.config import LoRAConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager

from engine import checkpoints, harness
from engine.checkpoints import ENCODINGS, GLM5NEXT, INDEXER, D, H, M, only_projections, write
from engine.harness import activations, assert_close, bits, build

CONFIG = {**GLM5NEXT, "architectures": ["TinyGlm5Next"]}


@pytest.fixture(scope="module", autouse=True)
def glm5next():
    """vLLM's module with the indexer."""
    with mock.patch.dict(ModelRegistry.models):
        from vllm.models.glm5next import Glm5NextForCausalLM
        from vllm.models.glm5next.common import attention

        ModelRegistry.register_model("TinyGlm5Next", Glm5NextForCausalLM)
        yield attention


def checkpoint(encoding):
    return checkpoints.checkpoint(ENCODINGS[encoding], checkpoints.glm5next())


def indexer_inputs(indexer):
    def quantize(q):
        return harness.per_token_group_quant_fp8(q, 128)

    return harness.indexer_inputs(indexer, None, quantizer=("fwht128_quant_fp8", quantize))


def test_bf16_agrees_with_stock(tmp_path):
    tensors, _ = checkpoint("bf16")
    stock, swapped = (build(write(tmp_path, tensors, CONFIG), switch) for switch in ("0", "1"))
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
    for _ in range(2):
        with mock.patch.object(glm5next, "_fused_indexer_weight_scale", lambda weights, q_scale, scale: weights):
            gate = indexer_inputs(model.model.layers[1].self_attn.indexer)[2][:, :H]
        assert_close(gate, activations()[0].double() @ truth[1][D:].T, 2e-6)
        tensors, truth = checkpoint(encoding)
        model.load_weights(only_projections(tensors).items())


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
