"""Every encoding loads exactly, for either matrix, for both, and for both stored as one."""

import pytest
import torch

from exports import EXPORTS, bf16, fp8_block, layer_of, named, refused
from indexproj.kernels import Format
from indexproj.kernels.formats import spread
from indexproj.loading import Checkpoint, Plan, load
from indexproj.loading.encodings import ENCODINGS, _fp8
from indexproj.loading.headers import ROLES
from support import INDEXER, only, random_matrix, write_checkpoint

STEM = INDEXER.format(0)


def check(path, *exports, **config):
    """Loads layer 0 and compares plan and values with the exports of wk and weights_proj, or of both in one."""
    tensors = layer_of(*exports) if len(exports) == 2 else named(STEM, "wk_weights_proj", *exports)
    write_checkpoint(path, tensors, config=config)
    plan, weights = Plan.of(Checkpoint(path)).layers[0], load(path)[0]
    matrices = weights.wk, weights.gate
    assert plan.shape == weights.shape
    for matrix, planned, export in zip(matrices, (plan.wk, plan.gate), (exports[0], exports[-1]), strict=True):
        assert (planned.encoding.name, planned.encoding.exact is None) == (export.encoding, export.is_native)
        assert (planned.shape, planned.layout.nbytes) == (matrix.shape, matrix.nbytes)
        assert planned.headers.keys() == {ROLES[leaf] for leaf in export.tensors}
    loaded = torch.cat([matrix.dequantize(torch.float64) for matrix in matrices])
    assert torch.equal(loaded, torch.cat([export.loaded for export in exports]))
    assert (weights.fused_weight is None) == any(matrix.format.value != "BF16" for matrix in matrices)


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("shape", [(128, 16, 256), (100, 30, 544)], ids=["even", "ragged"])
def test_load_wk_and_gate(tmp_path, export, shape):
    """544 is a multiple of 32, not of 128 or 512; 100 and 30 are multiples of neither 128 nor 8."""
    d, h, k = shape
    check(tmp_path, EXPORTS[export](d, k), EXPORTS[export](h, k))


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("k", [256, 544])
def test_load_fused_matrix(tmp_path, export, k):
    check(tmp_path, EXPORTS[export](144, k), index_head_dim=128)


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize(
    "export", ["fp8_block", "fp8_block_u8", "fp8_row", "fp8_tensor", "mxfp8_u8", "fp8_packed", "nvfp4", "mxfp4"]
)
def test_load_scale_under_any_name(tmp_path, export, leaf):
    wk = EXPORTS[export](128, 512)
    wk.tensors = {leaf if ROLES[name] == "scale" else name: tensor for name, tensor in wk.tensors.items()}
    check(tmp_path, wk, bf16(16, 512))


@pytest.mark.parametrize(("export", "shape"), [("fp8_block", (2, 1, 5, 1)), ("fp8_tensor", (1, 1))])
def test_load_fp8_scale_in_more_dimensions(tmp_path, export, shape):
    wk = EXPORTS[export](192, 544)
    wk.tensors = {leaf: tensor if leaf == "weight" else tensor.reshape(shape) for leaf, tensor in wk.tensors.items()}
    check(tmp_path, wk, bf16(16, 544))


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_load_int4_group_sizes(tmp_path, size):
    """A group size is fixed: 800 columns are 25 groups of 32, but no whole number of larger groups."""
    wk = EXPORTS["int4_g_idx"](128, 768, 768 // size)
    wk.tensors["weight_g_idx"] = wk.tensors["weight_g_idx"].long()
    check(tmp_path, wk, bf16(16, 768))
    if size > 32:
        wk = EXPORTS["int4"](128, 800, 25)
        wk.tensors["weight_scale"] = torch.ones(128, 800 // size)
        assert only(refused(tmp_path, layer_of(wk, k=800))).subject == f"{STEM}wk.weight_scale"


def test_fused_matrix_is_split_between_blocks(tmp_path):
    check(tmp_path, EXPORTS["mxfp8"](144, 256), index_head_dim=64)
    for export, rows, head_dim in (("bf16", 128, 128), ("bf16", 128, 0), ("bf16", 100, 128), ("fp8_block", 144, 64)):
        tensors = named(STEM, "wk_weights_proj", EXPORTS[export](rows, 256))
        problem = only(refused(tmp_path, tensors, {"index_head_dim": head_dim}))
        assert problem.subject == f"{STEM}wk_weights_proj.weight"
        assert problem.expected.startswith(f"{head_dim} rows of wk (index_head_dim)")


@pytest.mark.parametrize("ignored", [[], ["model.layers.0.self_attn.indexers_proj"], [f"{STEM}wk"]])
def test_quantization_config_is_ignored(tmp_path, ignored):
    config = {"quant_method": "fp8", "weight_block_size": [64, 64], "modules_to_not_convert": ignored}
    for wk, gate in ((bf16, bf16), (fp8_block, bf16), (fp8_block, fp8_block)):
        check(tmp_path, wk(128, 256), gate(16, 256), quantization_config=config)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_encoding_states_its_source_and_has_an_export(encoding):
    assert encoding.bind.__doc__.count("Source: ") == 1
    assert encoding.name in {make(128, 256).encoding for make in EXPORTS.values()}


@pytest.mark.parametrize("format", [Format.FP8_BLOCK, Format.FP8_ROW, Format.MXFP8], ids=str)
def test_fnuz_codes_keep_their_bits_and_halve_the_scale(format):
    """Every code but NaN (0x80) against torch's own value of it."""
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    bits[0x80] = 0
    codes = bits.view(4, 64).repeat(1, 2).view(torch.float8_e4m3fnuz)
    plain = random_matrix(format, 4, 128)
    matrix = _fp8(format, {"weight": codes}, plain.scale, plain.row_scale)
    assert torch.equal(matrix.values.view(torch.uint8), codes.view(torch.uint8))
    scale = plain.row_scale if plain.scale is None else plain.scale
    values = codes.double() * spread(scale.double(), plain.group, plain.shape)
    assert torch.equal(matrix.dequantize(torch.float64), values)
    smallest = torch.zeros(4, 4, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    lowest = _fp8(Format.MXFP8, {"weight": codes}, smallest)
    assert not lowest.scale.view(torch.uint8).any()
