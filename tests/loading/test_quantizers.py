"""Files of auto-round, llm-compressor and amd-quark (quantizers/write.py): right or refused, by config and by value."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from exports import EXPORTS, named
from indexproj.loading import load
from support import INDEXER, problems_of, write_checkpoint

STEM = INDEXER.format(0)
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32}


def write(path, name, quantization):
    """Returns the checkpoint, and the weight that was packed, if the file has it."""
    with safe_open(Path(__file__).parent / "quantizers" / f"{name}.safetensors", "pt") as file:
        tensors = {leaf: file.get_tensor(leaf) for leaf in file.keys()}
        if file.metadata():
            quantization = json.loads(file.metadata()["quantization_config"])
    original = tensors.pop("original", None)
    layer = {f"{STEM}wk.{leaf}": tensor for leaf, tensor in tensors.items()}
    layer |= named(STEM, "weights_proj", EXPORTS["bf16"](16, 128))
    return write_checkpoint(path, layer, config={"quantization_config": quantization}), original


@pytest.mark.parametrize(
    ("name", "quantization", "expected"),
    [
        ("auto_round_mxfp4", {**AUTO_ROUND, "data_type": "mx_fp"}, "right values"),
        ("llm_compressor_mxfp4", None, "right values"),
        ("llm_compressor_nvfp4", None, "right values"),
        # Without its config nothing shows that this is not MXFP4: this is why the config has a veto.
        ("auto_round_mxint4", {}, "wrong values"),
        ("auto_round_mxint4", {**AUTO_ROUND, "data_type": "mx_int"}, 'data_type = "mx_int"'),
        ("auto_round_mxfp4", {**AUTO_ROUND, "rotation_config": {"block_size": 32}}, "rotation_config = "),
        ("llm_compressor_quip", None, "transform_config = "),
        ("quark_amdfp4", {"global_quant_config": {"weight": {"scale_format": "e5m3"}}}, 'scale_format = "e5m3"'),
        ("quark_amdfp4", {}, "magnitudes from "),
    ],
)
def test_quantizer(tmp_path, name, quantization, expected):
    path, original = write(tmp_path, name, quantization)
    if expected.endswith("values"):
        difference = load(path)[0].wk.dequantize() - original.float()
        error = difference.square().mean().sqrt() / original.float().square().mean().sqrt()
        assert (error < 0.15) == (expected == "right values") == (error < 0.5)
    else:
        problems = problems_of(path)
        assert problems[0].subject.startswith(f"{STEM}wk.weight")
        assert all(expected in problem.found for problem in problems)
