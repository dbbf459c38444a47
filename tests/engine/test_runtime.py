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

from engine.checkpoints import BF16, FP8, LAYERS, D, H, K, M, checkpoint, only_projections
from engine.harness import Server, X, assert_close, projections
from indexproj.indexer.vllm import method

RANK = 8
pytestmark = pytest.mark.parametrize("makers", [BF16, FP8], ids=["bf16", "fp8"])


def test_torch_compile_sees_updates_without_recompiling(tmp_path, makers):
    """Nor does an update recompile that is only half there, or of one matrix."""
    torch._dynamo.reset()
    server = Server(tmp_path, makers)
    module = projections(server.model)[0]

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def both(x):
        kw, _ = module(2 * x)
        return kw

    def check():
        assert_close(both(X), 2 * X.double() @ server.truth[0].T, 2**-8)

    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        assert torch.equal(both(X), module(2 * X)[0])
        tensors, truth = checkpoint(makers)
        first, *others = sorted(only_projections(tensors).items(), key=lambda item: "weights_proj" in item[0])
        server.update(dict([first]))
        if makers is BF16:
            server.truth[0][:D] = truth[0][:D]
        check()
        server.update(dict(others))
        server.truth = truth
        check()


def test_lora_adapters_of_both_matrices(tmp_path, makers):
    """By vLLM's own manager, from tensors with PEFT's names; and a reload under them."""
    server = Server(tmp_path, makers, enable_lora=True, max_lora_rank=RANK)
    adapter, expected = {}, {}
    for layer, module in projections(server.model).items():
        expected[layer] = module(X)[0].double()
        for matrix, rows in (("wk", slice(0, D)), ("weights_proj", slice(D, D + H))):
            stem = f"base_model.model.model.layers.{layer}.self_attn.indexer.{matrix}"
            a, b = torch.randn(RANK, K).bfloat16(), torch.randn(rows.stop - rows.start, RANK).bfloat16()
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            delta = 2 * (X.double() @ a.double().T) @ b.double().T
            assert delta.abs().max() > 0.1 * expected[layer].abs().max()
            expected[layer][:, rows] += delta
    with server.environment():
        config = LoRAConfig(max_lora_rank=RANK, lora_dtype=torch.bfloat16)
        manager = LoRAModelManager(server.model, 4, 128, 128, config, torch.device("cpu"), server.config)
        helper = PEFTHelper.from_dict({"r": RANK, "lora_alpha": 2 * RANK, "target_modules": ["wk", "weights_proj"]})
        manager.add_adapter(LoRAModel.from_lora_tensors(1, adapter, helper, "cpu", torch.bfloat16))
        manager.activate_adapter(1)
        manager.set_adapter_mapping(LoRAMapping((1,) * M, (1,), is_prefill=True))
        assert len(projections(server.model)) == LAYERS
        for layer, module in projections(server.model).items():
            assert type(module) is MergedColumnParallelLinearWithLoRA
            assert_close(module(X)[0], expected[layer], 2**-6)
    server.reload(only_projections(checkpoint(makers)[0]))  # vLLM's own names have no `base_layer`
    assert server.addresses() == {name.replace("proj.", "proj.base_layer."): p for name, p in server.pointers.items()}


def test_batch_invariance(tmp_path, monkeypatch, caplog, makers):
    """VLLM_BATCH_INVARIANT=1 reaches every launch."""
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with caplog.at_level(logging.INFO, "vllm.indexproj"):
        module = projections(Server(tmp_path, makers).model)[0]
    assert "weights_proj in BF16, batch-invariant" in caplog.text
    with mock.patch.object(method, "project", wraps=method.project) as project:
        both, (k, gate) = module(X)[0], module.quant_method.k_and_gate(module, X)
    assert torch.equal(torch.cat([k, gate.bfloat16()], 1), both)
    assert [call.kwargs["batch_invariant"] for call in project.call_args_list] == [True, True]
