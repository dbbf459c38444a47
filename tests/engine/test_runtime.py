"""What runs around the projection: torch.compile, LoRA adapters, batch invariance."""

import logging
from unittest import mock

import pytest
import torch
from vllm.config import LoRAConfig
from vllm.lora.layers import LoRAMapping, MergedColumnParallelLinearWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

from engine.checkpoints import ENCODINGS, LAYERS, D, H, K, checkpoint, only_projections
from engine.harness import Server, activations, assert_close, environment, projections
from indexproj.indexer.vllm import method

RANK = 8


@pytest.fixture(params=["bf16", "fp8"])
def server(request, tmp_path):
    return Server(tmp_path, ENCODINGS[request.param])


def test_torch_compile_sees_updates_without_recompiling(server):
    """Nor does an update recompile that is only half there, or of one matrix."""
    torch._dynamo.reset()
    module = projections(server.model)[0]

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def k_and_gate(x):
        kw, _ = module(2 * x)
        return kw[:, :D], kw[:, D:]

    x, *_ = activations()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(k_and_gate(x), module(2 * x)[0].split([D, H], 1), strict=True))
        tensors, truth = checkpoint(server.makers)
        first, *others = sorted(only_projections(tensors).items(), key=lambda item: "weights_proj" in item[0])
        server.model.load_weights([first])
        if first[1].dtype == torch.bfloat16:
            server.truth[0][:D] = truth[0][:D]
        assert_close(torch.cat(k_and_gate(x), 1), 2 * x.double() @ server.truth[0].T, 2**-8)
        server.model.load_weights(others)
        assert_close(torch.cat(k_and_gate(x), 1), 2 * x.double() @ truth[0].T, 2**-8)


@pytest.mark.parametrize("encoding", ["bf16", "fp8"])
def test_lora_adapters_of_both_matrices(tmp_path, encoding):
    """By vLLM's own manager, from tensors with PEFT's names; and a reload under them."""
    server = Server(tmp_path, ENCODINGS[encoding], enable_lora=True, max_lora_rank=RANK)
    model, config = server.model, LoRAConfig(max_lora_rank=RANK, lora_dtype=torch.bfloat16)
    x, *_ = activations()
    adapter, expected = {}, {}
    for layer, module in projections(model).items():
        expected[layer] = module(x)[0].double()
        for matrix, rows in (("wk", slice(0, D)), ("weights_proj", slice(D, D + H))):
            stem = f"base_model.model.model.layers.{layer}.self_attn.indexer.{matrix}"
            a, b = torch.randn(RANK, K).bfloat16(), torch.randn(rows.stop - rows.start, RANK).bfloat16()
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            delta = 2 * (x.double() @ a.double().T) @ b.double().T
            assert delta.abs().max() > 0.1 * expected[layer].abs().max()
            expected[layer][:, rows] += delta
    with environment(server.config):
        manager = LoRAModelManager(model, 4, 128, 128, config, torch.device("cpu"), server.config)
        helper = PEFTHelper.from_dict({"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["wk", "weights_proj"]})
        manager.add_adapter(LoRAModel.from_lora_tensors(1, adapter, helper, "cpu", torch.bfloat16))
        manager.activate_adapter(1)
        manager.set_adapter_mapping(LoRAMapping((1,) * len(x), (1,), is_prefill=True))
        assert len(projections(model)) == LAYERS
        for layer, module in projections(model).items():
            assert type(module) is MergedColumnParallelLinearWithLoRA
            assert_close(module(x)[0], expected[layer], 2**-6)
    server.reload(only_projections(checkpoint(server.makers)[0]))  # vLLM's own names have no `base_layer`
    assert server.addresses().keys() == {name.replace("proj.", "proj.base_layer.") for name in server.pointers}
    assert list(server.addresses().values()) == list(server.pointers.values())


@pytest.mark.parametrize("encoding", ["bf16", "fp8"])
@pytest.mark.usefixtures("poison", "exact_dot")
def test_batch_invariance(tmp_path, monkeypatch, caplog, encoding):
    """With VLLM_BATCH_INVARIANT=1, a row has the same bits alone and among others."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with caplog.at_level(logging.INFO, "vllm.indexproj"):
        server = Server(tmp_path, ENCODINGS[encoding])
    assert "weights_proj in BF16, batch-invariant" in caplog.text
    module = projections(server.model)[0]
    x = torch.randn(17, K).bfloat16()
    with mock.patch.object(method, "project", wraps=method.project) as project:
        both, (k, gate) = module(x)[0], module.quant_method.k_and_gate(module, x)
        assert torch.equal(k, both[:, :D])
        assert torch.equal(gate.bfloat16(), both[:, D:])
        for m in (1, 2, 5, 17):
            rows = torch.randperm(17)[:m]
            assert torch.equal(module(x[rows])[0], both[rows])
            assert torch.equal(module.quant_method.k_and_gate(module, x[rows])[1], gate[rows])
    # Rounding to bf16 may hide another order of addition.
    assert all(call.kwargs["batch_invariant"] for call in project.call_args_list)
