"""Every model class with an indexer that vLLM imports on a CPU, loaded by its own load_weights, stock and swapped."""

import importlib
from unittest import mock

import pytest
import torch
from vllm import ModelRegistry
from vllm.models.deepseek_v32.amd import rocm
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from engine import harness
from engine.checkpoints import DEEPSEEK, FP8, HY_V4, LAYERS, checkpoint, deepseek, hy_v4, write
from engine.harness import activations, build, like, projections

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
}
RUN_INDEXER = ("deepseek", "glm", "hy-v4-nvidia", "hy-v4-amd")  # the indexers of the others need a GPU


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    """A function that builds the model, the tensors of a BF16 checkpoint, and the layers with an indexer."""
    module, name, draft = MODELS[request.param]
    config, tensors = (HY_V4, hy_v4()) if "hy-v4" in request.param else (DEEPSEEK, deepseek())
    architecture = draft or f"Tiny{name}"
    if not draft:
        config = {**config, "architectures": [architecture]}

    def make(tensors, switch):
        return build(write(tmp_path / "checkpoint", tensors, config), switch, draft=bool(draft))

    with (
        mock.patch.dict(ModelRegistry.models),
        mock.patch.object(rocm, "ROCMAiterMLASparseBackend", CPUMLABackend),
    ):
        ModelRegistry.register_model(architecture, getattr(importlib.import_module(module), name))
        yield make, tensors, [LAYERS] if draft else list(range(LAYERS))


def test_bf16_agrees_with_stock(model, caplog, request):
    make, tensors, layers = model
    stock, swapped = make(tensors, "0"), make(tensors, "1")
    assert not [record for record in caplog.records if "wk_weights_proj" in record.getMessage()]  # as not loaded
    assert list(projections(swapped)) == layers
    harness.assert_neighbors_equal(stock, swapped)
    x, *_ = activations()
    for layer, module in projections(stock).items():
        expected, found = module(x)[0], projections(swapped)[layer](x)[0]
        assert like(found) == like(expected)
        harness.assert_close(found, expected, 2**-7)
    if request.node.callspec.params["model"] in RUN_INDEXER:
        harness.assert_indexer_inputs_agree(stock, swapped)


def test_fp8_stays_fp8(model):
    make, tensors, layers = model
    tensors, truth = checkpoint(FP8, tensors)
    swapped = make(tensors, "1")
    assert list(projections(swapped)) == layers
    assert {module.qweight.dtype for module in projections(swapped).values()} == {torch.float8_e4m3fn}
    harness.assert_outputs(swapped, truth)
