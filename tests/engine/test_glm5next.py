"""GLM-5.3-Flash, whose gate vLLM computes a second time in fp32. Its indexer needs a GPU after the projection."""

import sys
from unittest import mock

import pytest
import torch
from vllm import ModelRegistry
from vllm.config import LoRAConfig
from vllm.lora.layers import LoRAMapping
from vllm.lora.model_manager import LoRAModelManager

from engine import checkpoints
from engine.checkpoints import BF16, FP8, INDEXER, D, H, M, only_projections, write
from engine.harness import Worker, X, assert_close, bits, indexer_inputs


@pytest.fixture
def make(tmp_path):
    """Makes a model of a checkpoint."""
    with mock.patch.dict(ModelRegistry.models):
        from vllm.models.glm5next import Glm5NextForCausalLM

        ModelRegistry.register_model("TinyGlm5Next", Glm5NextForCausalLM)
        config = {**checkpoints.GLM5NEXT, "architectures": ["TinyGlm5Next"]}
        yield lambda tensors, *args, **keywords: Worker(write(tmp_path, tensors, config), *args, **keywords)


def checkpoint(makers):
    return checkpoints.checkpoint(makers, checkpoints.glm5next())


def indexer_of(worker):
    return worker.model.model.layers[1].self_attn.indexer


def test_bf16_agrees_with_stock(make):
    tensors, _ = checkpoint(BF16)
    theirs, ours = (indexer_of(make(tensors, switch)) for switch in ("0", "1"))
    # vLLM packs the weight away on a CPU, before it makes this copy of it.
    theirs._wp_fp32 = tensors[f"{INDEXER.format(1)}weights_proj.weight"].float().T.contiguous()
    expected, found = indexer_inputs(theirs), indexer_inputs(ours)
    assert torch.equal(bits(expected[0]), bits(found[0]))
    assert_close(found[1], expected[1], 2**-7)
    assert found[2].dtype == expected[2].dtype == torch.float32
    assert_close(found[2], expected[2], 2e-6)
    assert ours._wp_fp32 is None


@pytest.mark.parametrize("makers", [BF16, FP8], ids=["bf16", "fp8"])
def test_gate_is_fp32_and_follows_updates(make, makers):
    tensors, truth = checkpoint(makers)
    worker = make(tensors)
    attention = sys.modules[type(indexer_of(worker)).__module__]
    for _ in range(2):
        with mock.patch.object(attention, "_fused_indexer_weight_scale", lambda weights, q_scale, scale: weights):
            gate = indexer_inputs(indexer_of(worker))[2][:, :H]
        assert_close(gate, X.double() @ truth[1][D:].T, 2e-6)
        tensors, truth = checkpoint(makers)
        worker.model.load_weights(only_projections(tensors).items())


def test_lora_leaves_the_projection_alone(make):
    """vLLM refuses adapters of it; if it wrapped the module, it would accept them and the forward would ignore them."""
    model_class = ModelRegistry.models["TinyGlm5Next"].model_cls
    with mock.patch.object(model_class, "packed_modules_mapping", {}, create=True):
        worker = make(checkpoint(BF16)[0], enable_lora=True)
    indexer = indexer_of(worker)
    expected, module = indexer_inputs(indexer), indexer.wk_weights_proj
    with worker.environment():
        lora = LoRAConfig(max_lora_rank=8, lora_dtype=torch.bfloat16)
        manager = LoRAModelManager(worker.model, 4, 128, 128, lora, torch.device("cpu"), worker.config)
        manager.set_adapter_mapping(LoRAMapping((0,) * M, (0,), is_prefill=True))
    assert "wk_weights_proj" not in manager.packed_modules_mapping
    assert indexer.wk_weights_proj is module
    for ours, before in zip(indexer_inputs(indexer), expected, strict=True):
        assert torch.equal(bits(ours), bits(before))
