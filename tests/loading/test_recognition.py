"""Tensors that fit no encoding: each error names the tensor, what would fit, and what is there."""

import pytest
import torch

from exports import EXPORTS, Export, bf16, fp8_block, layer_of, mxfp4, named, nvfp4, refused, stream_problems
from indexproj.loading.headers import ROLES
from support import GATE, INDEXER, WK, only, problems_of

STEM = INDEXER.format(0)
U8, E4M3 = torch.uint8, torch.float8_e4m3fn


def changed(export, drop=(), **tensors):
    """Layer 0 with wk's tensors dropped or replaced, and a BF16 gate."""
    wk = {leaf: tensor for leaf, tensor in export.tensors.items() if leaf not in drop} | tensors
    return layer_of(Export(wk, export.values, ""))


SCALE, NO = "weight_scale_inv", "no such tensor"


@pytest.mark.parametrize(
    ("make", "drop", "change", "leaf", "expected", "found"),
    [
        (fp8_block, [SCALE], {}, SCALE, "(FP8 128x128)", NO),
        (fp8_block, ["weight"], {}, "weight", "a weight", "only weight_scale_inv (F32 [1, 2])"),
        *(
            (fp8_block, [], {SCALE: torch.ones(*shape).to(dtype)}, SCALE, expected, found)
            for shape, dtype, expected, found in (
                ((1, 3), torch.float32, "MXFP8", "F32 [1, 3]"), ((2, 1), torch.float32, "per row", "F32 [2, 1]"),
                ((2, 2), torch.float32, "[1, 2]", "F32 [2, 2]"), ((128, 2), torch.float32, "UE8M0", "F32 [128, 2]"),
                ((128, 8), torch.float32, "MXFP8", "F32 [128, 8]"), ((2,), torch.float32, "MXFP8", "F32 [2]"),
                ((1, 2), torch.float64, "F32/BF16", "F64 [1, 2]"), ((1, 2), torch.int32, "F32/BF16", "I32 [1, 2]"),
                ((128, 2), torch.int32, "UE8M0", "I32 [128, 2]"), ((128, 2), U8, "MXFP8", "U8 [128, 2]"),
                ((128, 8), torch.int8, "MXFP8", "I8 [128, 8]"),
            )
        ),
        (fp8_block, [], {"scale": torch.ones(1, 2)}, SCALE, "one tensor in the role of", "F32 [1, 2]"),
        (fp8_block, [], {"weight_scale_2": torch.ones(1)}, "weight_scale_2", "nothing beside", "F32 [1]"),
        *(
            (make, [], {leaf: torch.zeros(128)}, leaf, f"no suffix but {', '.join(ROLES)}", "F32 [128]")
            for leaf in ("bias", "quantizer._amax", "weight_scales", "weight_scale_3", "scale_inv", "qweight", "")
            for make in (fp8_block, bf16)
        ),
        (bf16, [], {SCALE: torch.ones(1, 2)}, SCALE, "nothing beside weight (", "F32 [1, 2]"),
        *(
            (bf16, [], {"weight": torch.zeros(128, 256).to(dtype)}, "weight", "a weight in BF16", found)
            for dtype, found in (
                (torch.float8_e5m2, "F8_E5M2 "), (torch.float8_e5m2fnuz, "F8_E5M2FNUZ "),
                (torch.bool, "BOOL [128, 256]"), (torch.int8, "I8 [128, 256]"),
            )
        ),
        (bf16, ["weight"], {"weight_scale": torch.ones(128, 256)}, "weight", "a weight", "only weight_scale (F32"),
        (bf16, [], {"weight": torch.zeros(9, dtype=torch.bfloat16)}, "weight", "a matrix [N, K]", "BF16 [9]"),
        (bf16, [], {"weight": torch.zeros(0, 256).bfloat16()}, "weight", "a matrix [N, K]", "BF16 [0, 256]"),
        (nvfp4, ["weight_scale_2"], {}, "weight_scale_2", "weight_global_scale F32 []/[1] (NVFP4 (", NO),
        (nvfp4, ["weight_scale"], {}, "weight_scale", "F8_E4M3 [128, 16] (NVFP4)", NO),
        (nvfp4, ["weight"], {}, "weight", "a weight", "only weight_scale ("),
        (nvfp4, [], {"weight_global_scale": torch.ones(1)}, "weight_global_scale", "nothing beside", "F32 [1]"),
        (nvfp4, [], {"weight_scale_2": torch.ones(2)}, "weight_scale_2", "F32 []/[1] (NVFP4)", "F32 [2]"),
        (nvfp4, [], {"weight_scale": torch.ones(128, 15).to(E4M3)}, "weight_scale", "[128, 16]", "F8_E4M3 [128, 15]"),
        (nvfp4, [], {"weight_packed": torch.ones(1).to(U8)}, "weight_packed", "one tensor in the role of", "U8 [1]"),
        (mxfp4, [], {"weight_scale": torch.ones(128, 9).to(U8)}, "weight_scale", "[128, 8] (MXFP4)", "U8 [128, 9]"),
        (mxfp4, ["weight_scale"], {}, "weight_scale", "(NVFP4)", NO),
        (mxfp4, [], {"weight_scale_2": torch.ones(1)}, "weight_scale_2", "nothing beside", "F32 [1]"),
        (EXPORTS["int4"], ["weight_shape"], {}, "weight_shape", "I64/I32 [2] (INT4)", NO),
        (EXPORTS["int4"], [], {"weight_scale": torch.ones(128, 7)}, "weight_scale", "/[128, 8]", "F32 [128, 7]"),
        (EXPORTS["int4_g_idx"], [], {"weight_scale": torch.ones(128, 16)}, "weight_scale", "[128, 8]", "F32 [128, 16]"),
        (EXPORTS["int4_g_idx"], [], {"weight_g_idx": torch.ones(9).int()}, "weight_g_idx", "[256] (INT4)", "I32 [9]"),
        (
            EXPORTS["int4_zero_point"], [], {"weight_zero_point": torch.ones(16, 7).int()},
            "weight_zero_point", "I32 [16, 8] (INT4)", "I32 [16, 7]",
        ),
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


def test_missing_scale_lists_all_that_would_fit(tmp_path):
    problem = only(refused(tmp_path, changed(fp8_block(128, 256), ["weight_scale_inv"])))
    for option in (
        "weight_scale_inv F32/BF16/F16/F8_E8M0/U8 [1, 2]/[1, 1, 2, 1] (FP8 128x128)",
        "weight_scale F32/BF16/F16 [128, 1]/[128] (FP8 per row)",
        "weight_scale F32/BF16/F16 []/[1]/[1, 1] (FP8 per tensor)",
        "weight_scale F8_E8M0/U8 [128, 8] (MXFP8)",
        "weight_scale I32 [128, 1] (FP8 packed UE8M0)",
    ):
        assert option in problem.expected
    problem = only(refused(tmp_path, changed(nvfp4(128, 256), ["weight_scale_2"])))
    assert "MXFP4" not in problem.expected  # its scale has another dtype


def test_problems_of_one_layer_come_together(tmp_path):
    tensors = changed(fp8_block(128, 256), weight=torch.zeros(128, 256, dtype=torch.float8_e5m2), bias=torch.zeros(128))
    tensors[GATE] = torch.zeros(16, 200, dtype=torch.int8)
    problems = refused(tmp_path, tensors, {"index_head_dim": 64})
    assert [problem.subject for problem in problems] == [WK, f"{STEM}wk.bias", GATE]
    (tmp_path / "config.json").write_text("{")
    assert [problem.subject for problem in problems_of(tmp_path)] == ["config.json", WK, f"{STEM}wk.bias", GATE]
    problems = refused(tmp_path / "int4", changed(EXPORTS["int4"](128, 256), ["weight_scale", "weight_shape"]))
    assert [problem.subject for problem in problems] == [f"{STEM}wk.weight_scale", f"{STEM}wk.weight_shape"]
