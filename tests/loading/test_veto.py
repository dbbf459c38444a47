"""quantization_config as a veto: what dtypes and shapes cannot show is refused by key and value, nothing else is."""

import time
from functools import reduce

import pytest

from exports import layer_of, refused, stream
from indexproj.loading import load
from indexproj.loading.config import Scope
from support import INDEXER, write_checkpoint

STEM = INDEXER.format(0)


def quark(scale_format="e8m0", inputs=None, **layers):
    """As amd-quark 0.13 writes it, in short."""
    specs = {"weight": {"dtype": "fp4", "scale_format": scale_format}, "input_tensors": {"scale_format": inputs}}
    return {"quant_method": "quark", "global_quant_config": specs, "layer_quant_config": layers}


def auto_round(data_type="mx_fp", **other):
    return {"quant_method": "auto-round", "bits": 4, "data_type": data_type, "act_data_type": "mx_int", **other}


def compressed(transform=None, targets=("Linear",), **weights):
    group = {"targets": targets, "weights": {"num_bits": 4, "type": "float", "group_size": 32, **weights}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "transform_config": transform}


def transform(*targets, ignore=()):
    """As QuIPModifier and SpinQuantModifier of llm-compressor 0.14 write it."""
    parts = {"targets": [*targets], "ignore": [*ignore], "location": "weight_input", "inverse": True}
    return {"config_groups": {"R4": {"type": "hadamard", "head_dim": None, "apply": [parts, parts]}}}


ROTATION = {"hadamard_type": "hadamard", "block_size": 32}
E5M3, MXINT4 = {"weight": {"scale_format": "e5m3"}}, {"data_type": "mx_int4"}
# Config, what the error names, the encoding that it looks like, and how many of the two matrices are refused.
REFUSED = [
    *((quark(form), "global_quant_config.weight.scale_format = ", "mxfp4", 1) for form in ("e5m3", "e4m3", {"a": 1})),
    *(
        (quark(**{name: E5M3}), f'layer_quant_config.{name}.weight.scale_format = "e5m3"', "mxfp4", 1)
        for name in ("wk", "*indexer*", "bias|.*indexer.*")
    ),
    *((compressed(scale_dtype=name), f'"{name}"', "mxfp4", 1) for name in ("e6m2", "torch.float8_e4m3fn")),
    (compressed(scale_fmt="float32"), '"float32"', "mxfp4", 1),
    *((auto_round(name), f'data_type = "{name}"', "mxfp4", 1) for name in ("mx_int", "mx_int4_rceil")),
    (auto_round(extra_config={"wk": MXINT4}), 'extra_config.wk.data_type = "mx_int4"', "mxfp4", 1),
    ({"algo_config": [{"online_r1_rotation": True}]}, "algo_config.0.online_r1_rotation = true", "mxfp4", 2),
    (auto_round(spinquant_config={"r1": True}), "spinquant_config = {", "mxfp4", 2),
    *((auto_round(rotation_config=ROTATION), "rotation_config = {...}", name, 2) for name in ("nvfp4_divisor", "bf16")),
    *(
        (auto_round(rotation_config=value), "rotation_config = ", "mxfp4", 2)
        for value in ("quarot", {"layers": 61}, {"layers": [1, 0]}, {"layers": ["all"]})
    ),
    *(
        (compressed(value), "transform_config = {", "mxfp4", 2)
        for value in (transform("Linear"), {"config_groups": {"R1": {}}}, {"config_groups": {}, "seed": 0})
    ),
    (compressed(transform(STEM + "wk")), "transform_config = {", "mxfp4", 1),
    # Nesting that JSON allows does not end in a RecursionError.
    (reduce(lambda value, _: {"a": [value]}, range(400), {"rotation_config": 1}), "rotation_config = 1", "mxfp4", 2),
]
ACCEPTED = [
    *((quark("e5m3"), export) for export in ("bf16", "fp8_block", "mxfp8")),  # without uint8 scales
    (quark(inputs="e5m3"), "mxfp4"),
    (quark(**{"*down_proj": E5M3}), "mxfp4"),
    (auto_round("mx_fp_rceil", scale_dtype="torch.bfloat16"), "mxfp4"),
    (auto_round("nv_fp", scale_dtype="bf16"), "nvfp4_divisor"),
    (auto_round("mx_int"), "fp8_row"),
    (auto_round(extra_config={"model.layers.0.mlp.down_proj": MXINT4}), "mxfp4"),
    *((auto_round(rotation_config=off), "mxfp4") for off in ({}, "none", {"enabled": False}, {"enable": False})),
    (auto_round(rotation_config={**ROTATION, "layers": [1, 2]}), "mxfp4"),
    *((compressed({"config_groups": none}), "mxfp4") for none in (None, {})),
    (compressed(transform("re:.*down_proj$")), "mxfp4"),
    (compressed(transform("Linear", ignore=["re:.*indexer"])), "mxfp4"),
    (compressed(scale_dtype="torch.uint8"), "mxfp4"),
    (compressed(targets=["re:.*experts"], scale_dtype="torch.float8_e4m3fn"), "mxfp4"),
    ({"groups": {"targets": ["re:.*mlp.*"], "transform_config": transform("Linear")}}, "mxfp4"),
    (auto_round(extra_config={"mlp.down_proj": {"rotation_config": {"layers": [0]}}}), "mxfp4"),
    ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "fp8_block_u8"),
    ({"quant_method": "new", "wonder": "e5m3x", "scale_rule": "e5m3"}, "mxfp4"),
    ("mx_fp", "mxfp4"),
]


@pytest.mark.parametrize("place", ["quantization_config", "text_config", "language_config"])
@pytest.mark.parametrize(("quantization", "named_entry", "export", "count"), REFUSED)
def test_veto(tmp_path, quantization, named_entry, export, count, place):
    """A veto counts in any of the places that may hold a config."""
    config = {"quantization_config": quantization if place == "quantization_config" else compressed()}
    if place != "quantization_config":
        config |= {"text_config": {}, place: {"quantization_config": quantization}}
    problems = refused(tmp_path, layer_of(export), config)
    assert len(problems) == count
    assert problems[0].subject.startswith(f"{STEM}wk.")
    assert named_entry in problems[0].found
    assert f"{place}.quant" in problems[0].found or place == "quantization_config"


@pytest.mark.parametrize(("quantization", "export"), ACCEPTED)
def test_no_veto(tmp_path, quantization, export):
    config = {"quantization_config": quantization}
    assert list(load(write_checkpoint(tmp_path, layer_of(export), config=config))) == [0]
    assert list(stream(layer_of(export), config=config)) == [0]


HIDDEN, FUSED, OLD, MTP = (
    "model.layers.3.self_attn.indexer.wk", "layers.3.self_attn.indexer.wk_weights_proj",
    "layers.3.attn.indexer.wk", "mtp.0.attn.indexer.wk",
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "is_meant"),
    [
        ("Linear", True), (None, True), ({"a": 1}, True), ("re:(", True), (3, True), ("indexer", True), ("wk", True),
        ("re:.*self_attn.*", True), (r"re:^model\.language_model\.layers\.3\.", True), ("*.wk", True), ("model*", True),
        ("language_model.model.layers.3.self_attn.indexer.wk", True), (r".*\.[0-9]\..*k$", True), (HIDDEN, True),
        ("layers.3.self.attn", True),
        ("*.layers.[!1].*", True), ("model.layers.3.self_attn.indexer.wk_weights_proj", True),
        ("re:.*down_proj$", False), ("*down_proj", False), ("down_proj", False), ("model.layers.3.mlp", False),
        (r"re:.*layers\.(4|13|30)\..*", False), (13, False), (30, False), ("re:.*q_b?_proj", False), ("lm_head", False),
        (r"re:.*layers\.\d{1,2}\.mlp\..*", False), (r"re:.*layers\.\d{1,2}\.self_attn\..*", True), ("{a,b}", True),
        ("model.layers.61.self_attn.indexer.*", False),
    ],
)  # fmt: skip
def test_targets_that_may_mean_an_indexer(target, is_meant):
    """In any spelling of the name; what is unknown may. mtp.0 may be layer 61, or any other."""
    for name in (HIDDEN, FUSED, OLD):
        assert Scope([target]).may_hold(name) == is_meant
    if type(target) is int or "layers" in str(target):
        assert Scope([target]).may_hold(MTP)
    for ignore in ([HIDDEN], ["layers.3.self_attn.indexer.wk"], [f"language_model.{HIDDEN}"], [r"re:model.*\.3\..*wk"]):
        assert not any(Scope([target], ignore).may_hold(name) for name in (HIDDEN, OLD))
    assert Scope([target], ["layers.3.self_attn.indexer.wk"]).may_hold(FUSED) == is_meant  # a part of it is not ignored
    for ignore in ([None], ["re:("], ["re:indexer"], ["Linear"], ["lm_head"], ["re:.*indexer$"], ["model.layers.3"]):
        assert Scope(["Linear"], ignore).may_hold(HIDDEN)
    for other in ("model.mtp_layers.3", "draft.model.layers.3"):  # another layer 3
        assert Scope(["Linear"], [HIDDEN]).may_hold(f"{other}.self_attn.indexer.wk")


def test_many_entries():
    """Quantizers write one entry per expert. Checking them against every layer must stay fast."""
    names = [f"model.layers.{layer}.mlp.experts.{n}.up_proj" for layer in range(62) for n in range(48)]
    config = {"quantization_config": auto_round(extra_config=dict.fromkeys(names, MXINT4))}
    offers = [offer for layer in range(62) for offer in layer_of("mxfp4", layer=layer, n=(32, 16)).items()]
    start = time.process_time()
    assert len(stream(offers, range(62), config)) == 62
    assert time.process_time() - start < 10
