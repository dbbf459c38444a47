"""quantization_config as a veto: what dtypes and shapes cannot show is refused by key and value, nothing else is."""

import copy

import pytest
import torch

from exports import EXPORTS, named
from indexproj.loading import Assembly, CheckpointError, load
from support import GATE, INDEXER, only, problems_of, write_checkpoint

STEM = INDEXER.format(0)


def quark(scale_format="e8m0", inputs=None, **layers):
    """As amd-quark 0.13 writes it."""
    spec = {"dtype": "fp4", "qscheme": "per_group", "group_size": 32, "ch_axis": -1, "scale_type": "float"}
    weight = {**spec, "scale_format": scale_format}
    return {
        "quant_method": "quark", "exclude": ["lm_head"], "layer_type_quant_config": {}, "layer_quant_config": layers,
        "global_quant_config": {"weight": weight, "input_tensors": inputs and {**spec, "scale_format": inputs}},
    }  # fmt: skip


def auto_round(data_type="mx_fp", **other):
    return {
        "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True,
        "data_type": data_type, "act_data_type": "mx_int", "packing_format": "auto_round:mx", **other,
    }  # fmt: skip


def compressed(transform=None, **weights):
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 32, **weights}}
    return {
        "quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {"group_0": group},
        "transform_config": transform,
    }  # fmt: skip


ROTATION = {"hadamard_type": "hadamard", "block_size": 32}
TRANSFORM = {"config_groups": {"R1": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}}
# Config -> what the error names, and the encoding that it looks like.
REFUSED = {
    "amdfp4_g32": (quark("e5m3"), 'global_quant_config.weight.scale_format = "e5m3"', "mxfp4"),
    "amdfp4_g32 in one layer": (
        quark(wk={"weight": {"scale_format": "e5m3"}}), 'layer_quant_config.wk.weight.scale_format = "e5m3"', "mxfp4",
    ),
    "another scale": (compressed(scale_dtype="e6m2"), '.weights.scale_dtype = "e6m2"', "mxfp4"),
    "MXINT4": (auto_round("mx_int"), 'quantization_config.data_type = "mx_int"', "mxfp4"),
    "MXINT4 in one layer": (
        auto_round(extra_config={"wk": {"data_type": "mx_int4"}}), 'extra_config.wk.data_type = "mx_int4"', "mxfp4",
    ),
    "MXINT4, rounded up": (auto_round("mx_int4_rceil"), 'data_type = "mx_int4_rceil"', "mxfp4"),
    "Quark's online rotation": (
        {**quark(), "algo_config": [{"name": "rotation", "online_r1_rotation": True}]}, "online_r1_rotation = true",
        "mxfp4",
    ),
    "SpinQuant": (auto_round(spinquant_config={"r1": True}), "spinquant_config = {", "mxfp4"),
    "rotation of MXFP4": (auto_round(rotation_config=ROTATION), "rotation_config = {", "mxfp4"),
    "rotation of NVFP4": (auto_round("nv_fp", rotation_config=ROTATION), "rotation_config = {", "nvfp4_divisor"),
    "rotation by name": (auto_round(rotation_config="quarot"), 'rotation_config = "quarot"', "mxfp4"),
    "rotation of BF16": (auto_round(rotation_config=ROTATION), "rotation_config = {", "bf16"),
    "transform": (compressed(TRANSFORM), "transform_config = {", "mxfp4"),
}  # fmt: skip
ACCEPTED = {
    "Quark MXFP4": (quark(), "mxfp4"),
    "Quark activations": (quark(inputs="e5m3"), "mxfp4"),
    "excluded from amdfp4": (quark("e5m3"), "bf16"),
    "FP8 beside amdfp4": (quark("e5m3"), "fp8_block"),
    "typed scales": (quark("e5m3"), "mxfp8"),
    "auto-round MXFP4": (auto_round("mx_fp_rceil"), "mxfp4"),
    "auto-round NVFP4": (auto_round("nv_fp"), "nvfp4_divisor"),
    "MXINT4 experts": (auto_round("mx_int"), "fp8_row"),
    "no rotation": (auto_round(rotation_config={}), "mxfp4"),
    "rotation that is off": (auto_round(rotation_config={"enable": False}), "mxfp4"),
    "transform without groups": (compressed({"config_groups": None}), "mxfp4"),
    "no transform": (compressed({"config_groups": {}}), "mxfp4"),
    "compressed-tensors": (compressed(scale_dtype="torch.uint8"), "mxfp4"),
    "DeepSeek": ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "fp8_block_u8"),
    "unknown keys": ({"quant_method": "new", "wonder": "e5m3x", "scale_rule": "e5m3"}, "mxfp4"),
    "not an object": ("mx_fp", "mxfp4"),
}


def tensors(export):
    return named(STEM, "wk", EXPORTS[export](128, 256)) | named(STEM, "weights_proj", EXPORTS["bf16"](16, 256))


def stream(offers, config):
    assembly = Assembly([0], config=config)
    assembly.begin()
    for name, tensor in offers.items():
        assembly.offer(name, tensor)
    return assembly.finish()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("quantization", "named_entry", "export"), REFUSED.values(), ids=REFUSED)
def test_veto(tmp_path, quantization, named_entry, export, nested):
    config = {"quantization_config": copy.deepcopy(quantization)}
    config = {"text_config": config} if nested else config
    offers = tensors(export)
    problems = problems_of(write_checkpoint(tmp_path, offers, config=config))
    with pytest.raises(CheckpointError) as caught:
        stream(offers, config)
    for found in (problems, caught.value.problems):
        wk = found[0]
        assert wk.subject.startswith(f"{STEM}wk.")
        assert named_entry in wk.found
        concerns_both = any(word in named_entry for word in ("rotation", "transform", "spinquant"))
        assert len(found) == (2 if concerns_both else 1)


@pytest.mark.parametrize(("quantization", "export"), ACCEPTED.values(), ids=ACCEPTED)
def test_no_veto(tmp_path, quantization, export):
    config = {"quantization_config": quantization}
    assert list(load(write_checkpoint(tmp_path, tensors(export), config=config))) == [0]
    assert list(stream(tensors(export), config)) == [0]


def test_deep_config(tmp_path):
    """Nesting that JSON allows does not end in a RecursionError."""
    value: dict = {"rotation_config": 1}
    for _ in range(400):
        value = {"a": [value]}
    problems = problems_of(write_checkpoint(tmp_path, tensors("mxfp4"), config={"quantization_config": value}))
    assert [problem.subject for problem in problems] == [f"{STEM}wk.weight_packed", GATE]


def test_misread_scales_by_value(tmp_path):
    """E5M3 scales read as E8M0, in a file without a config: the largest weight is around 1e-15."""
    offers = tensors("mxfp4")
    offers[f"{STEM}wk.weight_scale"] = torch.randint(64, 80, (128, 8), dtype=torch.uint8)
    problem = only(problems_of(write_checkpoint(tmp_path, offers)))
    assert problem.subject == f"{STEM}wk.weight_packed"
    assert problem.expected == "weights of a magnitude above 1e-10"
