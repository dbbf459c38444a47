"""IndexerProjection as a torch module; its forward is in tests/interpreter."""

import pytest
import torch

from indexproj.indexer import IndexerProjection
from indexproj.kernels import Fp8Matrix
from indexproj.loading import CheckpointError
from support import fp8_layer, same, weights, write_checkpoint


def test_from_checkpoint_takes_one_layer(tmp_path):
    tensors = fp8_layer(5)
    path = write_checkpoint(tmp_path, fp8_layer(4), tensors)
    module = IndexerProjection.from_checkpoint(path, layer=5)
    stem = "model.layers.5.self_attn.indexer."
    assert same(module.weights.wk, Fp8Matrix(tensors[f"{stem}wk.weight"], tensors[f"{stem}wk.weight_scale_inv"]))
    assert repr(module) == "IndexerProjection(K=256, D=128, H=16, wk=Fp8Matrix, gate=DenseMatrix, device=cpu)"
    with pytest.raises(CheckpointError, match="layer 6: expected one of the layers with an indexer, 4-5"):
        IndexerProjection.from_checkpoint(path, layer=6)


@pytest.mark.parametrize("pair", ["fp8-dense", "dense-dense"])
def test_it_moves_with_the_model_it_is_in(pair):
    model = torch.nn.ModuleDict({"indexer": IndexerProjection(weights(pair, (128, 16, 256)))})
    model.to("meta")
    assert model["indexer"].weights.device.type == "meta"
    assert (model["indexer"].weights.fused_weight is not None) == (pair == "dense-dense")


@pytest.mark.parametrize("pair", ["fp8-dense", "dense-dense"])
def test_a_change_of_dtype_leaves_the_weights_as_they_are(pair):
    module = IndexerProjection(weights(pair, (128, 16, 256)))
    before = module.weights
    module.half()
    assert same(module.weights.wk, before.wk)
    assert same(module.weights.gate, before.gate)
    module.to("meta", torch.float32)
    assert module.weights.device.type == "meta"
    assert module.weights.gate.weight.dtype == torch.bfloat16


def test_it_has_no_state_of_its_own():
    module = IndexerProjection(weights("fp8-dense", (128, 16, 256)))
    assert not module.state_dict()
    assert not list(module.parameters())


def test_the_package_has_only_what_it_says():
    import indexproj.indexer

    with pytest.raises(AttributeError, match="no attribute 'Projection'"):
        indexproj.indexer.Projection  # noqa: B018
