"""quantization_config as a veto: what dtypes and shapes cannot show is refused by key and value, nothing else is."""

import json
import time
from functools import reduce
from pathlib import Path

import pytest
from safetensors import safe_open

from exports import Export, layer_of, refused, stream
from indexproj.loading import load
from indexproj.loading.config import Scope
from support import INDEXER, problems_of, write_checkpoint

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
# Config and what the error names. One or two matrices that look like MXFP4 are refused.
REFUSED = [
    *((1, quark(form), "global_quant_config.weight.scale_format = ") for form in ("e5m3", "e4m3", {"a": 1})),
    (1, quark(wk=E5M3), 'layer_quant_config.wk.weight.scale_format = "e5m3"'),
    *((1, quark(**{name: E5M3}), f"layer_quant_config.{name}.weight") for name in ("*indexer*", "bias|.*indexer.*")),
    *((1, compressed(scale_dtype=name), f'"{name}"') for name in ("e6m2", "torch.float8_e4m3fn")),
    (1, compressed(scale_fmt="float32"), '"float32"'),
    *((1, auto_round(name), f'data_type = "{name}"') for name in ("mx_int", "mx_int4_rceil")),
    (1, auto_round(extra_config={"wk": MXINT4}), 'extra_config.wk.data_type = "mx_int4"'),
    (1, compressed(transform(STEM + "wk")), "transform_config = {"),
    (2, {"algo_config": [{"online_r1_rotation": True}]}, "algo_config.0.online_r1_rotation = true"),
    (2, auto_round(spinquant_config={"r1": True}), "spinquant_config = {"),
    (2, auto_round(rotation_config=ROTATION), "rotation_config = {...}"),
    *((2, auto_round(rotation_config=each), "rotation_config = ") for each in ("quarot", {"layers": 61})),
    *((2, auto_round(rotation_config={"layers": each}), "rotation_config = {") for each in ([1, 0], ["all"])),
    (2, compressed(transform("Linear")), "transform_config = {"),
    (2, compressed({"config_groups": {"R1": {}}}), "transform_config = {"),
    (2, compressed({"config_groups": {}, "seed": 0}), "transform_config = {"),
    # Nesting that JSON allows does not end in a RecursionError.
    (2, reduce(lambda value, _: {"a": [value]}, range(400), {"rotation_config": 1}), "rotation_config = 1"),
]
ACCEPTED = [
    *((quark("e5m3"), export) for export in ("bf16", "fp8_block", "mxfp8")),  # without uint8 scales
    (quark(inputs="e5m3"), "mxfp4"), (quark(**{"*down_proj": E5M3}), "mxfp4"),
    (auto_round("mx_fp_rceil", scale_dtype="torch.bfloat16"), "mxfp4"),
    (auto_round("nv_fp", scale_dtype="bf16"), "nvfp4_divisor"), (auto_round("mx_int"), "fp8_row"),
    (auto_round(extra_config={"model.layers.0.mlp.down_proj": MXINT4}), "mxfp4"),
    *((auto_round(rotation_config=off), "mxfp4") for off in ({}, "none", {"enabled": False}, {"enable": False})),
    (auto_round(rotation_config={**ROTATION, "layers": [1, 2]}), "mxfp4"),
    (auto_round(extra_config={"mlp.down_proj": {"rotation_config": {"layers": [0]}}}), "mxfp4"),
    *((compressed({"config_groups": none}), "mxfp4") for none in (None, {})),
    (compressed(transform("re:.*down_proj$")), "mxfp4"),
    (compressed(transform("Linear", ignore=["re:.*indexer"])), "mxfp4"),
    (compressed(scale_dtype="torch.uint8"), "mxfp4"),
    (compressed(targets=["re:.*experts"], scale_dtype="torch.float8_e4m3fn"), "mxfp4"),
    ({"groups": {"targets": ["re:.*mlp.*"], "transform_config": transform("Linear")}}, "mxfp4"),
    ({"quant_method": "fp8", "scale_fmt": "ue8m0"}, "fp8_block_u8"),
    ({"quant_method": "new", "wonder": "e5m3x", "scale_rule": "e5m3"}, "mxfp4"), ("mx_fp", "mxfp4"),
]  # fmt: skip


@pytest.mark.parametrize("place", ["", "text_config", "language_config"])
@pytest.mark.parametrize(("count", "quantization", "named_entry"), REFUSED)
def test_veto(tmp_path, count, quantization, named_entry, place):
    config = {"quantization_config": quantization}
    problems = refused(tmp_path, layer_of("mxfp4"), {"text_config": {}, place: config} if place else config)
    assert len(problems) == count
    assert problems[0].subject.startswith(f"{STEM}wk.")
    assert problems[0].found.startswith(place or "quantization_config")
    assert named_entry in problems[0].found
    if count == 2:  # a rotation concerns any encoding
        assert len(refused(tmp_path / "bf16", layer_of("bf16"), config)) == 2


@pytest.mark.parametrize(("quantization", "export"), ACCEPTED)
def test_no_veto(tmp_path, quantization, export):
    config = {"quantization_config": quantization}
    assert list(load(write_checkpoint(tmp_path, layer_of(export), config=config))) == [0]
    assert list(stream(layer_of(export), config=config)) == [0]


MEANT = [
    "Linear", None, {"a": 1}, "re:(", 3, "indexer", "wk", "re:.*self_attn.*", r"re:^model\.language_model\.layers\.3\.",
    "*.wk", "model*", "language_model.model.layers.3.self_attn.indexer.wk", r".*\.[0-9]\..*k$", "layers.3.self.attn",
    "model.layers.3.self_attn.indexer.wk", "*.layers.[!1].*", "model.layers.3.self_attn.indexer.wk_weights_proj",
    r"re:.*layers\.\d{1,2}\.self_attn\..*", "{a,b}",
]  # fmt: skip
NOT_MEANT = [
    "re:.*down_proj$", "*down_proj", "down_proj", "model.layers.3.mlp", r"re:.*layers\.(4|13|30)\..*", 13, 30,
    "lm_head", "re:.*q_b?_proj", r"re:.*layers\.\d{1,2}\.mlp\..*", "model.layers.61.self_attn.indexer.*",
]  # fmt: skip


@pytest.mark.parametrize("target", MEANT + NOT_MEANT)
def test_targets_that_may_mean_an_indexer(target):
    """In any spelling of the name; what is unknown may. mtp.0 may be layer 61, or any other."""
    name = "layers.3.self_attn.indexer.wk"
    hidden, fused, old = f"model.{name}", f"{name}_weights_proj", name.replace("self_attn", "attn")
    for module in (hidden, fused, old):
        assert Scope([target]).may_hold(module) == (target in MEANT)
    if type(target) is int or "layers" in str(target):
        assert Scope([target]).may_hold("mtp.0.attn.indexer.wk")
    for ignore in (hidden, name, f"language_model.{hidden}", r"re:model.*\.3\..*wk"):
        assert not any(Scope([target], [ignore]).may_hold(module) for module in (hidden, old))
    assert Scope([target], [name]).may_hold(fused) == (target in MEANT)  # a part of it is not ignored
    for ignore in (None, "re:(", "re:indexer", "Linear", "lm_head", "re:.*indexer$", "model.layers.3"):
        assert Scope(["Linear"], [ignore]).may_hold(hidden)
    for other in ("model.mtp_layers.3", "draft.model.layers.3"):  # another layer 3
        assert Scope(["Linear"], [hidden]).may_hold(f"{other}.self_attn.indexer.wk")


def test_many_entries():
    """Quantizers write one entry per expert. Checking them against every layer must stay fast."""
    names = [f"model.layers.{layer}.mlp.experts.{n}.up_proj" for layer in range(62) for n in range(48)]
    config = {"quantization_config": auto_round(extra_config=dict.fromkeys(names, MXINT4))}
    offers = [offer for layer in range(62) for offer in layer_of("mxfp4", layer=layer, n=(32, 16)).items()]
    start = time.process_time()
    assert len(stream(offers, range(62), config)) == 62
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("name", "quantization", "expected"),
    [
        ("auto_round_mxfp4", auto_round("mx_fp"), "right values"),
        ("llm_compressor_mxfp4", None, "right values"),
        ("llm_compressor_nvfp4", None, "right values"),
        # Without its config nothing shows that this is not MXFP4: this is why the config has a veto.
        ("auto_round_mxint4", {}, "wrong values"),
        ("auto_round_mxint4", auto_round("mx_int"), 'data_type = "mx_int"'),
        ("auto_round_mxfp4", auto_round(rotation_config=ROTATION), "rotation_config = "),
        ("llm_compressor_quip", None, "transform_config = "),
        ("quark_amdfp4", quark("e5m3"), 'scale_format = "e5m3"'),
        ("quark_amdfp4", {}, "magnitudes from "),
    ],
)
def test_quantizer(tmp_path, name, quantization, expected):
    """Files of auto-round, llm-compressor and amd-quark, which quantizers/write.py wrote: right, or refused."""
    with safe_open(Path(__file__).parent / f"quantizers/{name}.safetensors", "pt") as file:
        wk = {leaf: file.get_tensor(leaf) for leaf in file.keys()}
        if file.metadata():
            quantization = json.loads(file.metadata()["quantization_config"])
    original = wk.pop("original", None)  # the weight that was packed
    layer = layer_of(Export(wk, None, ""), k=128)
    path = write_checkpoint(tmp_path, layer, config={"quantization_config": quantization})
    if expected.endswith("values"):
        difference = load(path)[0].wk.dequantize() - original.float()
        error = difference.square().mean().sqrt() / original.float().square().mean().sqrt()
        assert (error < 0.15) == (expected == "right values") == (error < 0.5)
    else:
        problems = problems_of(path)
        assert problems[0].subject.startswith(f"{STEM}wk.weight")
        assert all(expected in problem.found for problem in problems)
