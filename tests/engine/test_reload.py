"""What happens to weights while a model serves: reloads, updates from a trainer, sleep, offloading."""

import pytest
import torch
from vllm.model_executor.model_loader.reload import layerwise

from engine import checkpoints
from engine.checkpoints import BF16, ENCODINGS, FP8, FUSED, INDEXER, D, K, checkpoint, only_projections, pair
from engine.harness import Server, activations, assert_close, assert_outputs, environment, plugin, projections
from indexproj.loading import CheckpointError

LAST_WK, LAST_SCALE, LAST_GATE = (
    INDEXER.format(1) + leaf for leaf in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight")
)


@pytest.fixture(params=["bf16", "fp8"])
def server(request, tmp_path):
    return Server(tmp_path, ENCODINGS[request.param])


def reload_and_check(server, makers=None):
    tensors, truth = checkpoint(makers or server.makers)
    server.reload(tensors)
    server.check(truth)


@pytest.mark.parametrize("server", ["bf16", "fp8", "nvfp4", "int4"], indirect=True)
def test_reload_twice(server, caplog):
    for _ in range(2):
        reload_and_check(server)
    assert not [r for r in caplog.records if "Failed to load weights" in r.getMessage() and "Merged" in r.getMessage()]


def test_state_dict_follows_reloads(tmp_path):
    """Though an earlier one is still alive."""
    server, states = Server(tmp_path, FP8), []
    for _ in range(2):
        states.append(server.model.state_dict())
        assert_close(states[-1][f"{INDEXER.format(1)}wk_weights_proj.weight"], server.truth[1], 2**-8)
        tensors, server.truth = checkpoint(FP8)
        server.reload(tensors)


def test_reload_with_missing_tensor_keeps_old_weights(server):
    """Only the incomplete layer keeps them. The next reload is clean."""
    tensors, truth = checkpoint(server.makers)
    del tensors[LAST_GATE]
    with pytest.raises(CheckpointError, match=LAST_GATE.replace(".", r"\.")):
        server.reload(tensors)
    server.check({0: truth[0], 1: server.truth[1]})
    reload_and_check(server)


def test_reload_interrupted(server):
    """One layer was complete and another was not: neither affects the next reload."""
    tensors, _ = checkpoint(server.makers)
    del tensors[LAST_GATE]

    class Interrupted(dict):
        def items(self):
            yield from tensors.items()
            raise ConnectionError

    with pytest.raises(ConnectionError):
        server.reload(Interrupted())
    reload_and_check(server)


def test_reload_one_tensor_per_call(server):
    tensors, truth = checkpoint(server.makers)
    with plugin("1"), environment(server.config):
        layerwise.initialize_layerwise_reload(server.model)
        for item in reversed(tensors.items()):
            server.model.load_weights([item])
        layerwise.finalize_layerwise_reload(server.model, server.config.model_config)
    server.check(truth)


def test_reload_after_aborted_reload(server):
    """An error, as the tensors of both might meet; and then a clean one."""
    tensors, _ = checkpoint(server.makers)
    with plugin("1"), environment(server.config):
        layerwise.initialize_layerwise_reload(server.model)
        server.model.load_weights(tensors.items())  # and nothing ends this reload
    with pytest.raises(CheckpointError, match="no more tensors for a complete layer"):
        server.reload(tensors)
    reload_and_check(server)


def test_reload_without_projection_keeps_it(server):
    server.reload(checkpoints.without_projections(checkpoint(server.makers)[0]))
    server.check(server.truth)


def test_update_one_tensor_per_call(server):
    """As trainers send them: load_weights alone, with nothing before or after it."""
    tensors, truth = checkpoint(server.makers)
    for item in reversed(only_projections(tensors).items()):
        server.model.load_weights([item])
    server.check(truth)
    reload_and_check(server)


def test_update_after_interrupted_update_is_refused(tmp_path):
    """The scale of an interrupted update completes the weight of the next one, whose own scale is then one too many."""
    server = Server(tmp_path, FP8)
    server.model.load_weights([(LAST_SCALE, checkpoint(FP8)[0][LAST_SCALE])])
    tensors, truth = checkpoint(FP8)
    items = [(name, tensors[name]) for name in (LAST_GATE, LAST_WK, LAST_SCALE)]
    with pytest.raises(CheckpointError, match="no more tensors for a complete layer"):
        server.model.load_weights(items)
    server.model.load_weights(items)
    server.check({0: server.truth[0], 1: truth[1]})


def test_load_weights_returns_only_loaded_names(server):
    """vLLM warns of the others."""
    tensors = only_projections(checkpoint(server.makers)[0])
    loaded = server.model.load_weights((name, tensor) for name, tensor in tensors.items() if ".layers.1." in name)
    assert loaded == {name for name in server.pointers if ".layers.1." in name}


def last_wk(makers):
    return LAST_WK, checkpoint(makers)[0][LAST_WK]


def sparse():
    """Unchanged elements are NaN, as in vLLM's sparse updates."""
    name, tensor = last_wk(BF16)
    tensor[0] = torch.nan
    return [(name, tensor)]


# The encoding of the server, tensors that come in a call of load_weights each, and the error of the last call.
REFUSED = {
    "another layout": (FP8, lambda: [last_wk(BF16)], r"expected wk in FP8 128x128.* as in the first load"),
    "another shape": (FP8, lambda: [(LAST_GATE, torch.ones(8, K))], r"expected 16 in dimension 0 of the matrix"),
    "twice": (FP8, lambda: [last_wk(FP8), last_wk(FP8)], "one tensor in the role of"),
    "sparse": (BF16, sparse, r"layers\.1.*wk\.weight: expected magnitudes"),
}


@pytest.mark.parametrize(("makers", "items", "error"), REFUSED.values(), ids=REFUSED)
def test_update_is_refused(tmp_path, makers, items, error):
    """When its call ends, as nothing else would report it."""
    server, (*first, last) = Server(tmp_path, makers), items()
    for item in first:
        server.model.load_weights([item])
    with pytest.raises(CheckpointError, match=error):
        server.model.load_weights([last])
    server.check(server.truth)
    reload_and_check(server)


@pytest.mark.parametrize(
    ("encoding", "suffix"),
    [("fp8", "wk.weight"), ("fp8", "wk.weight_scale_inv"), ("int4", "")],  # zero points of INT4 may follow
)
def test_incomplete_matrix_warns_and_changes_nothing(tmp_path, caplog, encoding, suffix):
    """The next complete reload drops it."""
    server = Server(tmp_path, ENCODINGS[encoding])
    stem = LAST_WK.removesuffix("weight")
    tensors = checkpoint(server.makers)[0].items()
    server.model.load_weights([item for item in tensors if item[0].startswith(stem) and item[0].endswith(suffix)])
    assert "layers 1 keep their old weights" in caplog.text
    server.check({layer: values.bfloat16().double() for layer, values in server.truth.items()})
    reload_and_check(server)


def test_call_with_parts_of_both_matrices_waits(tmp_path):
    server = Server(tmp_path, pair("fp8_block", "fp8_block"))
    tensors, truth = checkpoint(server.makers)
    server.model.load_weights([item for item in only_projections(tensors).items() if item[0] != LAST_GATE])
    server.check({0: truth[0], 1: server.truth[1]})
    server.model.load_weights([(LAST_GATE, tensors[LAST_GATE])])
    server.check(truth)


@pytest.mark.parametrize("rows", [slice(0, D), slice(D, None)], ids=["wk", "weights_proj"])
def test_single_matrix_takes_effect_when_its_call_ends(server, caplog, rows):
    """In place, and nothing of it is left over."""
    tensors, truth = checkpoint(server.makers)
    stem = LAST_WK.removesuffix("weight") if rows.start == 0 else LAST_GATE.removesuffix("weight")
    server.model.load_weights([item for item in tensors.items() if item[0].startswith(stem)])
    server.truth[1][rows] = truth[1][rows]
    server.check(server.truth)
    assert "keep their old weights" not in caplog.text
    reload_and_check(server)


@pytest.mark.parametrize("makers", [BF16, FP8, pair("fp8_block", "int4")], ids=["bf16", "fp8", "mixed"])
def test_reload_as_parameters(tmp_path, makers):
    """`is_checkpoint_format=False`: the parameters by their names in the model."""
    server, other = (Server(tmp_path / name, makers) for name in ("server", "other"))
    parameters = {name: p.data for name, p in other.model.named_parameters() if "wk_weights_proj" in name}
    server.reload(parameters, False)
    server.check(other.truth)


def test_reload_of_fused_checkpoint(tmp_path):
    reload_and_check(Server(tmp_path, BF16), FUSED)


@pytest.mark.parametrize(("first", "second"), [("fp8", "bf16"), ("fp8", "nvfp4")])
def test_reload_of_another_encoding_is_refused(tmp_path, first, second):
    server = Server(tmp_path, ENCODINGS[first])
    with pytest.raises(CheckpointError, match="INDEXPROJ_VLLM=bf16"):
        server.reload(checkpoint(ENCODINGS[second])[0])
    server.check(server.truth)


@pytest.mark.parametrize(("switch", "first"), [("bf16", "fp8"), ("1", "bf16")])
def test_bf16_server_takes_any_encoding(tmp_path, switch, first):
    server = Server(tmp_path, ENCODINGS[first], switch)
    assert projections(server.model)[0].weight.dtype == torch.bfloat16
    for encoding in ("nvfp4", "bf16", "fp8"):
        tensors, truth = checkpoint(ENCODINGS[encoding])
        server.reload(tensors)
        server.check({layer: values.bfloat16().double() for layer, values in truth.items()})


def test_dummy_weights_then_update(tmp_path):
    """How RL frameworks start: no checkpoint has set an encoding, so weights are decoded to bf16."""
    server = Server(tmp_path, FP8, load_format="dummy")
    weights = {layer: module.weight.double() for layer, module in projections(server.model).items()}
    assert all(weight.abs().max() > 0 for weight in weights.values())
    server.check(weights)
    for reload in (server.reload, lambda tensors: server.model.load_weights(tensors.items())):
        tensors, truth = checkpoint(FP8)
        reload(only_projections(tensors))
        server.check({layer: values.bfloat16().double() for layer, values in truth.items()})


@pytest.mark.parametrize("byte", [0, 0x7F])
def test_reload_after_sleep(server, byte):
    """A reload without the projection keeps it, but refuses to serve memory that no longer holds weights."""
    server.fill(byte)
    with pytest.raises(CheckpointError, match=r"layers\.{0-1}\.self_attn\.indexer\.wk_weights_proj"):
        server.reload(checkpoints.without_projections(checkpoint(server.makers)[0]))
    reload_and_check(server)
    server.fill(byte)
    reload_and_check(server)


def test_offloaded_weights(tmp_path):
    """The parameter moves to other memory, or vLLM replaces it during a call: the projection reads it there."""
    server = Server(tmp_path, BF16)
    module, (x, *_) = projections(server.model)[0], activations()
    found, _ = torch.func.functional_call(module, {"weight": 4 * module.weight}, (x,))
    assert_close(found, 4 * x.double() @ server.truth[0].T, 2**-8)
    for module in projections(server.model).values():
        module.weight.data = 2 * module.weight.data  # the old memory keeps the old values
    assert_outputs(server.model, {layer: 2 * values for layer, values in server.truth.items()})
