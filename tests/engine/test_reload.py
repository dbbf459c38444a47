"""While a model serves: reloads, updates from a trainer, sleep, offloading, torch.compile, LoRA, batch invariance."""

import contextlib
import functools
import logging
from unittest import mock

import pytest
import torch
from vllm.config import LoRAConfig
from vllm.lora.layers import LoRAMapping, MergedColumnParallelLinearWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

from engine.checkpoints import BF16, BOTH_FP8, FP8, FUSED, INDEXER, INT4, NVFP4, D, K, checkpoint, only_projections
from engine.harness import Server, X, assert_close, layerwise, projections
from indexproj.indexer.vllm import method
from indexproj.loading import CheckpointError

LAST = INDEXER.format(1)
WK, SCALE, GATE = (LAST + leaf for leaf in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight"))
NOT_GATE = f"(?!{GATE}$).*"


@pytest.fixture(params=[BF16, FP8], ids=["bf16", "fp8"])
def start(request, tmp_path):
    return functools.partial(Server, tmp_path, request.param)


def reload_by_updates(server, tensors, *patterns, ends=True):
    with server.environment():
        layerwise.initialize_layerwise_reload(server.model)
        server.update(tensors, *patterns)
        if ends:
            layerwise.finalize_layerwise_reload(server.model, server.model_config)


ALL, WK_ROWS, GATE_ROWS = slice(None), slice(0, D), slice(D, None)
WAITS = slice(0)
SAME, NEW = {}, {0: ALL, 1: ALL}
BOTH = ((BF16, BF16), (FP8, FP8))
ALSO_4_BITS = (*BOTH, (NVFP4, NVFP4), (INT4, INT4))
WITH_SCALES = ((FP8, FP8), (BOTH_FP8, BOTH_FP8))
OTHER_LAYOUT = "expected wk in FP8 128x128.* as in the first load.*INDEXPROJ_VLLM=bf16"
MANY = "no more tensors for a complete layer"
# Encodings of server and new checkpoint, what is done with the server and the new tensors, the error, and layer -> rows
# that are new afterwards; all others are as they were.
STEPS = {
    "reload": (ALSO_4_BITS, Server.reload, None, NEW),
    "reload one by one": (ALSO_4_BITS, lambda s, t: reload_by_updates(s, t, *reversed(t)), None, NEW),
    "reload without a tensor": (BOTH, lambda s, t: s.reload({n: t[n] for n in t if n != GATE}), GATE, {0: ALL}),
    "reload without projections": (BOTH, lambda s, t: s.reload(only_projections(t, False)), None, SAME),
    "reload in BF16": ([(FP8, BF16)], Server.reload, OTHER_LAYOUT, SAME),
    "reload in NVFP4": ([(FP8, NVFP4)], Server.reload, OTHER_LAYOUT, SAME),
    "reload after aborted reload": (BOTH, lambda s, t: [reload_by_updates(s, t, ends=False), s.reload(t)], MANY, NEW),
    # without vLLM's reload
    "load without scale": ([(FP8, FP8)], lambda s, t: [s.update(t, WK), s.process()], f"{SCALE}: .*no such", SAME),
    "update one by one": (BOTH, lambda s, t: s.update(t, *reversed(t)), None, NEW),
    "update in two parts": (WITH_SCALES, lambda s, t: s.update(t, NOT_GATE, GATE), None, NEW),
    "update of wk": (BOTH, lambda s, t: s.update(t, LAST + "wk.*"), None, {1: WK_ROWS}),
    "update of weights_proj": (BOTH, lambda s, t: s.update(t, GATE), None, {1: GATE_ROWS}),
    "update without scale": (WITH_SCALES, lambda s, t: s.update(t, WK), None, {1: WAITS}),
    "update without weight": (WITH_SCALES, lambda s, t: s.update(t, SCALE), None, {1: WAITS}),
    "update without a part": ([(BOTH_FP8, BOTH_FP8)], lambda s, t: s.update(t, NOT_GATE), None, {0: ALL, 1: WAITS}),
    "update without zero points": ([(INT4, INT4)], lambda s, t: s.update(t, LAST + "wk.*"), None, {1: WAITS}),
    "update in BF16": ([(FP8, BF16)], lambda s, t: s.update(t, WK), OTHER_LAYOUT, SAME),
    "update twice": (WITH_SCALES, lambda s, t: s.update(t, WK, WK), "one tensor in the role of", SAME),
    # The scale of the first completes the weight of the second, whose own scale is then one too many.
    "update after interrupted update": (
        [(FP8, FP8)], lambda s, t: s.update(dict(sorted(t.items())), SCALE, LAST + "w.*"), MANY, {1: ALL},
    ),
    "update with fewer heads": (BOTH, lambda s, t: s.update({GATE: t[GATE][:8]}), "expected 16 in dimension 0", SAME),
    # vLLM's sparse updates mark unchanged elements NaN.
    "update with NaN": ([(BF16, BF16)], lambda s, t: s.update({WK: t[WK] * torch.nan}), f"{WK}: expected a larg", SAME),
}  # fmt: skip
CASES = [pytest.param(*pair, *rest, id=name) for name, (pairs, *rest) in STEPS.items() for pair in pairs]


@pytest.mark.parametrize(("makers", "sent", "act", "error", "new"), CASES)
def test_weights_arrive(tmp_path, caplog, makers, sent, act, error, new):
    """A layer has its new weights or its old ones, in the same memory; and what comes next is clean."""
    server, (tensors, truth) = Server(tmp_path, makers), checkpoint(sent)
    with pytest.raises(CheckpointError, match=error) if error else contextlib.nullcontext():
        act(server, tensors)
    for layer, rows in new.items():
        server.truth[layer][rows] = truth[layer][rows]
    server.check()
    if not error and new is not NEW:
        assert ("layers 1 keep their old weights" in caplog.text) == (new.get(1) == WAITS)
    if error:
        server.renew(Server.update)
    caplog.clear()
    server.renew()
    assert not [r for r in caplog.records if "Failed to load weights" in r.getMessage() and "Merged" in r.getMessage()]


def test_state_dict_follows_reloads(tmp_path):
    server, states = Server(tmp_path, FP8), []
    for _ in range(2):
        states.append(server.model.state_dict())
        assert_close(states[-1][f"{LAST}wk_weights_proj.weight"], server.truth[1], 2**-8)
        server.renew()


@pytest.mark.parametrize("makers", [BF16, FP8, BOTH_FP8], ids=["bf16", "fp8", "both"])
def test_reload_as_parameters(tmp_path, makers):
    """`is_checkpoint_format=False`: the parameters by their names in the model."""
    server, other = (Server(tmp_path / name, makers) for name in ("server", "other"))
    server.reload({name: p.data for name, p in other.model.named_parameters() if "wk_weights_proj" in name}, False)
    server.truth = other.truth
    server.check()


BF16_SERVERS = {
    "switch": (FP8, {"switch": "bf16"}),
    "first load": (BF16, {}),
    "dummy": (FP8, {"load_format": "dummy"}),  # how RL frameworks start
    # A rank that joins has dummy weights, and gets the tensors of another rank in order.
    "elastic EP": (FP8, {"enable_elastic_ep": True}),
}


@pytest.mark.parametrize(("makers", "arguments"), BF16_SERVERS.values(), ids=BF16_SERVERS)
def test_bf16_server_takes_any_encoding(tmp_path, makers, arguments):
    server = Server(tmp_path, makers, **arguments)
    server.truth = {layer: module.weight.double() for layer, module in projections(server.model).items()}
    server.check()
    for sent in (NVFP4, BF16, FP8, FUSED):
        server.renew(makers=sent, to_bf16=True)
    server.renew(Server.update, FP8, to_bf16=True)


@pytest.mark.parametrize("byte", [0, 0x7F])
def test_reload_after_sleep(start, byte):
    """A reload without the projection keeps it, but refuses to serve memory that no longer holds weights."""
    server = start()

    def sleep():
        for parameter in (p for module in projections(server.model).values() for p in module.parameters()):
            parameter.data.view(torch.uint8).fill_(byte)

    sleep()
    server.renew()
    sleep()
    with pytest.raises(CheckpointError, match=r"layers\.{0-1}\.self_attn\.indexer\.wk_weights_proj"):
        server.reload(only_projections(checkpoint(server.makers)[0], False))


def test_offloaded_weights(tmp_path):
    """vLLM replaces the parameter during a call: the projection reads it there."""
    server = Server(tmp_path, BF16)
    module = projections(server.model)[0]
    found, _ = torch.func.functional_call(module, {"weight": 4 * module.weight}, (X,))
    assert_close(found, 4 * X.double() @ server.truth[0].T, 2**-8)


def test_torch_compile_sees_updates_without_recompiling(start):
    """Nor does an update recompile that is only half there, or of one matrix."""
    torch._dynamo.reset()
    server = start()
    module = projections(server.model)[0]

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def doubled(x):
        return 2 * module(x)[0]

    tensors, first = checkpoint(server.makers)[0], INDEXER.format(0) + "wk.weight"
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for names in ("", first, f"(?!{first}$).*"):
            server.update(tensors, names)
            assert torch.equal(doubled(X), 2 * module(X)[0])


def test_lora_adapters_of_both_matrices(start):
    """By vLLM's own manager, from tensors with PEFT's names; and a reload under them."""
    server = start(enable_lora=True, max_lora_rank=8)
    adapter, expected = {}, {}
    for layer, module in projections(server.model).items():
        expected[layer] = module(X)[0].double()
        for matrix, rows in ("wk", WK_ROWS), ("weights_proj", GATE_ROWS):
            stem = f"base_model.model.model.layers.{layer}.self_attn.indexer.{matrix}"
            a, b = torch.randn(8, K).bfloat16(), torch.randn(expected[layer][0, rows].numel(), 8).bfloat16()
            adapter |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}
            delta = 2 * (X.double() @ a.double().T) @ b.double().T
            assert delta.abs().max() > 0.1 * expected[layer].abs().max()
            expected[layer][:, rows] += delta
    with server.environment():
        config = LoRAConfig(max_lora_rank=8, lora_dtype=torch.bfloat16)
        manager = LoRAModelManager(server.model, 4, 128, 128, config, torch.device("cpu"), server.config)
        helper = PEFTHelper.from_dict({"r": 8, "lora_alpha": 2 * 8, "target_modules": ["wk", "weights_proj"]})
        manager.add_adapter(LoRAModel.from_lora_tensors(1, adapter, helper, "cpu", torch.bfloat16))
        manager.activate_adapter(1)
        manager.set_adapter_mapping(LoRAMapping((1,) * len(X), (1,), is_prefill=True))
        for layer, values in expected.items():
            module = projections(server.model)[layer]
            assert type(module) is MergedColumnParallelLinearWithLoRA
            assert_close(module(X)[0], values, 2**-6)
    server.reload(only_projections(checkpoint(server.makers)[0]))  # vLLM's own names have no `base_layer`
    assert server.addresses() == {name.replace("proj.", "proj.base_layer."): p for name, p in server.pointers.items()}


def test_batch_invariance(start, monkeypatch, caplog):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with caplog.at_level(logging.INFO, "vllm.indexproj"):
        module = projections(start().model)[0]
    assert "weights_proj in BF16, batch-invariant" in caplog.text
    with mock.patch.object(method, "project", wraps=method.project) as project:
        both, (k, gate) = module(X)[0], module.quant_method.k_and_gate(module, X)
    assert torch.equal(torch.cat([k, gate.bfloat16()], 1), both)
    assert [call.kwargs["batch_invariant"] for call in project.call_args_list] == [True, True]
