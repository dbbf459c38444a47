"""Values that no trained matrix has are refused, and the error names the tensor."""

import pytest
import torch

from exports import EXPORTS, Export, layer_of, stream
from indexproj.loading import Assembly, load
from indexproj.loading.headers import ROLES
from indexproj.loading.layer import BAD_VALUES
from support import GATE, INDEXER, SCALE, WK, only, problems_of, write_checkpoint

STEM = INDEXER.format(0)


def write(path, tensors):
    """Layer 0 with these tensors for wk, and a BF16 gate."""
    return write_checkpoint(path, layer_of(Export(tensors, None, "")))


def put(tensor, value):
    """The tensor with its last element, or the bits of its last code, replaced."""
    copy = tensor.clone()
    is_byte = tensor.element_size() == 1
    (copy.view(torch.uint8) if is_byte else copy).view(-1)[-1] = value
    return copy


NAN, INF = torch.nan, torch.inf
# Export and tensor -> values that load, values that do not; integers are bits of codes and scales.
VALUES = {
    "bf16 weight": ([2.0**100, 1e-39], [NAN, -INF, 2.0**101, -(2.0**101)]),
    "f16 weight": ([], [INF]),
    "f32 weight": ([], [3.4e38]),
    "fp8_block weight": ([0x80], [0x7F, 0xFF]),
    "fp8_block_fnuz weight": ([0x7F, 0xFF], [0x80]),
    "fp8_row weight": ([0x80], [0xFF]),
    "fp8_tensor weight": ([], [0x7F]),
    "mxfp8 weight": ([], [0xFF]),
    "fp8_packed weight": ([], [0x7F]),
    "fp8_block weight_scale_inv": ([2.0**100, 2.0**-100], [NAN, INF, 2.0**101, 2.0**-101, 0.0]),
    "fp8_block_fnuz weight_scale_inv": ([2.0**101], [NAN, 2.0**102]),
    "fp8_block_u8 scale": ([], [255]),
    "fp8_row weight_scale": ([], [NAN]),
    "fp8_tensor weight_scale": ([], [INF]),
    "mxfp8 weight_scale": ([], [255, 254, 0]),
    "fp8_packed weight_scale_inv": ([], [-1]),
    "nvfp4 weight_scale": ([], [0x7F, 0]),
    "nvfp4 weight_scale_2": ([], [NAN]),
    "nvfp4_divisor weight_global_scale": ([], [0.0, NAN, INF, -INF]),
    "mxfp4 weight_scale": ([], [255]),
    "int4 weight_scale": ([2.0**97, -1.0], [INF, NAN, 2.0**101, 0.0, 2.0**-101]),
    "int4 weight_shape": ([], [3]),
    "int4_g_idx weight_g_idx": ([], [-1, 8]),
}


@pytest.mark.parametrize(
    ("where", "value", "is_usable"),
    [(where, value, good) for where, lists in VALUES.items() for good in (1, 0) for value in lists[1 - good]],
)
def test_bad_value(tmp_path, where, value, is_usable):
    export, leaf = where.split()
    tensors = EXPORTS[export](128, 256).tensors
    path = write(tmp_path, {**tensors, leaf: put(tensors[leaf], value)})
    if is_usable:
        assert load(path)[0].wk.dequantize().isfinite().all()
    else:
        problem = only(problems_of(path))
        assert (problem.subject, problem.advice) == (f"{STEM}wk.{leaf}", BAD_VALUES)
        assert problem.file == "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("export", ["mxfp8", "mxfp4", "fp8_block", "fp8_block_fnuz"])
def test_smallest_scale_for_group_of_zeros(tmp_path, export):
    """Quantizers derive the scale from amax and clamp its exponent to 2**-127 where amax is 0."""
    tensors = EXPORTS[export](128, 256).tensors
    weight, scale = tensors.values()
    weight.view(torch.uint8)[:, -128 if export.startswith("fp8_block") else -32 :] = 0
    scale[:, -1:] = torch.tensor(2.0**-127)
    loaded = load(write(tmp_path, tensors))[0].wk.dequantize()
    assert loaded.isfinite().all()
    assert (loaded[:, -32:] == 0).all()
    scale[:, -1:] = 254 if scale.dtype == torch.uint8 else 2.0**127
    assert only(problems_of(write(tmp_path, tensors))).subject == f"{STEM}wk.{list(tensors)[1]}"


@pytest.mark.parametrize("role", ["weight", "scale"])
@pytest.mark.parametrize("export", ["bf16", "f32", "fp8_block", "fp8_row", "fp8_block_fnuz", "nvfp4", "int4"])
def test_only_zeros(tmp_path, export, role):
    """What an unfinished download leaves; in INT4's weight, 0 stands for -8."""
    tensors = EXPORTS[export](128, 256).tensors
    leaves = [leaf for leaf in tensors if ROLES[leaf] == role and (export, role) != ("int4", "weight")]
    for leaf in leaves:
        tensors[leaf].zero_()
    path = write(tmp_path, tensors)
    if leaves:
        problem = only(problems_of(path))
        assert problem.subject == f"{STEM}wk.{leaves[0]}"
        assert problem.found.startswith("nothing but 0")
    else:
        assert list(load(path)) == [0]


def test_bad_values_come_together(tmp_path):
    tensors = layer_of("fp8_block")
    damaged = {name: put(tensor, 0x7F if name == WK else torch.inf) for name, tensor in tensors.items()}
    damaged |= {name.replace("layers.0", "layers.1"): tensor.clone() for name, tensor in damaged.items()}
    subjects = [problem.subject for problem in problems_of(write_checkpoint(tmp_path, damaged))]
    assert subjects == [name.replace("layers.0", f"layers.{n}") for n in (0, 1) for name in (SCALE, WK, GATE)]


HALF = torch.arange(128)[:, None] >= 64


def times(factors):
    return lambda t: (t.float() * factors).to(t.dtype)


# Export, role, change of its tensor -> what the one warning says.
ODD = [
    ("bf16", "weight", times(~HALF), "zeros in rows 64-127"),
    ("fp8_block", "weight", times(~HALF), "zeros in rows 64-127"),
    ("fp8_block", "weight", times(torch.arange(256) < 128),
     "1 blocks of zeros, the first in rows 0-127, columns 128-255"),
    ("fp8_row", "weight", times(torch.arange(128)[:, None] % 64 > 0), "zeros in rows 0, 64"),
    ("mxfp8", "weight", times(torch.arange(256) < 224),
     "128 blocks of zeros, the first in rows 0-0, columns 224-255"),
    ("nvfp4", "weight", times(~HALF), "zeros in rows 64-127"),
    ("mxfp4", "weight", lambda t: torch.where(HALF, 0x80 | 8, t).to(t.dtype), "zeros in rows 64-127"),
    ("fp8_block", "scale", times(-1), "2 negative values in scale"),
    ("fp8_row", "scale", lambda t: t.index_fill(0, torch.tensor([5]), -1.0), "1 negative values in scale"),
    ("nvfp4", "scale_2", times(-1), "128 negative values in global_scale"),
    ("int4", "scale", lambda t: torch.where(torch.arange(8) > 0, t, -t), "128 negative values in scale"),
    ("int4_g_idx", "scale", times(-1), "1024 negative values in scale"),
    ("int4", "weight", times(~HALF), "words of 0 in rows 64-127"),
]  # fmt: skip


@pytest.mark.parametrize(("export", "role", "change", "found"), ODD)
def test_odd_values_load_with_one_warning(tmp_path, caplog, export, role, change, found):
    """Pruned heads exist, and so do half-written files. INT4 is rounded too."""
    layers = {}
    for layer in range(3):
        wk = EXPORTS[export](128, 256)
        if layer:
            leaf = next(leaf for leaf in wk.tensors if ROLES[leaf] == role)
            wk.tensors[leaf] = change(wk.tensors[leaf])
        layers |= layer_of(wk, layer=layer)
    path = write_checkpoint(tmp_path, layers)

    def warned():
        lines = only(caplog.records).getMessage().splitlines() if caplog.records else []
        caplog.clear()
        return [line for line in lines if "rounded" not in line]

    assert list(load(path)) == [0, 1, 2]
    message = only(warned())
    assert "layers.{1-2}.self_attn.indexer.wk.weight" in message
    assert f"found {found}" in message
    load(path, [0])
    assert not warned()
    assembly = Assembly(range(3))
    stream(layers, assembly=assembly)
    assert only(warned()) == message.replace(" in model-00001-of-00001.safetensors", "")
    assert {warning.found for warning in assembly.warnings if "rounded" not in str(warning)} == {found}


ALL_0X80 = lambda t: torch.full_like(t.view(torch.uint8), 0x80).view(t.dtype)  # noqa: E731


@pytest.mark.parametrize(
    ("export", "role", "change", "subject"),
    [
        ("bf16", "weight", lambda t: t * 1e-30, "weight"),
        ("fp8_block", "weight", ALL_0X80, "weight"),
        ("fp8_block_fnuz", "weight", ALL_0X80, "weight"),
        ("mxfp8", "weight", ALL_0X80, "weight"),
        ("nvfp4", "weight", lambda t: torch.full_like(t, 0x88), "weight"),
        ("fp8_block", "scale", lambda t: t * torch.tensor([1.0, 0.0]), "scale"),
        ("fp8_row", "scale", lambda t: t.index_fill(0, torch.tensor([5]), 0.0), "scale"),
        ("fp8_tensor", "scale", lambda t: t * 1e-14, "weight"),
        ("nvfp4", "scale_2", lambda t: t * 0, "scale_2"),
    ],
)
def test_weights_that_vanish(tmp_path, export, role, change, subject):
    tensors = EXPORTS[export](128, 256).tensors
    leaf = {ROLES[leaf]: leaf for leaf in tensors}
    tensors[leaf[role]] = change(tensors[leaf[role]])
    problem = only(problems_of(write(tmp_path, tensors)))
    assert (problem.subject, problem.advice) == (f"{STEM}wk.{leaf[subject]}", BAD_VALUES)
    assert ("32768 NaN or infinite of 32768" in problem.found) == (export == "fp8_block_fnuz")  # 0x80 is its NaN


def test_rounding_is_one_warning(tmp_path, caplog):
    """It names the layers; a trainer's F32 copy of BF16 values loses nothing and gets none."""
    tensors = {}
    for layer in range(4):
        tensors |= layer_of("bf16", "f32" if layer < 3 else "bf16", layer)
        tensors[f"{INDEXER.format(layer)}wk.weight"] = tensors[f"{INDEXER.format(layer)}wk.weight"].float()
    load(write_checkpoint(tmp_path, tensors))
    message = only(caplog.records).getMessage()
    assert "layers.{0-2}.self_attn.indexer.weights_proj.weight" in message
    assert message.endswith("expected values that BF16 holds, found F32 [16, 256]; rounded to BF16")
