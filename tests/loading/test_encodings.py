"""Every encoding loads exactly, for either matrix, for both, and for both stored as one."""

import pytest
import torch

from exports import EXPORTS, Export, bf16, fp8_packed, int4, int4_g_idx, named
from indexproj.kernels import ProjectionWeights, reference
from indexproj.loading import Assembly, Checkpoint, Plan, load
from indexproj.loading.encodings import ENCODINGS
from indexproj.loading.names import ROLES
from support import DEEPSEEK, GLM, INDEXER, only, problems_of, write_checkpoint

STEM = INDEXER.format(0)


def pair(wk: Export, gate: Export, layer=0):
    stem = INDEXER.format(layer)
    return {**named(stem, "wk", wk), **named(stem, "weights_proj", gate)}


def check(path, wk: Export, gate: Export, **config):
    """Loads layer 0 and compares plan and values with the exports."""
    write_checkpoint(path, pair(wk, gate), config=config)
    plan, weights = Plan.of(Checkpoint(path)).layers[0], load(path)[0]
    for matrix, planned, export in ((weights.wk, plan.wk, wk), (weights.gate, plan.gate, gate)):
        assert (planned.encoding.name, planned.encoding.is_native) == (export.encoding, export.is_native)
        assert (planned.shape, planned.layout.nbytes) == (matrix.shape, matrix.nbytes)
        assert planned.headers.keys() == {ROLES[leaf] for leaf in export.tensors}
        assert torch.equal(matrix.dequantize(torch.float64), export.loaded)


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("shape", [(128, 16, 256), (100, 30, 544)], ids=["even", "ragged"])
def test_load_wk_and_gate(tmp_path, export, shape):
    """544 is a multiple of 32, not of 128 or 512; 100 and 30 are multiples of neither 128 nor 8."""
    d, h, k = shape
    wk, gate = EXPORTS[export](d, k), EXPORTS[export](h, k)
    check(tmp_path / "both", wk, gate)
    check(tmp_path / "wk", wk, bf16(h, k))
    check(tmp_path / "gate", bf16(d, k), gate)


@pytest.mark.parametrize("shape", [DEEPSEEK, GLM], ids=["deepseek", "glm"])
@pytest.mark.parametrize("export", ["fp8_block", "mxfp8", "nvfp4", "fp8_packed"])
def test_load_published_shapes(tmp_path, export, shape):
    d, h, k = shape
    check(tmp_path, EXPORTS[export](d, k), bf16(h, k))


def test_load_any_pair_of_encodings(tmp_path):
    exports = [make(128, 256) for make in EXPORTS.values()]
    layers = [(wk, gate) for wk in exports for gate in exports]
    tensors = {name: t.clone() for layer, exported in enumerate(layers) for name, t in pair(*exported, layer).items()}
    loaded = load(write_checkpoint(tmp_path, tensors))
    for layer, (wk, gate) in enumerate(layers):
        assert torch.equal(loaded[layer].wk.dequantize(torch.float64), wk.loaded)
        assert torch.equal(loaded[layer].gate.dequantize(torch.float64), gate.loaded)


def test_reference_identity_activations():
    """Identity activations give the decoded weights."""
    for make in EXPORTS.values():
        export = make(128, 256)
        encoding = next(e for e in ENCODINGS if e.name == export.encoding)
        matrix = encoding.bind({ROLES[leaf]: tensor for leaf, tensor in export.tensors.items()})
        k, gate = reference(torch.eye(256, dtype=torch.bfloat16), ProjectionWeights.pack(matrix, matrix))
        assert torch.equal(k.T, export.loaded)
        assert torch.equal(gate.T, export.loaded)


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize(
    "export", ["fp8_block", "fp8_block_u8", "fp8_row", "fp8_tensor", "mxfp8_u8", "fp8_packed", "nvfp4", "mxfp4"]
)
def test_load_scale_under_any_name(tmp_path, export, leaf):
    wk = EXPORTS[export](128, 512)
    wk.tensors = {leaf if ROLES[name] == "scale" else name: tensor for name, tensor in wk.tensors.items()}
    check(tmp_path, wk, bf16(16, 512))


def test_load_fp8_block_scale_in_four_dimensions(tmp_path):
    wk = EXPORTS["fp8_block"](192, 544)
    wk.tensors["weight_scale_inv"] = wk.tensors["weight_scale_inv"][:, None, :, None]
    check(tmp_path, wk, bf16(16, 544))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (128,), (128, 1)])
def test_load_fp8_one_scale_or_one_per_row(tmp_path, shape):
    wk = EXPORTS["fp8_row" if 128 in shape else "fp8_tensor"](128, 256)
    wk.tensors["weight_scale"] = wk.tensors["weight_scale"].reshape(shape)
    check(tmp_path, wk, bf16(16, 256))


def test_load_int4_group_sizes(tmp_path):
    """A group size is fixed: 800 columns are 25 groups of 32, but no whole number of larger groups."""
    for size in (32, 64, 128, 256):
        wk = int4_g_idx(128, 768, 768 // size)
        wk.tensors["weight_g_idx"] = wk.tensors["weight_g_idx"].long()
        check(tmp_path / f"{size}", wk, bf16(16, 768))
        wk = int4(128, 800, 25)
        wk.tensors["weight_scale"] = torch.ones(128, 800 // size)
        path = write_checkpoint(tmp_path / f"ragged {size}", pair(wk, bf16(16, 800)))
        if size == 32:
            assert load(path)[0].shape == (128, 16, 800)
        else:
            assert only(problems_of(path)).subject == f"{STEM}wk.weight_scale"


def test_assembly_strided_tensors():
    """Tensors are read by index, whatever their strides: DeepGEMM's packed scales are MN-major in memory."""
    wk, gate = fp8_packed(128, 1024), bf16(16, 1024)
    wk.tensors = {leaf: tensor.T.contiguous().T for leaf, tensor in wk.tensors.items()}
    assert not wk.tensors["weight"].is_contiguous()
    assembly = Assembly([0])
    assembly.begin()
    for name, tensor in pair(wk, gate).items():
        assembly.offer(name, tensor)
    weights = assembly.finish()[0]
    assert all(tensor.is_contiguous() for tensor in weights.wk.tensors)
    assert torch.equal(weights.wk.dequantize(torch.float64), wk.values)


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("k", [256, 544])
def test_load_fused_matrix(tmp_path, export, k):
    both = EXPORTS[export](144, k)
    path = write_checkpoint(tmp_path, named(STEM, "wk_weights_proj", both), config={"index_head_dim": 128})
    plan, weights = Plan.of(Checkpoint(path)).layers[0], load(path)[0]
    assert torch.equal(weights.wk.dequantize(torch.float64), both.loaded[:128])
    assert torch.equal(weights.gate.dequantize(torch.float64), both.loaded[128:])
    assert plan.shape == weights.shape == (128, 16, k)
    assert (plan.wk.layout.nbytes, plan.gate.layout.nbytes) == (weights.wk.nbytes, weights.gate.nbytes)
    if plan.wk.encoding.name in ("BF16", "F16", "F32", "INT4"):
        assert weights.fused_weight is not None


def test_load_fused_matrix_split_at_index_head_dim(tmp_path):
    both = EXPORTS["mxfp8"](144, 256)
    path = write_checkpoint(tmp_path, named(STEM, "wk_weights_proj", both), config={"index_head_dim": 64})
    assert load(path)[0].shape == (64, 80, 256)


@pytest.mark.parametrize(
    ("export", "rows", "head_dim"), [("bf16", 128, 128), ("bf16", 100, 128), ("fp8_block", 144, 64)]
)
def test_fused_matrix_that_cannot_be_split(tmp_path, export, rows, head_dim):
    both = EXPORTS[export](rows, 256)
    path = write_checkpoint(tmp_path, named(STEM, "wk_weights_proj", both), config={"index_head_dim": head_dim})
    problem = only(problems_of(path))
    assert problem.subject == f"{STEM}wk_weights_proj.weight"
    assert problem.expected.startswith(f"{head_dim} rows of wk (index_head_dim)")


@pytest.mark.parametrize("ignored", [[], ["model.layers.0.self_attn.indexers_proj"], [f"{STEM}wk"]])
def test_quantization_config_is_ignored(tmp_path, ignored):
    config = {"quant_method": "fp8", "weight_block_size": [64, 64], "modules_to_not_convert": ignored}
    for number, (wk, gate) in enumerate((("bf16", "bf16"), ("fp8_block", "bf16"), ("fp8_block", "fp8_block"))):
        wk, gate = EXPORTS[wk](128, 256), EXPORTS[gate](16, 256)
        check(tmp_path / f"{number}", wk, gate, quantization_config=config)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_encoding_states_its_source(encoding):
    assert encoding.bind.__doc__.count("Source: ") == 1


def test_every_encoding_has_an_export():
    assert {make(128, 256).encoding for make in EXPORTS.values()} == {encoding.name for encoding in ENCODINGS}
