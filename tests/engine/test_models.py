"""Every model class with an indexer that vLLM imports on a CPU, loaded by its own load_weights, stock and swapped."""

import importlib
import sys
from unittest import mock

import pytest
import torch
from vllm import ModelRegistry
from vllm.model_executor.layers.quantization.fp8 import Fp8LinearMethod
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from engine import checkpoints, harness
from engine.checkpoints import BF16, BOTH_FP8, FP8, LAYERS, D, H, K, checkpoint, only_projections, write
from engine.harness import Worker, X, assert_close, bits, indexer_inputs, like, projections

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


def test_bf16_agrees_with_stock(model, caplog):
    name, make, tensors, layers = model
    stock, swapped = make(tensors, "0").model, make(tensors).model
    assert not [record for record in caplog.records if "wk_weights_proj" in record.getMessage()]  # as not loaded
    assert list(projections(swapped)) == layers
    harness.assert_neighbors_equal(stock, swapped)
    for layer, module in projections(stock).items():
        expected, found = module(X)[0], projections(swapped)[layer](X)[0]
        assert like(found) == like(expected)
        assert_close(found, expected, 2**-7)
    if name in RUN_INDEXER:
        harness.assert_indexer_inputs_agree(stock, swapped)


def test_fp8_stays_fp8(model):
    name, make, tensors, layers = model
    tensors, truth = checkpoint(BOTH_FP8 if name == "dots3" else FP8, tensors)
    swapped = make(tensors).model
    assert list(projections(swapped)) == layers
    assert {module.qweight.dtype for module in projections(swapped).values()} == {torch.float8_e4m3fn}
    harness.assert_outputs(swapped, truth)


@pytest.mark.parametrize("draft", [False, True], ids=["main", "mtp"])
@pytest.mark.parametrize("published", ["deepseek-v3.2", "glm-5.2-fp8"])
def test_fp8_throughout_agrees_with_stock(tmp_path, published, draft):
    """As published: the neighbors are in FP8 too. k and weights differ by vLLM's rounding of wk to bf16."""
    path, truth = checkpoints.fp8_checkpoint(tmp_path, published)
    stock, swapped = (Worker(path, switch, draft=draft).model for switch in ("0", "1"))
    harness.assert_neighbors_equal(stock, swapped)
    neighbors = [type(module.quant_method) for name, module in swapped.named_modules() if name.endswith("wq_b")]
    assert neighbors == len(projections(swapped)) * [Fp8LinearMethod]
    assert list(projections(swapped)) == ([LAYERS] if draft else list(range(LAYERS)))
    harness.assert_outputs(swapped, truth)
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
    theirs, ours = (each.model.layers[1].self_attn.indexer for each in (stock, swapped))
    theirs._wp_fp32 = torch.zeros(K, H)  # or it would be copied here, but on a CPU vLLM has packed the weight away
    expected, found = indexer_inputs(theirs), indexer_inputs(ours)
    assert torch.equal(bits(expected[0]), bits(found[0]))
    assert_close(found[1], expected[1], 2**-7)
    assert like(found[2]) == like(expected[2])
    attention = sys.modules[type(ours).__module__]
    for _ in range(2):
        with mock.patch.object(attention, "_fused_indexer_weight_scale", lambda weights, q_scale, scale: weights):
            gate = indexer_inputs(ours)[2][:, :H]
        assert_close(gate, X.double() @ truth[1][D:].T, 2e-6)
        tensors, truth = checkpoint(makers, bf16)
        swapped.load_weights(only_projections(tensors).items())


@GLM5NEXT
def test_glm5next_lora_leaves_the_projection_alone(model):
    """vLLM refuses adapters of it. With a mapping, it would wrap the module, whose adapters the forward ignores."""
    _, make, tensors, _ = model
    model_class, mapped = sys.modules["vllm.models.glm5next"].Glm5NextForCausalLM, {"qkv_proj": ["q_proj"]}
    with mock.patch.object(model_class, "packed_modules_mapping", mapped, create=True):
        assert make(tensors, enable_lora=True).model.packed_modules_mapping == mapped
