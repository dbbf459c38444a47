"""Every encoding: recognised by dtypes and shapes, bound exactly, and refused with a reason where it is damaged."""

import pytest
import torch

from exports import EXPORTS, Export, bf16, fp8_block, int4, int4_g_idx, mxfp4, named, nvfp4
from indexproj.kernels import ProjectionWeights, reference
from indexproj.loading import Checkpoint, Plan, load
from indexproj.loading.encodings import ENCODINGS
from indexproj.loading.layer import BAD_VALUES
from indexproj.loading.names import ROLES
from support import DEEPSEEK, GATE, GLM, INDEXER, SCALE, WK, only, problems_of, write_checkpoint

STEM = INDEXER.format(0)


def checkpoint(path, wk: Export, gate: Export):
    return write_checkpoint(path, {**named(STEM, "wk", wk), **named(STEM, "weights_proj", gate)})


def check(path, wk: Export, gate: Export):
    """Loads the checkpoint and compares plan and values with what they should be."""
    plan = Plan.of(Checkpoint(path)).layers[0]
    weights = load(path)[0]
    for matrix, planned, export in ((weights.wk, plan.wk, wk), (weights.gate, plan.gate, gate)):
        assert (planned.encoding.name, planned.encoding.is_native) == (export.encoding, export.is_native)
        assert planned.shape == matrix.shape
        assert planned.kept_bytes == matrix.nbytes
        assert torch.equal(matrix.dequantize(torch.float64), export.loaded)
    return weights


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("shape", [(128, 16, 256), (100, 30, 544)], ids=["even", "ragged"])
def test_for_wk_and_for_the_gate(tmp_path, export, shape):
    """544 is a multiple of 32, not of 128 or 512; 100 and 30 are multiples of neither 128 nor 8."""
    d, h, k = shape
    wk, gate = EXPORTS[export](d, k), EXPORTS[export](h, k)
    check(checkpoint(tmp_path / "both", wk, gate), wk, gate)
    plain = bf16(h, k)
    check(checkpoint(tmp_path / "wk", wk, plain), wk, plain)
    plain = bf16(d, k)
    check(checkpoint(tmp_path / "gate", plain, gate), plain, gate)


@pytest.mark.parametrize("shape", [DEEPSEEK, GLM], ids=["deepseek", "glm"])
@pytest.mark.parametrize("export", ["fp8_block", "mxfp8", "nvfp4", "fp8_packed"])
def test_published_shapes(tmp_path, export, shape):
    d, h, k = shape
    wk, gate = EXPORTS[export](d, k), bf16(h, k)
    check(checkpoint(tmp_path, wk, gate), wk, gate)


def test_any_pair(tmp_path):
    exports = [make(128, 256) for make in EXPORTS.values()]
    for number, wk in enumerate(exports):
        layers = [
            {**named(INDEXER.format(layer), "wk", wk), **named(INDEXER.format(layer), "weights_proj", gate)}
            for layer, gate in enumerate(exports)
        ]
        tensors = {name: tensor.clone() for layer in layers for name, tensor in layer.items()}
        loaded = load(write_checkpoint(tmp_path / f"{number}", tensors))
        for layer, gate in enumerate(exports):
            assert torch.equal(loaded[layer].wk.dequantize(torch.float64), wk.loaded)
            assert torch.equal(loaded[layer].gate.dequantize(torch.float64), gate.loaded)


def test_the_reference_multiplies_every_encoding():
    """Until the kernels do: identity activations give the decoded weights."""
    for make in EXPORTS.values():
        export = make(128, 256)
        encoding = next(e for e in ENCODINGS if e.name == export.encoding)
        matrix = encoding.bind({ROLES[leaf]: tensor for leaf, tensor in export.tensors.items()})
        k, gate = reference(torch.eye(256, dtype=torch.bfloat16), ProjectionWeights.pack(matrix, matrix))
        assert torch.equal(k.T, export.loaded)
        assert torch.equal(gate.T, export.loaded)


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_scale", "scale"])
@pytest.mark.parametrize("export", ["fp8_block", "fp8_row", "fp8_tensor", "mxfp8_u8", "fp8_packed", "nvfp4", "mxfp4"])
def test_every_spelling_of_a_scale(tmp_path, export, leaf):
    wk, gate = EXPORTS[export](128, 512), bf16(16, 512)
    wk.tensors = {leaf if ROLES[name] == "scale" else name: tensor for name, tensor in wk.tensors.items()}
    check(checkpoint(tmp_path, wk, gate), wk, gate)


@pytest.mark.parametrize("export", EXPORTS)
def test_both_matrices_stored_as_one(tmp_path, export):
    both = EXPORTS[export](144, 256)
    path = write_checkpoint(tmp_path, named(STEM, "wk_weights_proj", both))
    plan, weights = Plan.of(Checkpoint(path)).layers[0], load(path)[0]
    assert torch.equal(weights.wk.dequantize(torch.float64), both.loaded[:128])
    assert torch.equal(weights.gate.dequantize(torch.float64), both.loaded[128:])
    assert plan.shape == weights.shape == (128, 16, 256)
    assert (plan.wk.kept_bytes, plan.gate.kept_bytes) == (weights.wk.nbytes, weights.gate.nbytes)
    if plan.wk.encoding.name in ("BF16", "F16", "F32", "INT4"):
        assert weights.fused_weight is not None


def test_where_the_one_is_cut_is_for_the_config_to_say(tmp_path):
    both = EXPORTS["mxfp8"](144, 256)
    path = write_checkpoint(tmp_path, named(STEM, "wk_weights_proj", both), config={"index_head_dim": 64})
    assert load(path)[0].shape == (64, 80, 256)


@pytest.mark.parametrize(
    ("export", "rows", "head_dim"), [("bf16", 128, 128), ("bf16", 100, 128), ("fp8_block", 144, 64)]
)
def test_one_that_cannot_be_cut(tmp_path, export, rows, head_dim):
    both = EXPORTS[export](rows, 256)
    path = write_checkpoint(tmp_path, named(STEM, "wk_weights_proj", both), config={"index_head_dim": head_dim})
    problem = only(problems_of(path))
    assert problem.subject == f"{STEM}wk_weights_proj.weight"
    assert problem.expected.startswith(f"{head_dim} rows of wk (index_head_dim)")


def changed(export, drop=(), **tensors):
    """The tensors of wk with some dropped or replaced, and a BF16 gate."""
    wk = {leaf: tensor for leaf, tensor in export.tensors.items() if leaf not in drop} | tensors
    return {**{f"{STEM}wk.{leaf}": tensor for leaf, tensor in wk.items()}, **named(STEM, "weights_proj", bf16(16, 256))}


U8, E4M3, E8M0 = torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu


@pytest.mark.parametrize(
    ("make", "drop", "change", "leaf", "expected", "found"),
    [
        (fp8_block, ["weight_scale_inv"], {}, "weight_scale_inv", "(FP8 128x128)", "no such tensor"),
        (fp8_block, ["weight"], {}, "weight", "a weight", "only weight_scale_inv (F32 [1, 2])"),
        (fp8_block, [], {"weight_scale_inv": torch.ones(1, 3)}, "weight_scale_inv", "MXFP8", "F32 [1, 3]"),
        (fp8_block, [], {"weight_scale_inv": torch.ones(2, 1)}, "weight_scale_inv", "per row", "F32 [2, 1]"),
        (fp8_block, [], {"weight_scale_inv": torch.ones(128, 2)}, "weight_scale_inv", "UE8M0", "F32 [128, 2]"),
        (fp8_block, [], {"weight_scale_inv": torch.ones(1, 2).double()}, "weight_scale_inv", "F32/BF16", "F64 [1, 2]"),
        (fp8_block, [], {"weight_scale_inv": torch.ones(1, 2).int()}, "weight_scale_inv", "F32/BF16", "I32 [1, 2]"),
        (fp8_block, [], {"scale": torch.ones(1, 2)}, "weight_scale_inv", "one tensor in the role of", "F32 [1, 2]"),
        (fp8_block, [], {"weight_scale_2": torch.ones(1)}, "weight_scale_2", "nothing beside", "F32 [1]"),
        (fp8_block, [], {"bias": torch.zeros(128)}, "bias", "no tensor but weight, ", "F32 [128]"),
        (fp8_block, [], {"quantizer._amax": torch.ones(1)}, "quantizer._amax", "no tensor but weight, ", "F32 [1]"),
        (bf16, [], {"weight_scale_inv": torch.ones(1, 2)}, "weight_scale_inv", "nothing beside weight (", "F32 [1, 2]"),
        (bf16, [], {"input_scale": torch.ones(1)}, "input_scale", "nothing beside weight (BF16", "F32 [1]"),
        (bf16, [], {"weight": torch.zeros(128, 256, dtype=torch.float8_e5m2)}, "weight", "a weight in", "F8_E5M2"),
        (bf16, [], {"weight": torch.zeros(128, 256, dtype=torch.bool)}, "weight", "a weight in", "BOOL [128, 256]"),
        (bf16, [], {"weight": torch.zeros(128, 256, dtype=torch.int8)}, "weight", "a weight in BF16", "I8 [128, 256]"),
        (bf16, [], {"weight": torch.zeros(9, dtype=torch.bfloat16)}, "weight", "a matrix [N, K]", "BF16 [9]"),
        (bf16, [], {"weight": torch.zeros(0, 256).bfloat16()}, "weight", "a matrix [N, K]", "BF16 [0, 256]"),
        (bf16, [], {"weight": torch.zeros(300, 256).bfloat16()}, "weight", "at most 256 rows", "BF16 [300, 256]"),
        (nvfp4, ["weight_scale_2"], {}, "weight_scale_2", "weight_global_scale F32 []/[1] (NVFP4 (", "no such tensor"),
        (nvfp4, ["weight_scale"], {}, "weight_scale", "F8_E4M3 [128, 16] (NVFP4)", "no such tensor"),
        (nvfp4, ["weight"], {}, "weight", "a weight", "only input_scale (F32 []), weight_scale"),
        (nvfp4, [], {"weight_global_scale": torch.ones(1)}, "weight_global_scale", "nothing beside", "F32 [1]"),
        (nvfp4, [], {"weight_scale_2": torch.ones(2)}, "weight_scale_2", "F32 []/[1] (NVFP4)", "F32 [2]"),
        (nvfp4, [], {"weight_scale": torch.ones(128, 15).to(E4M3)}, "weight_scale", "[128, 16]", "F8_E4M3 [128, 15]"),
        (nvfp4, [], {"weight_packed": torch.ones(1).to(U8)}, "weight_packed", "one tensor in the role of", "U8 [1]"),
        (mxfp4, [], {"weight_scale": torch.ones(128, 9).to(U8)}, "weight_scale", "[128, 8] (MXFP4)", "U8 [128, 9]"),
        (mxfp4, ["weight_scale"], {}, "weight_scale", "(NVFP4)", "no such tensor"),
        (mxfp4, [], {"weight_scale_2": torch.ones(1)}, "weight_scale_2", "nothing beside", "F32 [1]"),
        (EXPORTS["int4"], ["weight_shape"], {}, "weight_shape", "I64/I32 [2] (INT4)", "no such tensor"),
        (EXPORTS["int4"], [], {"weight_scale": torch.ones(128, 7)}, "weight_scale", "/[128, 8]", "F32 [128, 7]"),
        (EXPORTS["int4_g_idx"], [], {"weight_g_idx": torch.ones(9).int()}, "weight_g_idx", "[256] (INT4)", "I32 [9]"),
        (
            EXPORTS["int4_zero_point"], [], {"weight_zero_point": torch.ones(16, 7).int()},
            "weight_zero_point", "I32 [16, 8] (INT4)", "I32 [16, 7]",
        ),
    ],
)  # fmt: skip
def test_what_fits_no_encoding(tmp_path, make, drop, change, leaf, expected, found):
    problem = only(problems_of(write_checkpoint(tmp_path, changed(make(128, 256), drop, **change))))
    assert problem.subject == f"{STEM}wk.{leaf}"
    assert problem.file == "model-00001-of-00001.safetensors"
    assert expected in problem.expected
    assert problem.found.startswith(found)


def put(tensor, value):
    """The tensor with one element of these bits, or of this value."""
    copy = tensor.clone()
    if isinstance(value, int):
        copy.view(torch.uint8).view(-1)[-1] = value
    else:
        copy.view(-1)[-1] = value
    return copy


@pytest.mark.parametrize(
    ("export", "leaf", "value", "is_usable"),
    [
        ("bf16", "weight", torch.nan, False),
        ("bf16", "weight", -torch.inf, False),
        ("bf16", "weight", 2.0**100, True),
        ("bf16", "weight", 2.0**101, False),
        ("bf16", "weight", -(2.0**101), False),
        ("bf16", "weight", 1e-39, True),
        ("f16", "weight", torch.inf, False),
        ("f32", "weight", 3.4e38, False),
        ("fp8_block", "weight", 0x7F, False),
        ("fp8_block", "weight", 0xFF, False),
        ("fp8_block", "weight", 0x80, True),
        ("fp8_block_fnuz", "weight", 0x80, False),
        ("fp8_block_fnuz", "weight", 0x7F, True),
        ("fp8_block", "weight_scale_inv", torch.nan, False),
        ("fp8_block", "weight_scale_inv", torch.inf, False),
        ("fp8_block", "weight_scale_inv", 2.0**100, True),
        ("fp8_block", "weight_scale_inv", 2.0**101, False),
        ("fp8_block", "weight_scale_inv", 2.0**-100, True),
        ("fp8_block", "weight_scale_inv", 2.0**-101, False),
        ("fp8_block", "weight_scale_inv", 0.0, True),
        ("fp8_block_u8", "scale", 255, False),
        ("fp8_row", "weight_scale", torch.nan, False),
        ("fp8_tensor", "weight_scale", torch.inf, False),
        ("mxfp8", "weight_scale", 255, False),
        ("mxfp8", "weight_scale", 254, False),
        ("mxfp8", "weight_scale", 0, False),
        ("nvfp4", "weight_scale", 0x7F, False),
        ("nvfp4", "weight_scale", 0, True),
        ("nvfp4", "weight_scale_2", torch.nan, False),
        ("nvfp4_divisor", "weight_global_scale", 0.0, False),
        ("nvfp4_divisor", "weight_global_scale", torch.nan, False),
        ("nvfp4_divisor", "weight_global_scale", torch.inf, False),
        ("nvfp4_divisor", "weight_global_scale", -torch.inf, False),
        ("mxfp4", "weight_scale", 255, False),
        ("int4", "weight_scale", torch.inf, False),
        ("int4", "weight_scale", 2.0**97, False),
        ("int4", "weight_shape", 3, False),
        ("int4_g_idx", "weight_g_idx", -1, False),
        ("int4_g_idx", "weight_g_idx", 8, False),
    ],
)
def test_values_no_trained_matrix_has(tmp_path, export, leaf, value, is_usable):
    tensors = EXPORTS[export](128, 256).tensors
    if "g_idx" in leaf or "shape" in leaf:
        tensor = tensors[leaf].clone()
        tensor[-1] = value
    else:
        tensor = put(tensors[leaf], value)
    path = write_checkpoint(tmp_path, changed(Export({**tensors, leaf: tensor}, torch.empty(0), "")))
    if is_usable:
        assert load(path)[0].wk.dequantize().isfinite().all()
    else:
        problem = only(problems_of(path))
        assert (problem.subject, problem.advice) == (f"{STEM}wk.{leaf}", BAD_VALUES)
        assert problem.file == "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("export", ["mxfp8", "mxfp4", "fp8_block"])
def test_a_group_of_zeros_may_have_the_least_scale(tmp_path, export):
    """Quantizers take amax for the scale, and its exponent is clamped to 2**-127 where amax is 0."""
    tensors = EXPORTS[export](128, 256).tensors
    weight, scale = tensors.values()
    weight.view(U8)[:, -128 if export == "fp8_block" else -32 :] = 0
    scale[:, -1:] = torch.tensor(2.0**-127)
    loaded = load(write_checkpoint(tmp_path, changed(Export(tensors, torch.empty(0), ""))))[0].wk.dequantize()
    assert loaded.isfinite().all()
    assert (loaded[:, -32:] == 0).all()
    scale[:, -1:] = 254 if scale.dtype == U8 else 2.0**127  # infinity, once doubled in to_fnuz
    problem = only(problems_of(write_checkpoint(tmp_path, changed(Export(tensors, torch.empty(0), "")))))
    assert problem.subject.rpartition(".")[2] in list(tensors)[1:]


@pytest.mark.parametrize("leaf", ["weight", "scale"])
@pytest.mark.parametrize("export", ["bf16", "f32", "fp8_block", "fp8_row", "fp8_block_fnuz", "nvfp4", "int4"])
def test_a_hole_in_a_file_is_no_weight(tmp_path, export, leaf):
    tensors = EXPORTS[export](128, 256).tensors
    holes = [name for name in tensors if ROLES[name] == leaf]
    for name in holes:
        tensors[name].zero_()
    if export == "int4" and leaf == "weight":  # where 0 stands for -8
        return
    path = write_checkpoint(tmp_path, changed(Export(tensors, torch.empty(0), "")))
    if holes:
        problem = only(problems_of(path))
        assert problem.subject == f"{STEM}wk.{holes[0] if export != 'int4' else 'weight_packed'}"
        assert problem.found.startswith("nothing but 0")


def test_values_at_fault_come_together(tmp_path):
    tensors = changed(fp8_block(128, 256))
    damaged = {name: put(tensor, 0x7F if name == WK else torch.inf) for name, tensor in tensors.items()}
    assert [problem.subject for problem in problems_of(write_checkpoint(tmp_path, damaged))] == [WK, SCALE, GATE]


def test_problems_of_one_layer_come_together(tmp_path):
    tensors = changed(fp8_block(128, 256), weight=torch.zeros(128, 256, dtype=torch.float8_e5m2), bias=torch.zeros(128))
    tensors[GATE] = torch.zeros(16, 200, dtype=torch.int8)
    path = write_checkpoint(tmp_path, tensors, config={"index_head_dim": 64})
    assert [problem.subject for problem in problems_of(path)] == [WK, f"{STEM}wk.bias", GATE]
    (path / "config.json").write_text("{")
    assert [problem.subject for problem in problems_of(path)] == ["config.json", WK, f"{STEM}wk.bias", GATE]


def test_what_is_missing_is_named_with_what_would_do(tmp_path):
    problem = only(problems_of(write_checkpoint(tmp_path, changed(fp8_block(128, 256), ["weight_scale_inv"]))))
    assert problem.subject == SCALE
    for option in (
        "weight_scale_inv F32/BF16/F16/F8_E8M0/U8 [1, 2]/[1, 1, 2, 1] (FP8 128x128)",
        "weight_scale F32/BF16/F16 [128, 1]/[128] (FP8 per row)",
        "weight_scale F32/BF16/F16 []/[1]/[1, 1] (FP8 per tensor)",
        "weight_scale F8_E8M0/U8 [128, 8] (MXFP8)",
        "weight_scale I32 [128, 1] (FP8 packed UE8M0)",
    ):
        assert option in problem.expected
    problem = only(problems_of(write_checkpoint(tmp_path, changed(nvfp4(128, 256), ["weight_scale_2"]))))
    assert "MXFP4" not in problem.expected  # whose scale would be another one


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_groups_of_int4(tmp_path, size):
    """They are of these sizes, and all of one: 800 columns are 25 groups of 32, and not groups of anything larger."""
    wk, gate = int4_g_idx(128, 768, 768 // size), bf16(16, 768)
    wk.tensors["weight_g_idx"] = wk.tensors["weight_g_idx"].long()
    check(checkpoint(tmp_path, wk, gate), wk, gate)
    wk.tensors |= int4(128, 800, 25).tensors | {"weight_scale": torch.ones(128, 800 // size)}
    del wk.tensors["weight_g_idx"], wk.tensors["weight_zero_point"]
    path = checkpoint(tmp_path, wk, bf16(16, 800))
    if size == 32:
        assert load(path)[0].shape == (128, 16, 800)
    else:
        assert only(problems_of(path)).subject == f"{STEM}wk.weight_scale"


@pytest.mark.parametrize("encoding", ENCODINGS, ids=lambda encoding: encoding.name)
def test_every_encoding_says_where_it_comes_from(encoding):
    assert type(encoding).__doc__.count("Source: ") == 1 or encoding.name in ("F16", "F32")


def test_every_encoding_is_tested():
    assert {make(128, 256).encoding for make in EXPORTS.values()} == {encoding.name for encoding in ENCODINGS}
