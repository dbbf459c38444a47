"""The name grammar: exact leaves, any prefix, nothing by substring."""

import pytest

from indexproj.loading.names import is_indexer, parse


@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model.", "language_model.model."])
@pytest.mark.parametrize("matrix", ["wk", "weights_proj", "wk_weights_proj"])
@pytest.mark.parametrize("role", ["weight", "weight_scale_inv", "bias", "weight.packed"])
def test_parts(prefix, matrix, role):
    name = f"{prefix}layers.61.self_attn.indexer.{matrix}.{role}"
    tensor = parse(name)
    assert (tensor.name, tensor.prefix, tensor.layer, tensor.matrix, tensor.role) == (name, prefix, 61, matrix, role)
    assert is_indexer(name)


@pytest.mark.parametrize(
    "leaf", ["wq_b.weight", "k_norm.bias", "k_norm.weight", "wk", "wkv.weight", "index_kpool_compress_gate"]
)
def test_neighbours_in_the_indexer(leaf):
    name = f"model.layers.0.self_attn.indexer.{leaf}"
    assert parse(name) is None
    assert is_indexer(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.indexers_proj.weight",
        "model.layers.0.self_attn.wk.weight",
        "model.layers.x.self_attn.indexer.wk.weight",
        "model.layers.0.mlp.indexer.wk.weight",
        "indexer.wk.weight",
    ],
)
def test_strangers(name):
    assert parse(name) is None
    assert not is_indexer(name)
