"""The part of the plugin that does not know vLLM; tests/engine runs it in vLLM."""

import pytest
import torch
from torch import nn

from indexproj.indexer.vllm.model import IndexerLayer, IndexerModel
from indexproj.loading import CheckpointError
from indexproj.loading.config import Config
from indexproj.loading.headers import parse
from support import bf16_layer, fp8_layer


class Linear(nn.Module):
    output_sizes = (128, 16)

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(144, 256, dtype=torch.bfloat16), requires_grad=False)


class Model(nn.Module):
    """Has a `prefix.layers.<n>` for each n; load_weights returns the names that it gets."""

    def __init__(self, *layers):
        super().__init__()
        self.prefix = nn.ModuleDict({"layers": nn.ModuleDict({str(number): Linear() for number in layers})})
        names = {number: f"prefix.layers.{number}" for number in layers}
        self.indexproj = IndexerModel(self, names, Config(num_hidden_layers=4), False, False)

    def load_weights(self, weights):
        return {name for name, _ in weights}


def test_loaded_parameters_are_reported_and_rounding_is_logged_once(caplog):
    model = Model(0, 1, 2)
    for layer in range(3):
        loaded = model.load_weights((name, tensor.float() * 1.001) for name, tensor in bf16_layer(layer).items())
    assert loaded == {f"prefix.layers.{layer}.weight" for layer in range(3)}
    model.indexproj.finish()
    model.load_weights(bf16_layer().items())
    (line,) = (record.getMessage() for record in caplog.records)
    assert "model.layers.{0-2}.self_attn.indexer.wk.weight" in line
    assert "rounded to BF16" in line


@pytest.mark.parametrize("rows", [slice(0), slice(128), slice(128, None)], ids=["none", "wk", "weights_proj"])
def test_uninitialized_rows_are_refused(rows):
    model = Model(0, 1)
    model.get_submodule("prefix.layers.0").weight.data[rows] = 1  # the others are NaN
    with pytest.raises(CheckpointError) as caught:
        model.indexproj.finish()
    assert [problem.subject for problem in caught.value.problems] == ["prefix.layers.0", "prefix.layers.1"]


def test_sizes_are_those_of_the_module():
    model = Model(0)
    model.load_weights(bf16_layer(h=8).items())
    with pytest.raises(CheckpointError, match="expected 16 in dimension 0 of the matrix"):
        model.indexproj.finish()


def test_layer_states():
    """What each call leaves: the state, and the number of problems."""
    layer = IndexerLayer("layer", 0, Linear(), Config(), to_bf16=False)
    _, gate, wk, scale, _ = [(parse(name), tensor) for name, tensor in fp8_layer().items()]

    def after(call, *arguments):
        call(*arguments)
        found, layer.problems = len(layer.problems), []
        loaded = "EMPTY" if layer.layout is None else "READY"
        return "UPDATED" if layer.updated else "COLLECTING" if layer.collector else loaded, found

    assert after(layer.finish) == ("EMPTY", 1)  # there are no weights
    assert after(layer.offer, *wk) == ("COLLECTING", 0)
    assert after(layer.finish) == ("EMPTY", 2)  # tensors are missing
    assert after(layer.offer, *wk) == ("COLLECTING", 0)
    assert after(layer.reset) == ("EMPTY", 0)
    assert [after(layer.offer, *item)[0] for item in (wk, gate, scale)] == ["COLLECTING", "COLLECTING", "UPDATED"]
    assert after(layer.finish) == ("UPDATED", 0)
    assert after(layer.offer, *wk) == ("UPDATED", 1)  # one too many
    assert after(layer.reset) == ("READY", 0)
    assert after(layer.finish) == ("READY", 0)
    assert after(layer.offer, *wk) == ("COLLECTING", 0)
    assert after(layer.settle) == ("COLLECTING", 0)  # without its scale
    assert after(layer.reset) == ("READY", 0)
    assert after(layer.offer, *gate) == ("COLLECTING", 0)
    assert after(layer.settle) == ("UPDATED", 0)
