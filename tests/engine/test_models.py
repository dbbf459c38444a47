"""Every model class with an indexer that vLLM imports on a CPU, loaded by its own load_weights, stock and swapped."""

import importlib
from unittest import mock

import pytest
import torch
from vllm import ModelRegistry
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from engine import checkpoints, harness
from engine.checkpoints import LAYERS, checkpoint, pair, write
from engine.harness import activations, engine_config, like, load_model, projections

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
    """A function that builds the model, the tensors of a BF16 checkpoint, and the layers with an indexer."""
    module, name, draft = MODELS[request.param]
    config, tensors = CHECKPOINTS.get(request.param.partition("-")[0], (checkpoints.DEEPSEEK, checkpoints.deepseek))
    tensors = tensors()
    if request.param == "glm5next-mtp":
        del tensors[f"model.layers.{LAYERS}.shared_head.head.weight"]
    architecture = draft or f"Tiny{name}"
    config = config if draft else {**config, "architectures": [architecture]}
    (tmp_path / "added_tokens.json").write_text('{"<|imgpad|>": 100}')  # dots3-note reads it

    def make(tensors, switch):
        path = write(tmp_path, tensors, config)
        config_of = engine_config(path, **({"speculative_config": harness.MTP} if draft else {}))
        if request.param == "glm5next-mtp":  # vLLM makes drafts of the multimodal model's config only
            settings = {"draft_model_config": config_of.model_config, "enable_adaptive_verification": False}
            config_of.speculative_config = mock.MagicMock(**settings)
        return load_model(config_of, switch, draft=bool(draft))

    with (
        mock.patch.dict(ModelRegistry.models),
        mock.patch("vllm.models.deepseek_v32.amd.rocm.ROCMAiterMLASparseBackend", CPUMLABackend),
        mock.patch("vllm.models.dots3_note.nvidia.model.Dots3NotePaddedSparseBackend", CPUMLABackend),
    ):
        ModelRegistry.register_model(architecture, getattr(importlib.import_module(module), name))
        yield make, tensors, [LAYERS] if "mtp" in request.param else list(range(LAYERS))


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


def test_fp8_stays_fp8(model, request):
    make, tensors, layers = model
    is_dots3 = request.node.callspec.params["model"] == "dots3"  # its weights_proj is in FP8 too
    tensors, truth = checkpoint(pair("fp8_block", "fp8_block" if is_dots3 else "bf16"), tensors)
    swapped = make(tensors, "1")
    assert list(projections(swapped)) == layers
    assert {module.qweight.dtype for module in projections(swapped).values()} == {torch.float8_e4m3fn}
    harness.assert_outputs(swapped, truth)
