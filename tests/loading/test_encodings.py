"""Every encoding loads exactly, for either matrix, for both, and for both stored as one."""

import pytest
import torch

from exports import EXPORTS, layer_of, named, refused, stream
from indexproj.loading import Checkpoint, Plan, load
from indexproj.loading.encodings import ENCODINGS
from indexproj.loading.headers import ROLES
from support import INDEXER, only, write_checkpoint

STEM = INDEXER.format(0)


def check(path, tensors, *exports, **config):
    """Loads layer 0 and compares plan and values with the exports of wk and weights_proj, or of both in one."""
    write_checkpoint(path, tensors, config=config)
    plan, weights = Plan.of(Checkpoint(path)).layers[0], load(path)[0]
    assert plan.shape == weights.shape
    for matrix, planned, export in ((weights.wk, plan.wk, exports[0]), (weights.gate, plan.gate, exports[-1])):
        assert (planned.encoding.name, planned.encoding.exact is None) == (export.encoding, export.is_native)
        assert (planned.shape, planned.layout.nbytes) == (matrix.shape, matrix.nbytes)
        assert planned.headers.keys() == {ROLES[leaf] for leaf in export.tensors}
    expected = torch.cat([export.loaded for export in exports])
    assert torch.equal(
        torch.cat([weights.wk.dequantize(torch.float64), weights.gate.dequantize(torch.float64)]), expected
    )
    assert (weights.fused_weight is None) == any(matrix.format.value != "BF16" for matrix in (weights.wk, weights.gate))


def check_wk(path, wk):
    gate = EXPORTS["bf16"](16, wk.values.shape[1])
    check(path, layer_of(wk, gate), wk, gate)


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("shape", [(128, 16, 256), (100, 30, 544)], ids=["even", "ragged"])
def test_load_wk_and_gate(tmp_path, export, shape):
    """544 is a multiple of 32, not of 128 or 512; 100 and 30 are multiples of neither 128 nor 8."""
    d, h, k = shape
    wk, gate = EXPORTS[export](d, k), EXPORTS[export](h, k)
    check(tmp_path, layer_of(wk, gate), wk, gate)


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("k", [256, 544])
def test_load_fused_matrix(tmp_path, export, k):
    both = EXPORTS[export](144, k)
    check(tmp_path, named(STEM, "wk_weights_proj", both), both, index_head_dim=128)


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize(
    "export", ["fp8_block", "fp8_block_u8", "fp8_row", "fp8_tensor", "mxfp8_u8", "fp8_packed", "nvfp4", "mxfp4"]
)
def test_load_scale_under_any_name(tmp_path, export, leaf):
    wk = EXPORTS[export](128, 512)
    wk.tensors = {leaf if ROLES[name] == "scale" else name: tensor for name, tensor in wk.tensors.items()}
    check_wk(tmp_path, wk)


@pytest.mark.parametrize(
    ("export", "n", "shape"),
    [
        ("fp8_block", 192, (2, 1, 5, 1)), ("fp8_row", 128, (128,)), ("fp8_row", 128, (128, 1)),
        *(("fp8_tensor", 128, shape) for shape in ((), (1,), (1, 1))),
    ],
)  # fmt: skip
def test_load_fp8_scale_in_any_shape(tmp_path, export, n, shape):
    wk = EXPORTS[export](n, 544)
    leaf = list(wk.tensors)[1]
    wk.tensors[leaf] = wk.tensors[leaf].reshape(shape)
    check_wk(tmp_path, wk)


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_load_int4_group_sizes(tmp_path, size):
    """A group size is fixed: 800 columns are 25 groups of 32, but no whole number of larger groups."""
    wk = EXPORTS["int4_g_idx"](128, 768, 768 // size)
    wk.tensors["weight_g_idx"] = wk.tensors["weight_g_idx"].long()
    check_wk(tmp_path, wk)
    if size > 32:
        wk = EXPORTS["int4"](128, 800, 25)
        wk.tensors["weight_scale"] = torch.ones(128, 800 // size)
        assert only(refused(tmp_path, layer_of(wk, k=800))).subject == f"{STEM}wk.weight_scale"


def test_assembly_strided_tensors():
    """Tensors are read by index, whatever their strides: DeepGEMM's packed scales are MN-major in memory."""
    wk = EXPORTS["fp8_packed"](128, 1024)
    wk.tensors = {leaf: tensor.T.contiguous().T for leaf, tensor in wk.tensors.items()}
    assert not wk.tensors["weight"].is_contiguous()
    weights = stream(layer_of(wk, k=1024))[0]
    assert all(tensor.is_contiguous() for tensor in weights.wk.tensors)
    assert torch.equal(weights.wk.dequantize(torch.float64), wk.values)


def test_fused_matrix_is_split_between_blocks(tmp_path):
    both = EXPORTS["mxfp8"](144, 256)
    check(tmp_path, named(STEM, "wk_weights_proj", both), both, index_head_dim=64)
    for export, rows, head_dim in (("bf16", 128, 128), ("bf16", 128, 0), ("bf16", 100, 128), ("fp8_block", 144, 64)):
        tensors = named(STEM, "wk_weights_proj", EXPORTS[export](rows, 256))
        problem = only(refused(tmp_path, tensors, {"index_head_dim": head_dim}))
        assert problem.subject == f"{STEM}wk_weights_proj.weight"
        assert problem.expected.startswith(f"{head_dim} rows of wk (index_head_dim)")


@pytest.mark.parametrize("ignored", [[], ["model.layers.0.self_attn.indexers_proj"], [f"{STEM}wk"]])
def test_quantization_config_is_ignored(tmp_path, ignored):
    config = {"quant_method": "fp8", "weight_block_size": [64, 64], "modules_to_not_convert": ignored}
    for wk, gate in (("bf16", "bf16"), ("fp8_block", "bf16"), ("fp8_block", "fp8_block")):
        wk, gate = EXPORTS[wk](128, 256), EXPORTS[gate](16, 256)
        check(tmp_path, layer_of(wk, gate), wk, gate, quantization_config=config)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_encoding_states_its_source_and_has_an_export(encoding):
    assert encoding.bind.__doc__.count("Source: ") == 1
    assert encoding.name in {make(128, 256).encoding for make in EXPORTS.values()}
