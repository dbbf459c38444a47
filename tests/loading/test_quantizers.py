"""Files that auto-round and amd-quark packed (quantizers/write.py): right or refused, by config and by value."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exports import EXPORTS, named
from indexproj.loading import load
from support import INDEXER, only, problems_of, write_checkpoint

STEM = INDEXER.format(0)
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}


def write(path, name, quantization):
    """Returns the checkpoint, and the weight that was packed, if the file has it."""
    tensors = load_file(Path(__file__).parent / "quantizers" / f"{name}.safetensors")
    original = tensors.pop("original", None)
    layer = {f"{STEM}wk.{leaf}": tensor for leaf, tensor in tensors.items()}
    layer |= named(STEM, "weights_proj", EXPORTS["bf16"](16, 128))
    config = {"quantization_config": quantization} if quantization else {}
    return write_checkpoint(path, layer, config=config), original


def test_auto_round_mxfp4(tmp_path):
    path, original = write(tmp_path, "auto_round_mxfp4", {**AUTO_ROUND, "data_type": "mx_fp"})
    error = (load(path)[0].wk.dequantize() - original).square().mean().sqrt() / original.square().mean().sqrt()
    assert error < 0.15


@pytest.mark.parametrize(
    ("name", "quantization", "found"),
    [
        ("auto_round_mxint4", {**AUTO_ROUND, "data_type": "mx_int"}, 'data_type = "mx_int"'),
        ("auto_round_mxfp4", {**AUTO_ROUND, "rotation_config": {"block_size": 32}}, "rotation_config = "),
        ("quark_amdfp4", {"global_quant_config": {"weight": {"scale_format": "e5m3"}}}, 'scale_format = "e5m3"'),
        ("quark_amdfp4", None, "none above "),
    ],
)
def test_refused(tmp_path, name, quantization, found):
    path, _ = write(tmp_path, name, quantization)
    problems = problems_of(path)
    assert problems[0].subject.startswith(f"{STEM}wk.weight")
    assert found in problems[0].found
    assert only({problem.found for problem in problems})


def test_mxint4_looks_like_mxfp4(tmp_path):
    """Without its config nothing shows the difference: this is why the config has a veto."""
    path, original = write(tmp_path, "auto_round_mxint4", None)
    assert (load(path)[0].wk.dequantize() - original).square().mean().sqrt() > original.square().mean().sqrt() / 2
    assert torch.isfinite(original).all()
