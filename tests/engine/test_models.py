"""Every model class with an indexer that vLLM imports on a CPU, loaded by its own load_weights, stock and swapped."""

import importlib
from unittest import mock

import pytest
import torch
from vllm import ModelRegistry
from vllm.models.deepseek_v32.amd import rocm
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from engine.harness import (
    DEEPSEEK,
    HY_V4,
    LAYERS,
    activations,
    build,
    deepseek,
    hy_v4,
    indexer_inputs,
    is_projection,
    like,
    projections,
    with_projection,
    write,
)
from engine.kinds import exports_of
from exports import EXPORTS

MTP = {"method": "mtp", "num_speculative_tokens": 1}
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


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    """What builds the model from some tensors, and these tensors."""
    module, name, draft = MODELS[request.param]
    config, tensors = (HY_V4, hy_v4()) if "hy-v4" in request.param else (DEEPSEEK, deepseek())
    architecture = draft or f"Tiny{name}"
    if not draft:
        config = {**config, "architectures": [architecture]}

    def make(tensors, switch, directory="checkpoint", **arguments):
        path = write(tmp_path / directory, tensors, {**config, **arguments.pop("config", {})})
        return build(path, switch, draft=bool(draft), **({"speculative_config": MTP} if draft else {}), **arguments)

    with (
        mock.patch.dict(ModelRegistry.models),
        mock.patch.object(rocm, "ROCMAiterMLASparseBackend", CPUMLABackend),
    ):
        ModelRegistry.register_model(architecture, getattr(importlib.import_module(module), name))
        yield make, tensors, [LAYERS] if draft else list(range(LAYERS))


def test_bf16_agrees_with_vllm(model, caplog):
    make, tensors, layers = model
    stock, swapped = make(tensors, "0"), make(tensors, "1")
    assert not [record for record in caplog.records if "wk_weights_proj" in record.getMessage()]  # as not loaded
    assert list(projections(swapped)) == layers
    theirs, ours = (dict(each.named_parameters()) for each in (stock, swapped))
    assert [name for name in theirs if not is_projection(name)] == [name for name in ours if not is_projection(name)]
    for name, parameter in theirs.items():
        if not is_projection(name):
            assert torch.equal(parameter, ours[name]), name
    x, *_ = activations()
    for layer, module in projections(stock).items():
        expected, found = module(x)[0], projections(swapped)[layer](x)[0]
        assert like(found) == like(expected)
        assert (found.double() - expected.double()).abs().max() <= 2**-7 * expected.double().abs().max()


def test_fp8_stays_fp8(model):
    make, tensors, layers = model
    truth = {}
    torch.manual_seed(1)
    swapped = make(
        with_projection(tensors, exports_of({"wk": EXPORTS["fp8_block"], "weights_proj": EXPORTS["bf16"]}, truth)), "1"
    )
    x, *_ = activations()
    assert list(projections(swapped)) == layers
    for layer, module in projections(swapped).items():
        assert module.qweight.dtype == torch.float8_e4m3fn
        exact = x.double() @ truth[layer].T
        assert (module(x)[0].double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("model", ["hy-v4-nvidia", "hy-v4-amd", "glm"], indirect=True)
def test_what_the_indexer_hands_on_agrees(model):
    make, tensors, _ = model
    inputs = activations()
    stock, swapped = (indexer_inputs(make(tensors, switch).model.layers[0].self_attn, *inputs) for switch in ("0", "1"))
    assert torch.equal(stock[0].view(torch.uint8), swapped[0].view(torch.uint8))
    for ours, theirs in zip(swapped[1:], stock[1:], strict=True):
        assert (ours.double() - theirs.double()).abs().max() <= 2**-7 * theirs.double().abs().max()
