"""Every encoding loads exactly, for either matrix, for both, and for both stored as one."""

import pytest
import torch

from exports import EXPORTS, layer_of, named, stream
from indexproj.kernels import ProjectionWeights, reference
from indexproj.loading import Checkpoint, Plan, load
from indexproj.loading.encodings import ENCODINGS
from indexproj.loading.headers import ROLES
from support import DEEPSEEK, GLM, INDEXER, only, problems_of, write_checkpoint

STEM = INDEXER.format(0)


def check(path, wk, gate, **config):
    """Loads layer 0 and compares plan and values with the exports."""
    write_checkpoint(path, layer_of(wk, gate), config=config)
    plan, weights = Plan.of(Checkpoint(path)).layers[0], load(path)[0]
    for matrix, planned, export in ((weights.wk, plan.wk, wk), (weights.gate, plan.gate, gate)):
        assert (planned.encoding.name, planned.encoding.exact is None) == (export.encoding, export.is_native)
        assert (planned.shape, planned.layout.nbytes) == (matrix.shape, matrix.nbytes)
        assert planned.headers.keys() == {ROLES[leaf] for leaf in export.tensors}
        assert torch.equal(matrix.dequantize(torch.float64), export.loaded)


def check_wk(path, wk, k):
    check(path, wk, EXPORTS["bf16"](16, k))


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("shape", [(128, 16, 256), (100, 30, 544)], ids=["even", "ragged"])
def test_load_wk_and_gate(tmp_path, export, shape):
    """544 is a multiple of 32, not of 128 or 512; 100 and 30 are multiples of neither 128 nor 8."""
    d, h, k = shape
    for number, pair in enumerate(((export, export), (export, "bf16"), ("bf16", export))):
        check(tmp_path / f"{number}", *(EXPORTS[name](n, k) for name, n in zip(pair, (d, h), strict=True)))


@pytest.mark.parametrize("shape", [DEEPSEEK, GLM], ids=["deepseek", "glm"])
@pytest.mark.parametrize("export", ["fp8_block", "mxfp8", "nvfp4", "fp8_packed"])
def test_load_published_shapes(tmp_path, export, shape):
    d, h, k = shape
    check(tmp_path, EXPORTS[export](d, k), EXPORTS["bf16"](h, k))


def test_load_any_pair_of_encodings(tmp_path):
    exports = [make(128, 256) for make in EXPORTS.values()]
    layers = [(wk, gate) for wk in exports for gate in exports]
    tensors = {name: t.clone() for layer, pair in enumerate(layers) for name, t in layer_of(*pair, layer).items()}
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
    check_wk(tmp_path, wk, 512)


def test_load_fp8_scale_in_any_shape(tmp_path):
    wk = EXPORTS["fp8_block"](192, 544)
    wk.tensors["weight_scale_inv"] = wk.tensors["weight_scale_inv"][:, None, :, None]
    check_wk(tmp_path / "block", wk, 544)
    for shape in ((), (1,), (1, 1), (128,), (128, 1)):
        wk = EXPORTS["fp8_row" if 128 in shape else "fp8_tensor"](128, 256)
        wk.tensors["weight_scale"] = wk.tensors["weight_scale"].reshape(shape)
        check_wk(tmp_path / f"{shape}", wk, 256)


def test_load_int4_group_sizes(tmp_path):
    """A group size is fixed: 800 columns are 25 groups of 32, but no whole number of larger groups."""
    for size in (32, 64, 128, 256):
        wk = EXPORTS["int4_g_idx"](128, 768, 768 // size)
        wk.tensors["weight_g_idx"] = wk.tensors["weight_g_idx"].long()
        check_wk(tmp_path / f"{size}", wk, 768)
        wk = EXPORTS["int4"](128, 800, 25)
        wk.tensors["weight_scale"] = torch.ones(128, 800 // size)
        path = write_checkpoint(tmp_path / f"ragged {size}", layer_of(wk, k=800))
        if size == 32:
            assert load(path)[0].shape == (128, 16, 800)
        else:
            assert only(problems_of(path)).subject == f"{STEM}wk.weight_scale"


def test_assembly_strided_tensors():
    """Tensors are read by index, whatever their strides: DeepGEMM's packed scales are MN-major in memory."""
    wk = EXPORTS["fp8_packed"](128, 1024)
    wk.tensors = {leaf: tensor.T.contiguous().T for leaf, tensor in wk.tensors.items()}
    assert not wk.tensors["weight"].is_contiguous()
    weights = stream(layer_of(wk, k=1024))[0]
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


@pytest.mark.parametrize(
    ("export", "rows", "head_dim", "loads"),
    [
        ("mxfp8", 144, 64, True),
        ("bf16", 128, 128, False),
        ("bf16", 128, 0, False),
        ("bf16", 100, 128, False),
        ("fp8_block", 144, 64, False),
    ],
)
def test_fused_matrix_is_split_between_blocks(tmp_path, export, rows, head_dim, loads):
    tensors = named(STEM, "wk_weights_proj", EXPORTS[export](rows, 256))
    path = write_checkpoint(tmp_path, tensors, config={"index_head_dim": head_dim})
    if loads:
        assert load(path)[0].shape == (head_dim, rows - head_dim, 256)
    else:
        problem = only(problems_of(path))
        assert problem.subject == f"{STEM}wk_weights_proj.weight"
        assert problem.expected.startswith(f"{head_dim} rows of wk (index_head_dim)")


@pytest.mark.parametrize("ignored", [[], ["model.layers.0.self_attn.indexers_proj"], [f"{STEM}wk"]])
def test_quantization_config_is_ignored(tmp_path, ignored):
    config = {"quant_method": "fp8", "weight_block_size": [64, 64], "modules_to_not_convert": ignored}
    for number, (wk, gate) in enumerate((("bf16", "bf16"), ("fp8_block", "bf16"), ("fp8_block", "fp8_block"))):
        check(tmp_path / f"{number}", EXPORTS[wk](128, 256), EXPORTS[gate](16, 256), quantization_config=config)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_encoding_states_its_source(encoding):
    assert encoding.bind.__doc__.count("Source: ") == 1


def test_every_encoding_has_an_export():
    assert {make(128, 256).encoding for make in EXPORTS.values()} == {encoding.name for encoding in ENCODINGS}
