"""While a model serves: reloads, updates from a trainer, sleep, offloading, torch.compile, LoRA, batch invariance."""

import contextlib
import logging
from unittest import mock

import pytest
import torch
from vllm.config import LoRAConfig
from vllm.lora.layers import LoRAMapping, MergedColumnParallelLinearWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper

from engine.checkpoints import BF16, BOTH_FP8, FP8, FUSED, INDEXER, INT4, NVFP4, D, H, K, checkpoint, only_projections
from engine.harness import Server, X, assert_close, assert_outputs, layerwise, projections
from indexproj.indexer.vllm import method
from indexproj.loading import CheckpointError

LAST = INDEXER.format(1)
WK, SCALE, GATE = (LAST + leaf for leaf in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight"))
ENCODINGS = pytest.mark.parametrize("makers", [BF16, FP8], ids=["bf16", "fp8"])


@pytest.fixture(params=[BF16, FP8], ids=["bf16", "fp8"])
def server(request, tmp_path):
    return Server(tmp_path, request.param)


def part(tensors, prefix):
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def without_gate(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != GATE}


def one_by_one(tensors):
    return [{name: tensors[name]} for name in reversed(tensors)]


def reload_one_by_one(server, tensors):
    with server.environment():
        layerwise.initialize_layerwise_reload(server.model)
        server.update(*one_by_one(tensors))
        layerwise.finalize_layerwise_reload(server.model, server.model_config)


def step(server, truth, act, error, new):
    """new: layer -> rows that have values of `truth` afterwards; all others are as they were."""
    with pytest.raises(CheckpointError, match=error) if error else contextlib.nullcontext():
        act()
    for layer, rows in new.items():
        server.truth[layer][rows] = truth[layer][rows]
    server.check()


ALL, WK_ROWS, GATE_ROWS = slice(None), slice(0, D), slice(D, None)
SAME, NEW, WAITS = {}, {0: ALL, 1: ALL}, {}
BOTH = ((BF16, BF16), (FP8, FP8))
WITH_SCALES = ((FP8, FP8), (BOTH_FP8, BOTH_FP8))
OTHER_LAYOUT = "expected wk in FP8 128x128.* as in the first load.*INDEXPROJ_VLLM=bf16"
# Encodings of server and new checkpoint, what is done with the server and the new tensors, the error, and what is new.
STEPS = {
    "reload": ((*BOTH, (NVFP4, NVFP4), (INT4, INT4)), lambda s, t: s.reload(t), None, NEW),
    "reload one by one": (BOTH, reload_one_by_one, None, NEW),
    "reload without a tensor": (BOTH, lambda s, t: s.reload(without_gate(t)), GATE.replace(".", r"\."), {0: ALL}),
    "reload without projections": (BOTH, lambda s, t: s.reload(only_projections(t, False)), None, SAME),
    "reload in BF16": ([(FP8, BF16)], lambda s, t: s.reload(t), OTHER_LAYOUT, SAME),
    "reload in NVFP4": ([(FP8, NVFP4)], lambda s, t: s.reload(t), OTHER_LAYOUT, SAME),
    "update one by one": (BOTH, lambda s, t: s.update(*one_by_one(t)), None, NEW),
    "update of wk": (BOTH, lambda s, t: s.update(part(t, LAST + "wk")), None, {1: WK_ROWS}),
    "update of weights_proj": (BOTH, lambda s, t: s.update({GATE: t[GATE]}), None, {1: GATE_ROWS}),
    "update without scale": (WITH_SCALES, lambda s, t: s.update({WK: t[WK]}), None, WAITS),
    "update without weight": (WITH_SCALES, lambda s, t: s.update({SCALE: t[SCALE]}), None, WAITS),
    "update without zero points": ([(INT4, INT4)], lambda s, t: s.update(part(t, LAST + "wk")), None, WAITS),
    "update in BF16": ([(FP8, BF16)], lambda s, t: s.update({WK: t[WK]}), OTHER_LAYOUT, SAME),
    "update twice": (WITH_SCALES, lambda s, t: s.update(*2 * [{WK: t[WK]}]), "one tensor in the role of", SAME),
    "update with fewer heads": (BOTH, lambda s, t: s.update({GATE: t[GATE][:8]}), "expected 16 in dimension 0", SAME),
    # vLLM's sparse updates mark unchanged elements NaN.
    "update with NaN": ([(BF16, BF16)], lambda s, t: s.update({WK: t[WK] * torch.nan}), f"{WK}: expected a larg", SAME),
}
CASES = [pytest.param(*pair, *rest, id=name) for name, (pairs, *rest) in STEPS.items() for pair in pairs]


@pytest.mark.parametrize(("makers", "sent", "act", "error", "new"), CASES)
def test_weights_arrive(tmp_path, caplog, makers, sent, act, error, new):
    """A layer has its new weights or its old ones, in the same memory; and the next reload is clean."""
    server, (tensors, truth) = Server(tmp_path, makers), checkpoint(sent)
    step(server, truth, lambda: act(server, tensors), error, new)
    if not error and new is not NEW:
        assert ("layers 1 keep their old weights" in caplog.text) == (new is WAITS)
    caplog.clear()
    server.reload_and_check()
    assert not [r for r in caplog.records if "Failed to load weights" in r.getMessage() and "Merged" in r.getMessage()]


def test_update_with_parts_of_both_matrices_waits(tmp_path):
    server, (tensors, truth) = Server(tmp_path, BOTH_FP8), checkpoint(BOTH_FP8)
    step(server, truth, lambda: server.update(without_gate(tensors)), None, {0: ALL})
    step(server, truth, lambda: server.update({GATE: tensors[GATE]}), None, {1: ALL})


def test_update_after_interrupted_update_is_refused(tmp_path):
    """The scale of an interrupted update completes the weight of the next one, whose own scale is then one too many."""
    server, (tensors, truth) = Server(tmp_path, FP8), checkpoint(FP8)
    tensors = {name: tensors[name] for name in (GATE, WK, SCALE)}
    server.update({SCALE: tensors[SCALE]})
    step(server, truth, lambda: server.update(tensors), "no more tensors for a complete layer", {1: ALL})
    step(server, truth, lambda: server.update(tensors), None, {1: ALL})


def test_reload_after_aborted_reload(server):
    """An error, as the tensors of both might meet; and then a clean one."""
    tensors, _ = checkpoint(server.makers)
    with server.environment():
        layerwise.initialize_layerwise_reload(server.model)
        server.update(tensors)  # and nothing ends this reload
    with pytest.raises(CheckpointError, match="no more tensors for a complete layer"):
        server.reload(tensors)
    server.reload_and_check()


def test_state_dict_follows_reloads(tmp_path):
    """Though an earlier one is still alive."""
    server, states = Server(tmp_path, FP8), []
    for _ in range(2):
        states.append(server.model.state_dict())
        assert_close(states[-1][f"{LAST}wk_weights_proj.weight"], server.truth[1], 2**-8)
        server.reload_and_check()


@pytest.mark.parametrize("makers", [BF16, FP8, BOTH_FP8], ids=["bf16", "fp8", "both"])
def test_reload_as_parameters(tmp_path, makers):
    """`is_checkpoint_format=False`: the parameters by their names in the model."""
    server, other = (Server(tmp_path / name, makers) for name in ("server", "other"))
    server.reload({name: p.data for name, p in other.model.named_parameters() if "wk_weights_proj" in name}, False)
    server.truth = other.truth
    server.check()


def check_rounded(server, act, makers):
    tensors, truth = checkpoint(makers)
    act(server, tensors)
    server.truth = {layer: values.bfloat16().double() for layer, values in truth.items()}
    server.check()


@pytest.mark.parametrize(("switch", "first"), [("bf16", FP8), ("1", BF16)], ids=["switch", "first load"])
def test_bf16_server_takes_any_encoding(tmp_path, switch, first):
    server = Server(tmp_path, first, switch)
    assert projections(server.model)[0].weight.dtype == torch.bfloat16
    for makers in (NVFP4, BF16, FP8, FUSED):
        check_rounded(server, Server.reload, makers)


def test_dummy_weights_then_update(tmp_path):
    """How RL frameworks start: no checkpoint has set an encoding, so weights are decoded to bf16."""
    server = Server(tmp_path, FP8, load_format="dummy")
    server.truth = {layer: module.weight.double() for layer, module in projections(server.model).items()}
    assert all(weight.abs().max() > 0 for weight in server.truth.values())
    server.check()
    for act in (Server.reload, Server.update):
        check_rounded(server, act, FP8)


@pytest.mark.parametrize("byte", [0, 0x7F])
def test_reload_after_sleep(server, byte):
    """A reload without the projection keeps it, but refuses to serve memory that no longer holds weights."""

    def sleep():
        for parameter in (p for module in projections(server.model).values() for p in module.parameters()):
            parameter.data.view(torch.uint8).fill_(byte)

    sleep()
    with pytest.raises(CheckpointError, match=r"layers\.{0-1}\.self_attn\.indexer\.wk_weights_proj"):
        server.reload(only_projections(checkpoint(server.makers)[0], False))
    server.reload_and_check()
    sleep()
    server.reload_and_check()


def test_offloaded_weights(tmp_path):
    """The parameter moves to other memory, or vLLM replaces it during a call: the projection reads it there."""
    server = Server(tmp_path, BF16)
    module = projections(server.model)[0]
    found, _ = torch.func.functional_call(module, {"weight": 4 * module.weight}, (X,))
    assert_close(found, 4 * X.double() @ server.truth[0].T, 2**-8)
    for module in projections(server.model).values():
        module.weight.data = 2 * module.weight.data  # the old memory keeps the old values
    assert_outputs(server.model, {layer: 2 * values for layer, values in server.truth.items()})


def test_torch_compile_sees_updates_without_recompiling(server):
    """Nor does an update recompile that is only half there, or of one matrix."""
    torch._dynamo.reset()
    module = projections(server.model)[0]

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def both(x):
        kw, _ = module(2 * x)
        return kw

    def check():
        assert_close(both(X), 2 * X.double() @ server.truth[0].T, 2**-8)

    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        assert torch.equal(both(X), module(2 * X)[0])
        tensors, truth = checkpoint(server.makers)
        first, *others = sorted(only_projections(tensors).items(), key=lambda item: "weights_proj" in item[0])
        server.update(dict([first]))
        if server.makers is BF16:
            server.truth[0][:D] = truth[0][:D]
        check()
        server.update(dict(others))
        server.truth = truth
        check()


@ENCODINGS
def test_lora_adapters_of_both_matrices(tmp_path, makers):
    """By vLLM's own manager, from tensors with PEFT's names; and a reload under them."""
    server = Server(tmp_path, makers, enable_lora=True, max_lora_rank=8)
    adapter, expected = {}, {}
    for layer, module in projections(server.model).items():
        expected[layer] = module(X)[0].double()
        for matrix, rows in (("wk", slice(0, D)), ("weights_proj", slice(D, D + H))):
            stem = f"base_model.model.model.layers.{layer}.self_attn.indexer.{matrix}"
            a, b = torch.randn(8, K).bfloat16(), torch.randn(rows.stop - rows.start, 8).bfloat16()
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
        assert projections(server.model).keys() == expected.keys()
        for layer, module in projections(server.model).items():
            assert type(module) is MergedColumnParallelLinearWithLoRA
            assert_close(module(X)[0], expected[layer], 2**-6)
    server.reload(only_projections(checkpoint(makers)[0]))  # vLLM's own names have no `base_layer`
    assert server.addresses() == {name.replace("proj.", "proj.base_layer."): p for name, p in server.pointers.items()}


@ENCODINGS
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
