"""IndexerProjection as an nn.Module. tests/interpreter has its forward."""

import pytest
import torch

from indexproj.indexer import IndexerProjection
from indexproj.kernels import Format, Matrix
from support import INDEXER, fp8_layer, same, weights, write_checkpoint

SHAPE = (128, 16, 256)


def test_from_checkpoint_loads_one_layer(tmp_path):
    tensors = fp8_layer(5)
    path = write_checkpoint(tmp_path, fp8_layer(4), tensors)
    module = IndexerProjection.from_checkpoint(path, layer=5)
    wk = INDEXER.format(5) + "wk.weight"
    assert same(module.weights.wk, Matrix(Format.FP8_BLOCK, tensors[wk], tensors[f"{wk}_scale_inv"]))
    assert repr(module) == "IndexerProjection(K=256, D=128, H=16, FP8 128x128 and BF16 on cpu)"


def test_wrong_weights_and_options_are_refused_at_once():
    with pytest.raises(TypeError, match="expected ProjectionWeights, got dict"):
        IndexerProjection({})
    with pytest.raises(TypeError, match="unexpected keyword argument 'activaton'"):
        IndexerProjection(weights("BF16, BF16", SHAPE), activaton="fp8")


@pytest.mark.parametrize("pair", ["FP8 128x128, BF16", "BF16, BF16"])
def test_weights_move_with_the_model_and_keep_their_dtype(pair):
    module = IndexerProjection(weights(pair, SHAPE))
    assert not module.state_dict()
    assert not list(module.parameters())
    before, model = module.weights, torch.nn.ModuleDict({"indexer": module})
    model.half()
    assert same(module.weights.wk, before.wk)
    assert same(module.weights.gate, before.gate)
    model.to("meta", torch.float32)
    assert module.weights.device.type == "meta"
    assert module.weights.gate.values.dtype == torch.bfloat16
    assert (module.weights.fused_weight is not None) == (pair == "BF16, BF16")
