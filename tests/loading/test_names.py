"""The name grammar: exact leaves, any prefix, nothing by substring."""

import pytest

from indexproj.loading.names import is_projection, parse


@pytest.mark.parametrize("prefix", ["model.", "", "base-model.", "model.language_model.", "language_model.model."])
@pytest.mark.parametrize("matrix", ["wk", "weights_proj", "wk_weights_proj"])
@pytest.mark.parametrize("role", ["weight", "weight_scale_inv", "bias", "weight.packed", ""])
def test_parts(prefix, matrix, role):
    stem = f"{prefix}layers.61.self_attn.indexer."
    tensor = parse(f"{stem}{matrix}.{role}")
    assert (tensor.stem, tensor.layer, tensor.matrix, tensor.role) == (stem, 61, matrix, role)
    assert is_projection(tensor.name)


def test_a_matrix_without_a_role_is_still_one_of_the_projection():
    assert parse("model.layers.0.self_attn.indexer.wk").role == ""


@pytest.mark.parametrize("leaf", ["wq_b.weight", "k_norm.bias", "wkv.weight", "wk2.weight", "index_kpool_ape"])
def test_neighbours_in_the_indexer(leaf):
    tensor = parse(f"model.layers.0.self_attn.indexer.{leaf}")
    assert (tensor.layer, tensor.matrix, tensor.role) == (0, None, "")
    assert not is_projection(tensor.name)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.indexers_proj.weight",
        "model.layers.0.self_attn.wk.weight",
        "model.layers.x.self_attn.indexer.wk.weight",
        "model.layers.٣.self_attn.indexer.wk.weight",
        "model.layers.0.mlp.indexer.wk.weight",
        "indexer.wk.weight",
    ],
)
def test_strangers(name):
    assert parse(name) is None
