"""What production does to weights once a model serves: reloads, updates from a trainer, sleep."""

import pytest
import torch

from engine.harness import (
    INDEXER,
    is_projection,
    outputs_are_right,
    projections,
)
from engine.kinds import BF16, FP8, FUSED, pair
from engine.server import Server, checkpoint
from indexproj.loading import CheckpointError

ENCODINGS = {"bf16": BF16, "fp8": FP8, "nvfp4": pair("nvfp4")}


@pytest.fixture(params=ENCODINGS)
def server(request, tmp_path):
    server = Server(tmp_path, ENCODINGS[request.param])
    server.makers = ENCODINGS[request.param]
    return server


def test_reload_in_checkpoint_format(server, caplog):
    for _ in range(2):
        tensors, truth = checkpoint(server.makers)
        server.reload(tensors)
        server.check(truth)
    assert not [r for r in caplog.records if "Failed to load weights" in r.getMessage() and "Merged" in r.getMessage()]


def test_reload_that_lacks_a_tensor_is_refused(server):
    """The old weights stay, and the next reload is clean."""
    tensors, truth = checkpoint(server.makers)
    lost = f"{INDEXER.format(1)}weights_proj.weight"
    with pytest.raises(CheckpointError, match=lost.replace(".", r"\.")):
        server.reload({name: tensor for name, tensor in tensors.items() if name != lost})
    server.check({0: truth[0], 1: server.truth[1]})
    tensors, truth = checkpoint(server.makers)
    server.reload(tensors)
    server.check(truth)


def test_reload_that_is_cut_short(server):
    """One layer was complete, and another one half: the next reload knows nothing of either."""
    tensors, _ = checkpoint(server.makers)
    last = f"{INDEXER.format(1)}weights_proj.weight"

    class Cut(dict):
        def items(self):
            yield from ((name, tensor) for name, tensor in tensors.items() if name != last)
            raise ConnectionError

    with pytest.raises(ConnectionError):
        server.reload(Cut())
    tensors, truth = checkpoint(server.makers)
    server.reload(tensors)
    server.check(truth)


def test_reload_without_the_projection_leaves_it(server):
    tensors, _ = checkpoint(server.makers)
    server.reload({name: tensor for name, tensor in tensors.items() if ".indexer.w" not in name})
    server.check(server.truth)


def test_update_by_load_weights_alone(server):
    """As trainers do it, in buckets, without a word before or after."""
    tensors, truth = checkpoint(server.makers)
    for name, tensor in reversed(tensors.items()):
        if ".indexer.w" in name and "wq_b" not in name:
            server.model.load_weights([(name, tensor)])
    server.check(truth)
    tensors, truth = checkpoint(server.makers)
    server.reload(tensors)
    server.check(truth)


def test_what_is_left_of_an_update_is_not_paired_in_silence(tmp_path):
    """The scale of an update that broke off meets the weight of the next one, whose own scale is then one too many."""
    server = Server(tmp_path, FP8)
    stem = INDEXER.format(1)
    scale = f"{stem}wk.weight_scale_inv"
    server.model.load_weights([(scale, checkpoint(FP8)[0][scale])])
    tensors, truth = checkpoint(FP8)
    names = [f"{stem}weights_proj.weight", f"{stem}wk.weight", scale]
    with pytest.raises(CheckpointError, match="no more tensors for a complete layer"):
        server.model.load_weights((name, tensors[name]) for name in names)
    server.model.load_weights((name, tensors[name]) for name in names)
    server.check({0: server.truth[0], 1: truth[1]})


def test_only_what_has_come_is_said_to_be_loaded(server):
    """vLLM warns of the rest."""
    tensors, _ = checkpoint(server.makers)
    layer = {name: tensor for name, tensor in tensors.items() if is_projection(name) and ".layers.1." in name}
    loaded = server.model.load_weights(layer.items())
    assert loaded == {name for name in server.pointers if ".layers.1." in name}


def test_half_an_update_changes_nothing_and_says_so(server, caplog):
    tensors, _ = checkpoint(server.makers)
    name = f"{INDEXER.format(1)}wk.weight"
    server.model.load_weights([(name, tensors[name])])
    assert "layers 1 keep their old weights" in caplog.text
    server.check(server.truth)


def test_update_in_fused_format(tmp_path):
    """The parameters themselves, by the names that they have in the model."""
    server = Server(tmp_path, BF16)
    tensors, truth = checkpoint(FUSED)
    server.reload(
        {name: tensor for name, tensor in tensors.items() if "wk_weights_proj" in name and ".2." not in name}, False
    )
    server.check(truth)


def test_update_in_fused_format_of_quantized_weights(tmp_path):
    server, other = Server(tmp_path / "a", FP8), Server(tmp_path / "b", FP8)
    parameters = {name: p.data for name, p in other.model.named_parameters() if "wk_weights_proj" in name}
    server.reload(parameters, False)
    server.check(other.truth)


def test_reload_of_weights_stored_as_one(tmp_path):
    server = Server(tmp_path, BF16)
    tensors, truth = checkpoint(FUSED)
    server.reload(tensors)
    server.check(truth)


@pytest.mark.parametrize(("first", "second"), [("fp8", "bf16"), ("fp8", "nvfp4")])
def test_another_encoding_is_refused(tmp_path, first, second):
    server = Server(tmp_path, ENCODINGS[first])
    tensors, _ = checkpoint(ENCODINGS[second])
    with pytest.raises(CheckpointError, match="INDEXPROJ_VLLM=bf16"):
        server.reload(tensors)
    server.check(server.truth)


@pytest.mark.parametrize(("switch", "first"), [("bf16", "fp8"), ("1", "bf16")])
def test_weights_in_bf16_take_any_encoding(tmp_path, switch, first):
    server = Server(tmp_path, ENCODINGS[first], switch)
    assert projections(server.model)[0].weight.dtype == torch.bfloat16
    for encoding in ("nvfp4", "bf16", "fp8"):
        tensors, truth = checkpoint(ENCODINGS[encoding])
        server.reload(tensors)
        server.check({layer: values.bfloat16().double() for layer, values in truth.items()})


def test_dummy_weights_and_then_those_of_a_trainer(tmp_path):
    """As RL frameworks start: there is no checkpoint whose encoding could be kept, so what comes is decoded to bf16."""
    server = Server(tmp_path, FP8, load_format="dummy")
    for reload in (server.reload, lambda tensors: server.model.load_weights(tensors.items())):
        tensors, truth = checkpoint(FP8)
        reload({name: tensor for name, tensor in tensors.items() if is_projection(name)})
        server.check({layer: values.bfloat16().double() for layer, values in truth.items()})


def test_sleep_that_discards_weights(server):
    """vLLM gives the memory of all parameters away and takes it back with anything in it."""
    for module in projections(server.model).values():
        for parameter in module.parameters():
            parameter.data.view(torch.uint8).fill_(0x7F)
    tensors, truth = checkpoint(server.makers)
    server.reload(tensors)
    server.check(truth)


@pytest.mark.parametrize("byte", [0, 0x7F])
def test_what_a_sleep_has_discarded_is_not_served(server, byte):
    """A reload that does not bring the projection leaves it, but not where the memory holds no weights any more."""
    for module in projections(server.model).values():
        for parameter in module.parameters():
            parameter.data.view(torch.uint8).fill_(byte)
    tensors, truth = checkpoint(server.makers)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.indexer\.wk_weights_proj"):
        server.reload({name: tensor for name, tensor in tensors.items() if not is_projection(name)})
    server.reload(tensors)
    server.check(truth)


def test_weights_moved_by_offloading(tmp_path):
    """The parameter gets other memory, and it is that which is computed with."""
    server = Server(tmp_path, BF16)
    for module in projections(server.model).values():
        module.weight.data = 2 * module.weight.data  # the old memory has the old values
    outputs_are_right(server.model, {layer: 2 * values for layer, values in server.truth.items()})
