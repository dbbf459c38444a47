"""Tensor names: any prefix, exact suffixes, nothing by substring."""

import pytest

from indexproj.loading.headers import UNUSED, Header, parse

PREFIXES = "model.", "", "base-model.", "model.language_model.", "language_model.model."
# What stands between prefix and "indexer." -> index in a model of 61 hidden layers.
MIDDLES = {"layers.60.self_attn": 60, "mtp_layers.1.self_attn": 62, "layers.3.attn": 3, "mtp.0.attn": 61}
ROLES = {
    "weight": "weight", "weight_packed": "weight", "weight_scale_inv": "scale", "weight_scale": "scale",
    "scale": "scale", "weight_scale_2": "scale_2", "bias": ".bias", "weight.packed": ".weight.packed",
    "shape": ".shape", "": ".", "weight\n": ".weight\n",
    # A smoothing scale changes weights, unlike scales of activations.
    "input_pre_quant_scale": ".input_pre_quant_scale", "input_scales": ".input_scales", "scale_2": ".scale_2",
    **dict.fromkeys(("input_scale", "input_scale_3", "input_scale_inv", "input_global_scale", "act_scale"), UNUSED),
    **dict.fromkeys(("activation_scale", "output_zero_point", "input_amax"), UNUSED),
}  # fmt: skip


@pytest.mark.parametrize("leaf", ROLES)
@pytest.mark.parametrize("middle", MIDDLES)
def test_parse_projection(middle, leaf):
    for prefix in PREFIXES:
        for matrix in ("wk", "weights_proj", "wk_weights_proj"):
            stem = f"{prefix}{middle}.indexer."
            tensor = parse(f"{stem}{matrix}.{leaf}")
            assert (tensor.stem, tensor.role) == (stem, ROLES[leaf])
            assert tensor.matrix == (None if tensor.role == UNUSED else matrix)
            assert tensor.layer(61) == MIDDLES[middle]
            assert tensor.layer(None) == (None if "mtp" in middle else MIDDLES[middle])
    assert parse("model.layers.0.self_attn.indexer.wk").role == "."


def test_parse_unrelated_tensors():
    for name in (
        "model.layers.0.self_attn.indexers_proj.weight", "model.layers.0.self_attn.wk.weight",
        "model.layers.x.self_attn.indexer.wk.weight", "model.layers.٣.self_attn.indexer.wk.weight",
        "model.layers.1234567.self_attn.indexer.wk.weight", "model.layers.0.mlp.indexer.wk.weight",
        "indexer.wk.weight", "mtp.layers.self_attn.indexer.wk.weight", "xmtp.0.attn.indexer.wk.weight",
    ):  # fmt: skip
        assert parse(name) is None, name
    for leaf in ("wq_b.weight", "k_norm.bias", "wkv.weight", "wk2.weight", "index_kpool_compress_gate"):
        tensor = parse(f"model.layers.0.self_attn.indexer.{leaf}")
        assert (tensor.layer(61), tensor.matrix) == (0, None)
        assert tensor.role != UNUSED


def test_headers_compare_by_dtype_and_shape():
    """So that the layers of a model are recognized once."""
    assert Header("a", "BF16", (2, 3), "x") == Header("b", "BF16", (2, 3), "y") != Header("a", "BF16", (3, 2), "x")
