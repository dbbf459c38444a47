"""What runs around the projection once it is there: torch.compile, LoRA adapters."""

import logging
from unittest import mock

import pytest
import torch
from vllm.config import LoRAConfig
from vllm.lora.layers import LoRAMapping, MergedColumnParallelLinearWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

from engine.harness import LAYERS, D, H, K, activations, environment, is_projection, like, projections
from engine.kinds import BF16, FP8
from engine.server import Server, checkpoint
from indexproj.indexer.vllm import model as vllm_model

RANK = 8


@pytest.fixture(params=[BF16, FP8], ids=["bf16", "fp8"])
def server(request, tmp_path):
    server = Server(tmp_path, request.param)
    server.makers = request.param
    return server


def test_compiled_whole_and_reloaded(server):
    """Compiled code keeps on to the memory, and sees what a reload writes there; nothing is compiled again."""
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
        server.model.load_weights((name, tensor) for name, tensor in tensors.items() if is_projection(name))
        k, gate = k_and_gate(x)
        exact = 2 * x.double() @ truth[0].T
        assert (torch.cat([k, gate], 1).double() - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("m", [0, 1, 64, 65])
def test_any_number_of_rows(server, m):
    module = projections(server.model)[0]
    assert like(module(torch.ones(m, K).bfloat16())[0]) == (torch.bfloat16, (m, D + H), (D + H, 1))


def test_lora_adapters_of_both_matrices(server):
    """By vLLM's own manager, from tensors as PEFT names them."""
    model = server.model
    adapter = {}
    for layer in range(LAYERS):
        for matrix, rows in (("wk", D), ("weights_proj", H)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.indexer.{matrix}"
            adapter[f"{stem}.lora_A.weight"] = torch.randn(RANK, K).bfloat16()
            adapter[f"{stem}.lora_B.weight"] = torch.randn(rows, RANK).bfloat16()
    before = {layer: module(activations()[0])[0] for layer, module in projections(model).items()}
    config = LoRAConfig(max_lora_rank=RANK, lora_dtype=torch.bfloat16)
    with environment(server.config):
        manager = LoRAModelManager(model, 4, 128, 128, config, torch.device("cpu"), server.config)
        helper = PEFTHelper.from_dict({"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["wk", "weights_proj"]})
        copies = {name: tensor.clone() for name, tensor in adapter.items()}  # which are scaled in place
        manager.add_adapter(LoRAModel.from_lora_tensors(1, copies, helper, "cpu", torch.bfloat16))
        manager.activate_adapter(1)
        x, *_ = activations()
        manager.set_adapter_mapping(LoRAMapping((1,) * len(x), (1,), is_prefill=True))
        for layer, module in projections(model).items():
            assert type(module) is MergedColumnParallelLinearWithLoRA
            stem = f"base_model.model.model.layers.{layer}.self_attn.indexer"
            delta = [
                2
                * (x.double() @ adapter[f"{stem}.{matrix}.lora_A.weight"].double().T)
                @ adapter[f"{stem}.{matrix}.lora_B.weight"].double().T
                for matrix in ("wk", "weights_proj")
            ]
            exact = before[layer].double() + torch.cat(delta, 1)
            assert torch.cat(delta, 1).abs().max() > 0.1 * before[layer].abs().max()
            assert (module(x)[0].double() - exact).abs().max() <= 2**-6 * exact.abs().max()
    tensors, _ = checkpoint(server.makers)
    server.reload({name: tensor for name, tensor in tensors.items() if is_projection(name)})  # vLLM's own has no names
    assert server.addresses().keys() == {name.replace("proj.", "proj.base_layer.") for name in server.pointers}
    assert list(server.addresses().values()) == list(server.pointers.values())


@pytest.mark.parametrize("makers", [BF16, FP8], ids=["bf16", "fp8"])
@pytest.mark.usefixtures("poison", "exact_dot")
def test_batch_invariance(tmp_path, monkeypatch, caplog, makers):
    """With vLLM's variable, a row has the same bits alone and among others."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with caplog.at_level(logging.INFO, "vllm.indexproj"):
        server = Server(tmp_path, makers)
    assert "weights_proj in BF16, batch-invariant" in caplog.text
    module = projections(server.model)[0]
    x = torch.randn(17, K).bfloat16()
    with mock.patch.object(vllm_model, "project", wraps=vllm_model.project) as project:
        both, (k, gate) = module(x)[0], module.quant_method.k_and_gate(module, x)
        assert torch.equal(k, both[:, :D])
        assert torch.equal(gate.bfloat16(), both[:, D:])
        for m in (1, 2, 5, 17):
            rows = torch.randperm(17)[:m]
            assert torch.equal(module(x[rows])[0], both[rows])
            assert torch.equal(module.quant_method.k_and_gate(module, x[rows])[1], gate[rows])
    # Rounding to bf16 may hide another order of addition.
    assert all(call.kwargs["batch_invariant"] for call in project.call_args_list)
