"""Tensor names: any prefix, exact suffixes, nothing by substring."""

import pytest

from indexproj.loading.headers import Header
from indexproj.loading.names import UNUSED, parse


@pytest.mark.parametrize("prefix", ["model.", "", "base-model.", "model.language_model.", "language_model.model."])
@pytest.mark.parametrize("matrix", ["wk", "weights_proj", "wk_weights_proj"])
@pytest.mark.parametrize(
    ("leaf", "role"),
    [
        ("weight", "weight"), ("weight_packed", "weight"), ("weight_scale_inv", "scale"), ("weight_scale", "scale"),
        ("scale", "scale"), ("weight_scale_2", "scale_2"), ("bias", ".bias"), ("weight.packed", ".weight.packed"),
        ("shape", ".shape"), ("", "."), ("weight\n", ".weight\n"),
    ],
)  # fmt: skip
def test_parse_projection(prefix, matrix, leaf, role):
    stem = f"{prefix}layers.61.self_attn.indexer."
    tensor = parse(f"{stem}{matrix}.{leaf}")
    assert (tensor.stem, tensor.layer(61), tensor.matrix, tensor.role) == (stem, 61, matrix, role)


@pytest.mark.parametrize(
    ("leaf", "is_unused"),
    [
        ("input_scale", True), ("input_scale_3", True), ("input_scale_inv", True), ("input_global_scale", True),
        ("act_scale", True), ("activation_scale", True), ("output_zero_point", True), ("input_amax", True),
        ("input_pre_quant_scale", False), ("input_scales", False), ("scale_2", False), ("bias", False),
    ],
)  # fmt: skip
def test_parse_scales_of_activations(leaf, is_unused):
    """They belong to the projection, but nothing reads them; a smoothing scale changes weights."""
    tensor = parse(f"model.layers.0.self_attn.indexer.wk.{leaf}")
    assert (tensor.matrix, tensor.role) == ((None, UNUSED) if is_unused else ("wk", f".{leaf}"))


def test_headers_compare_by_dtype_and_shape():
    """So that the layers of a model are recognized once."""
    assert Header("a", "BF16", (2, 3), "x") == Header("b", "BF16", (2, 3), "y") != Header("a", "BF16", (3, 2), "x")


def test_parse_matrix_without_role():
    assert parse("model.layers.0.self_attn.indexer.wk").role == "."


def test_parse_mtp_layers():
    tensor = parse("model.mtp_layers.1.self_attn.indexer.wk.weight")
    assert (tensor.stem, tensor.is_mtp) == ("model.mtp_layers.1.self_attn.indexer.", True)
    assert (tensor.layer(78), tensor.layer(None)) == (79, None)


@pytest.mark.parametrize(
    "leaf", ["wq_b.weight", "k_norm.bias", "wkv.weight", "wk2.weight", "index_kpool_compress_gate"]
)
def test_parse_other_indexer_tensors(leaf):
    tensor = parse(f"model.layers.0.self_attn.indexer.{leaf}")
    assert (tensor.layer(61), tensor.matrix) == (0, None)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.indexers_proj.weight", "model.layers.0.self_attn.wk.weight",
        "model.layers.x.self_attn.indexer.wk.weight", "model.layers.٣.self_attn.indexer.wk.weight",
        "model.layers.1234567.self_attn.indexer.wk.weight", "model.layers.0.mlp.indexer.wk.weight",
        "indexer.wk.weight", "mtp.layers.self_attn.indexer.wk.weight", "xmtp.0.attn.indexer.wk.weight",
    ],
)  # fmt: skip
def test_parse_unrelated_tensors(name):
    assert parse(name) is None


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("middle", "is_mtp"), [("layers.3.attn", False), ("mtp.0.attn", True), ("mtp.0.self_attn", True)]
)
def test_parse_deepseek_inference(prefix, middle, is_mtp):
    tensor = parse(f"{prefix}{middle}.indexer.wk.scale")
    assert (tensor.stem, tensor.role, tensor.is_mtp) == (f"{prefix}{middle}.indexer.", "scale", is_mtp)
    assert tensor.layer(61) == (61 if is_mtp else 3)
