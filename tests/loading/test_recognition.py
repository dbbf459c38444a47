"""Names of tensors, and tensors that fit no encoding: errors name the tensor, what would fit, and what is there."""

import itertools
from functools import partial

import pytest
import torch

from exports import EXPORTS, Export, bf16, fp8_block, layer_of, mxfp4, named, nvfp4, refused, stream_problems
from indexproj.loading import CheckpointError, Problem
from indexproj.loading.headers import ROLES, UNUSED, parse
from support import GATE, INDEXER, WK, invoke, only, problems_of, write_checkpoint

STEM = INDEXER.format(0)
U8, E4M3 = torch.uint8, torch.float8_e4m3fn


def changed(export, drop=(), **tensors):
    """Layer 0 with wk's tensors dropped or replaced, and a BF16 gate."""
    wk = {leaf: tensor for leaf, tensor in export.tensors.items() if leaf not in drop} | tensors
    return layer_of(Export(wk, export.values, ""))


SCALE, NO, int4 = "weight_scale_inv", "no such tensor", EXPORTS["int4_g_idx"]


@pytest.mark.parametrize(
    ("make", "drop", "change", "leaf", "expected", "found"),
    [
        (
            fp8_block, [SCALE], {}, SCALE,
            "one of weight_scale_inv F32/BF16/F16/F8_E8M0/U8 [1, 2]/[1, 1, 2, 1] (FP8 128x128), "
            "weight_scale F32/BF16/F16 [128, 1]/[128] (FP8 per row), "
            "_weight_scale F32/BF16 [128, 1] (FP8 per row (torchao)), "
            "weight_scale F32/BF16/F16 []/[1]/[1, 1] (FP8 per tensor), weight_scale F8_E8M0/U8 [128, 8] (MXFP8), "
            "weight_scale I32 [128, 1] (FP8 packed UE8M0)", NO,
        ),
        (fp8_block, ["weight"], {}, "weight", "a weight", "only weight_scale_inv (F32 [1, 2])"),
        *(
            (fp8_block, [], {SCALE: torch.ones(*shape).to(dtype)}, SCALE, expected, found)
            for shape, dtype, expected, found in (
                ((1, 3), torch.float32, "MXFP8", "F32 [1, 3]"), ((2, 1), torch.float32, "per row", "F32 [2, 1]"),
                ((128, 8), torch.float32, "MXFP8", "F32 [128, 8]"), ((128, 8), torch.int8, "MXFP8", "I8 [128, 8]"),
                ((1, 2), torch.float64, "F32/BF16", "F64 [1, 2]"), ((1, 2), torch.int32, "F32/BF16", "I32 [1, 2]"),
                ((128, 2), torch.int32, "UE8M0", "I32 [128, 2]"), ((128, 2), U8, "MXFP8", "U8 [128, 2]"),
            )
        ),
        (fp8_block, [], {"scale": torch.ones(1, 2)}, SCALE, "one tensor in the role of", "F32 [1, 2]"),
        (fp8_block, [], {"weight_scale_2": torch.ones(1)}, "weight_scale_2", "nothing beside", "F32 [1]"),
        *(
            (make, [], {leaf: torch.zeros(128)}, leaf, f"no suffix but {', '.join(ROLES)}", "F32 [128]")
            for leaf in ("bias", "quantizer._amax", "weight_scales", "scale_inv", "qweight", "", "\x1b[2J\n\u202e")
            for make in (fp8_block, bf16)
        ),
        (bf16, [], {SCALE: torch.ones(1, 2)}, SCALE, "nothing beside weight (", "F32 [1, 2]"),
        *(
            (bf16, [], {"weight": torch.zeros(128, 256).to(dtype)}, "weight", "a weight in BF16", f"{name} [128, 256]")
            for dtype, name in (
                (torch.float8_e5m2, "F8_E5M2"), (torch.float8_e5m2fnuz, "F8_E5M2FNUZ"), (torch.bool, "BOOL"),
                (torch.int8, "I8"),
            )
        ),
        (bf16, [], {"weight": torch.zeros(9, dtype=torch.bfloat16)}, "weight", "a matrix [N, K]", "BF16 [9]"),
        (bf16, [], {"weight": torch.zeros(0, 256).bfloat16()}, "weight", "a matrix [N, K]", "BF16 [0, 256]"),
        (nvfp4, ["weight_scale_2"], {}, "weight_scale_2", "weight_global_scale F32 []/[1] (NVFP4 (", NO),
        (nvfp4, [], {"weight_global_scale": torch.ones(1)}, "weight_global_scale", "nothing beside", "F32 [1]"),
        (nvfp4, [], {"weight_scale_2": torch.ones(2)}, "weight_scale_2", "F32 []/[1] (NVFP4)", "F32 [2]"),
        (nvfp4, [], {"weight_scale": torch.ones(128, 15).to(E4M3)}, "weight_scale", "[128, 16]", "F8_E4M3 [128, 15]"),
        (nvfp4, [], {"weight_packed": torch.ones(1).to(U8)}, "weight_packed", "one tensor in the role of", "U8 [1]"),
        (mxfp4, [], {"weight_scale": torch.ones(128, 9).to(U8)}, "weight_scale", "[128, 8] (MXFP4)", "U8 [128, 9]"),
        (mxfp4, ["weight_scale"], {}, "weight_scale", "(NVFP4)", NO),
        (int4, [], {"weight_scale": torch.ones(128, 7)}, "weight_scale", "/[128, 8]", "F32 [128, 7]"),
        (int4, [], {"weight_g_idx": torch.ones(9).int()}, "weight_g_idx", "[256] (INT4)", "I32 [9]"),
        (int4, [], {"weight_zero_point": torch.ones(16, 7).int()}, "weight_zero_point", "I32 [16, 8]", "I32 [16, 7]"),
    ],
)  # fmt: skip
def test_tensors_that_fit_no_encoding(tmp_path, make, drop, change, leaf, expected, found):
    problem = only(refused(tmp_path, changed(make(128, 256), drop, **change)))
    assert (problem.subject, problem.file) == (f"{STEM}wk.{leaf}", "model-00001-of-00001.safetensors")
    assert expected in problem.expected
    assert problem.found.startswith(found)


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("matrix", ["wk", "weights_proj", "wk_weights_proj"])
def test_no_tensor_of_an_encoding_is_optional(matrix, export):
    """Except INT4's zero points and g_idx, and scales of activations."""
    other = {"wk": "weights_proj", "weights_proj": "wk"}.get(matrix)
    tensors = named(STEM, other, bf16(128, 256)) if other else {}
    exported = named(STEM, matrix, EXPORTS[export](144, 256))
    for name in exported:
        if not name.endswith(("zero_point", "g_idx", "input_scale")):
            rest = {n: t for n, t in (tensors | exported).items() if n != name}
            problem = only(stream_problems(rest, config={"index_head_dim": 128}))
            assert problem.subject.startswith(f"{STEM}{matrix}.") or (not tensors and len(exported) == 1)
            assert name.rpartition(".")[2] in str(problem) or name.endswith(("weight", "packed", "qdata"))


def test_problems_of_one_layer_come_together(tmp_path):
    tensors = changed(fp8_block(128, 256), weight=torch.zeros(128, 256, dtype=torch.float8_e5m2), bias=torch.zeros(128))
    tensors[GATE] = torch.zeros(16, 200, dtype=torch.int8)
    problems = refused(tmp_path, tensors, {"index_head_dim": 64})
    assert [problem.subject for problem in problems] == [WK, f"{STEM}wk.bias", GATE]
    (tmp_path / "config.json").write_text("{")
    assert [problem.subject for problem in problems_of(tmp_path)] == ["config.json", WK, f"{STEM}wk.bias", GATE]
    problem = only(refused(tmp_path / "nvfp4", changed(nvfp4(128, 256), ["weight_scale_2"])))
    assert "MXFP4" not in problem.expected  # its scale has another dtype
    problems = refused(tmp_path / "int4", changed(int4(128, 256), ["weight_scale", "weight_shape"]))
    assert [problem.subject for problem in problems] == [f"{STEM}wk.weight_scale", f"{STEM}wk.weight_shape"]


PREFIXES = "model.", "", "base-model.", "model.language_model.", "language_model.model."
# What stands between prefix and "indexer." -> index in a model of 61 hidden layers.
MIDDLES = {"layers.60.self_attn": 60, "mtp_layers.1.self_attn": 62, "layers.3.attn": 3, "mtp.0.attn": 61}
LEAVES = {
    "weight": "weight", "weight_packed": "weight", "weight_scale_inv": "scale", "weight_scale": "scale",
    "scale": "scale", "weight_scale_2": "scale_2", "bias": ".bias", "weight.packed": ".weight.packed",
    "shape": ".shape", "": ".", "weight\n": ".weight\n",
    # A smoothing scale changes weights, unlike scales of activations.
    "input_pre_quant_scale": ".input_pre_quant_scale", "input_scales": ".input_scales", "scale_2": ".scale_2",
    **dict.fromkeys(("input_scale", "input_scale_3", "input_scale_inv", "input_global_scale", "act_scale"), UNUSED),
    **dict.fromkeys(("activation_scale", "output_zero_point", "input_amax"), UNUSED),
}  # fmt: skip


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("middle", MIDDLES)
def test_parse_projection(middle, leaf):
    for prefix in PREFIXES:
        for matrix in ("wk", "weights_proj", "wk_weights_proj"):
            stem = f"{prefix}{middle}.indexer."
            tensor = parse(f"{stem}{matrix}.{leaf}")
            assert (tensor.stem, tensor.role) == (stem, LEAVES[leaf])
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


int32 = partial(torch.ones, dtype=torch.int32)
SCALES = {"scales": torch.ones(2, 128).half()}
FOREIGN = {
    "GPTQ, 4 bit": SCALES | {"qweight": int32(32, 128), "qzeros": int32(2, 16), "g_idx": int32(256)},
    "GPTQ, 8 bit": SCALES | {"qweight": int32(64, 128), "qzeros": int32(2, 32)},
    "AWQ, 4 bit": SCALES | {"qweight": int32(256, 16), "qzeros": int32(2, 16)},
    "GPTQ or AWQ": {"qweight": int32(32, 128)},
    "INT8": {"weight": torch.zeros(128, 256).char(), "weight_scale": torch.ones(128, 1)},
    "MLX": {"weight": torch.zeros(128, 32, dtype=torch.uint32), "scales": torch.ones(128, 4)},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_formats(tmp_path, name):
    """62 layers: one line per matrix, with the quantizer's name, and fewer than 25 lines in all."""
    tensors = {}
    for layer, matrix in itertools.product(range(62), ("wk", "weights_proj")):
        tensors |= {f"{INDEXER.format(layer)}{matrix}.{leaf}": each.clone() for leaf, each in FOREIGN[name].items()}
    result = invoke("audit", write_checkpoint(tmp_path, tensors, config={"num_hidden_layers": 61}), code=2)
    assert len(result.output.splitlines()) < 25
    _, *lines = result.stderr.splitlines()
    assert len(lines) == 2
    for part in (".layers.{0-61}.self_attn.", f"{name} is not supported", "requantize it to"):
        assert all(part in line for line in lines)


def test_problems_of_layers_share_a_line():
    """Problems that differ only in layers and shards. A second copy names two shards."""
    stem, shard = "model.layers.{}.self_attn.indexer.wk", "model-{:05d}-of-00163.safetensors"
    alike = [
        Problem(f"{stem.format(n)}.bias", shard.format(n + 20), f"nothing beside {stem.format(n)}", shard.format(n))
        for n in (0, 1, 2, 10)
    ]
    one, shards = stem.format("{0-2, 10}"), "model-{{{}}}-of-00163.safetensors"
    found = f"expected nothing beside {one}, found {shards.format('00000-00002, 00010')}"
    lines = [f"{one}.bias in {shards.format('00020-00022, 00030')}: {found}", "config.json: expected a, found b"]
    problems = [*alike, Problem("config.json", "", "a", "b"), Problem("config.json", "", "a", "c")]
    assert str(CheckpointError(problems)).split("\n  ") == ["6 problems:", *lines, "config.json: expected a, found c"]
    assert str(CheckpointError(alike[:1])) == str(alike[0])
    assert str(Problem("\x1b[2J\n\u202e", "", "a", "b")) == "\\x1b[2J\\n\\u202e: expected a, found b"
    for subject in ("layer {}", "mtp.{}.attn.indexer.wk.weight", "part{}.safetensors"):
        message = str(CheckpointError(Problem(subject.format(n), "", "a", "b") for n in (4, 5)))
        assert message == f"2 problems:\n  {subject.format('{4-5}')}: expected a, found b"
