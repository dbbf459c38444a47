"""Values that no trained matrix has are refused, and the error names the tensor."""

import pytest
import torch

from exports import EXPORTS, Export, layer_of, refused, renamed, stream
from indexproj.loading import load
from indexproj.loading.headers import ROLES
from indexproj.loading.layer import BAD_VALUES
from support import GATE, INDEXER, SCALE, WK, only, write_checkpoint

STEM = INDEXER.format(0)
NAN, INF = torch.nan, torch.inf


def changed(export, role, change):
    """Layer 0 with a BF16 gate and an exported wk, one of whose tensors, given by role or name, is changed."""
    tensors = EXPORTS[export](128, 256).tensors
    leaf = next(leaf for leaf in tensors if role in (leaf, ROLES[leaf]))
    return layer_of(Export({**tensors, leaf: change(tensors[leaf].clone())}, None, "")), f"{STEM}wk.{leaf}"


def put(value):
    """Replaces the last element, or the bits of the last code."""

    def change(tensor):
        (tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor).view(-1)[-1] = value
        return tensor

    return change


def times(factors):
    return lambda t: (t.float() * factors).to(t.dtype)


def filled(byte):
    return lambda t: torch.full_like(t.view(torch.uint8), byte).view(t.dtype)


# Export and tensor -> values that load, values that do not; integers are bits of codes and scales.
VALUES = {
    "bf16 weight": ([2.0**33, 1e-39], [NAN, -INF, 2.0**101, -(2.0**101)]),
    "f32 weight": ([], [3.4e38]),
    "fp8_block weight": ([0x80], [0x7F, 0xFF]), "fp8_block_fnuz weight": ([0x7F, 0xFF], [0x80]),
    "mxfp8 weight": ([], [0xFF]),
    "fp8_block weight_scale_inv": ([2.0**24, 2.0**-100], [NAN, INF, 2.0**101, 2.0**-101, 0.0]),
    "fp8_block_fnuz weight_scale_inv": ([2.0**24], [NAN, 2.0**102]),
    "fp8_block_u8 scale": ([], [255]), "fp8_row weight_scale": ([], [NAN]),
    "mxfp8 weight_scale": ([], [255, 254, 0]), "fp8_packed weight_scale_inv": ([], [-1]),
    "nvfp4 weight_scale": ([], [0x7F, 0]), "nvfp4 weight_scale_2": ([], [NAN]),
    "nvfp4_divisor weight_global_scale": ([], [0.0, NAN, INF, -INF]),
    "mxfp4 weight_scale": ([], [255]), "int4 weight_shape": ([], [3]), "int4_g_idx weight_g_idx": ([], [-1, 8]),
    "int4 weight_scale": ([2.0**28, -1.0], [INF, NAN, 2.0**101, 0.0, 2.0**-101]),
}  # fmt: skip
ZERO, SIZE = "nothing but 0", "magnitudes from "
# Export, tensor by role or name, its change -> start of what is found instead of good values; None if it loads.
CHANGES = [
    *((*where.split(), put(value), None) for where, (good, _) in VALUES.items() for value in good),
    *((*where.split(), put(value), "") for where, (_, bad) in VALUES.items() for value in bad),
    # Zeros are what an unfinished download leaves; in INT4's weight, 0 stands for -8.
    *((export, "weight", filled(0), ZERO) for export in ("bf16", "f32", "fp8_block_fnuz", "fp8_row", "int4")),
    *((export, "scale", torch.zeros_like, ZERO) for export in ("fp8_block", "fp8_row", "nvfp4", "int4")),
    *((export, "weight", filled(0x80), ZERO) for export in ("fp8_block", "mxfp8")),
    ("fp8_block_fnuz", "weight", filled(0x80), "32768 NaN or infinite of 32768"),  # 0x80 is its NaN
    ("nvfp4", "weight", filled(0x88), ZERO),
    ("nvfp4", "scale_2", times(0), ZERO),
    ("fp8_block", "scale", times(torch.tensor([1.0, 0.0])), "magnitudes from 0.0e+00"),
    *(("bf16", "weight", times(factor), None) for factor in (1e-11, 1e8)),
    *(("bf16", "weight", times(factor), SIZE) for factor in (1e-13, 1e11)),
    *(("mxfp4", "weight", lambda t, half=half: t & half, None) for half in (0x0F, 0xF0)),
    # Scales that are misread: by 2**40, and E5M3 as E8M0
    ("mxfp8_u8", "scale", lambda t: t + 40, SIZE),
    ("mxfp4", "scale", lambda t: torch.randint_like(t, 64, 80), SIZE),
]


@pytest.mark.parametrize(("export", "role", "change", "found"), CHANGES)
def test_bad_value(tmp_path, export, role, change, found):
    tensors, name = changed(export, role, change)
    if found is None:
        assert load(write_checkpoint(tmp_path, tensors))[0].wk.dequantize().isfinite().all()
        return
    problem = only(refused(tmp_path, tensors))
    if found == SIZE:
        name = next(name for name in tensors if "wk.weight" in name)
        assert problem.expected == "a largest magnitude from 1e-10 to 1e+10"
    assert (problem.subject, problem.advice) == (name, BAD_VALUES)
    assert problem.found.startswith(found)


@pytest.mark.parametrize("export", ["mxfp8", "mxfp4", "fp8_block", "fp8_block_fnuz"])
def test_smallest_scale_for_group_of_zeros(tmp_path, export):
    """Quantizers derive the scale from amax and clamp its exponent to 2**-127 where amax is 0."""
    wk = EXPORTS[export](128, 256)
    weight, scale = wk.tensors.values()
    weight.view(torch.uint8)[:, -128 if export.startswith("fp8_block") else -32 :] = 0
    scale[:, -1:] = torch.tensor(2.0**-127)
    loaded = load(write_checkpoint(tmp_path, layer_of(wk)))[0].wk.dequantize()
    assert loaded.isfinite().all()
    assert (loaded[:, -32:] == 0).all()
    scale[:, -1:] = 254 if scale.dtype == torch.uint8 else 2.0**127
    assert only(refused(tmp_path, layer_of(wk))).subject == f"{STEM}wk.{list(wk.tensors)[1]}"


def test_bad_values_come_together(tmp_path):
    tensors = layer_of("fp8_block")
    damaged = {name: put(0x7F if name == WK else INF)(tensor) for name, tensor in tensors.items()}
    subjects = [problem.subject for problem in refused(tmp_path, damaged | renamed(damaged, "layers.0", "layers.1"))]
    assert subjects == [name.replace("layers.0", f"layers.{n}") for n in (0, 1) for name in (SCALE, WK, GATE)]


ROWS, COLUMNS = torch.arange(128)[:, None], torch.arange(256)
# Export, role, change of its tensor -> what the one warning says.
ODD = [
    *((export, "weight", times(ROWS < 64), "zeros in rows 64-127") for export in ("bf16", "fp8_block", "nvfp4")),
    ("fp8_block", "weight", times(COLUMNS < 128), "1 blocks of zeros, the first in rows 0-127, columns 128-255"),
    ("mxfp8", "weight", times(COLUMNS < 224), "128 blocks of zeros, the first in rows 0-0, columns 224-255"),
    ("fp8_row", "weight", times(ROWS % 64 > 0), "zeros in rows 0, 64"),
    ("mxfp4", "weight", lambda t: torch.where(ROWS >= 64, 0x80 | 8, t).to(t.dtype), "zeros in rows 64-127"),
    ("fp8_block", "scale", times(-1), "2 negative values in scale"),
    ("nvfp4", "scale_2", times(-1), "128 negative values in global_scale"),
    ("int4", "scale", lambda t: torch.where(torch.arange(8) > 0, t, -t), "128 negative values in scale"),
    ("int4", "weight", times(ROWS < 64), "words of 0 in rows 64-127"),
]  # fmt: skip


@pytest.mark.parametrize(("export", "role", "change", "found"), ODD)
def test_odd_values_load_with_one_warning(tmp_path, caplog, export, role, change, found):
    """Pruned heads exist, and so do half-written files. INT4 is rounded too."""
    odd, _ = changed(export, role, change)
    layers = layer_of(export) | renamed(odd, "layers.0", "layers.1") | renamed(odd, "layers.0", "layers.2")
    write_checkpoint(tmp_path, layers)
    for run in (lambda: load(tmp_path), lambda: stream(layers, range(3))):
        assert list(run()) == [0, 1, 2]
        lines = only(caplog.records).getMessage().splitlines()
        caplog.clear()
        warning = only([line for line in lines if "rounded" not in line])
        assert "layers.{1-2}.self_attn.indexer.wk.weight" in warning
        assert f"found {found}; loaded nevertheless" in warning


def test_rounding_is_one_warning(tmp_path, caplog):
    """It names the layers; a trainer's F32 copy of BF16 values loses nothing and gets none."""
    tensors = layer_of("bf16")
    for layer in (1, 2, 3):
        tensors |= layer_of("bf16", "f32", layer)
    load(write_checkpoint(tmp_path, {name: tensor.float() for name, tensor in tensors.items()}))
    message = only(caplog.records).getMessage()
    assert "layers.{1-3}.self_attn.indexer.weights_proj.weight" in message
    assert message.endswith("expected values that BF16 holds, found F32 [16, 256]; rounded to BF16")
