"""Values that no trained matrix has are refused, and the error names the tensor."""

import pytest
import torch

from exports import EXPORTS, bf16, fp8_block, named
from indexproj.loading import load
from indexproj.loading.layer import BAD_VALUES
from indexproj.loading.names import ROLES
from support import GATE, INDEXER, SCALE, WK, only, problems_of, write_checkpoint

STEM = INDEXER.format(0)


def write(path, tensors):
    """Layer 0 with these tensors for wk, and a BF16 gate."""
    gate = named(STEM, "weights_proj", bf16(16, 256))
    return write_checkpoint(path, {f"{STEM}wk.{leaf}": tensor for leaf, tensor in tensors.items()} | gate)


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
    "int4 weight_scale": ([], [INF, NAN, 2.0**97]),
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
        assert problem.subject == f"{STEM}wk.{leaves[0] if export != 'int4' else 'weight_packed'}"
        assert problem.found.startswith("nothing but 0")
    else:
        assert list(load(path)) == [0]


def test_bad_values_come_together(tmp_path):
    tensors = named(STEM, "wk", fp8_block(128, 256)) | named(STEM, "weights_proj", bf16(16, 256))
    damaged = {name: put(tensor, 0x7F if name == WK else torch.inf) for name, tensor in tensors.items()}
    damaged |= {name.replace("layers.0", "layers.1"): tensor.clone() for name, tensor in damaged.items()}
    subjects = [problem.subject for problem in problems_of(write_checkpoint(tmp_path, damaged))]
    assert subjects == [name.replace("layers.0", f"layers.{n}") for n in (0, 1) for name in (WK, SCALE, GATE)]
