"""The made-up checkpoints against what FP8 and BF16 releases are known to look like."""

import json
from typing import get_args

import pytest
import torch
from safetensors import safe_open

from indexproj.indexer.cli.commands import Kind
from indexproj.indexer.cli.fixture import MODELS, write_fixture
from indexproj.loading import Checkpoint
from indexproj.loading.checkpoint import INDEX


def contents(directory):
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():
                found[name] = shard.get_tensor(name)
    return found


def test_deepseek_names_dtypes_and_shapes(tmp_path):
    files = write_fixture("deepseek-v3.2", tmp_path, layers=1)
    assert files == [f"model-{n:05d}-of-000003.safetensors" for n in (1, 2, 3)]
    stem = "model.layers.0.self_attn.indexer."
    f8, f32, bf16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in contents(tmp_path).items()} == {
        "model.layers.0.input_layernorm.weight": (bf16, [7168]),
        f"{stem}k_norm.bias": (f32, [128]),
        f"{stem}k_norm.weight": (f32, [128]),
        f"{stem}weights_proj.weight": (bf16, [64, 7168]),
        f"{stem}wk.weight": (f8, [128, 7168]),
        f"{stem}wk.weight_scale_inv": (f32, [1, 56]),
        f"{stem}wq_b.weight": (f8, [8192, 1536]),
        f"{stem}wq_b.weight_scale_inv": (f32, [64, 12]),
    }


def test_glm_names_dtypes_and_shapes(tmp_path):
    write_fixture("glm-5-bf16", tmp_path / "bf16", layers=1)
    write_fixture("glm-5.2-fp8", tmp_path / "fp8", layers=1)
    stem = "model.layers.0.self_attn.indexer."
    bf16, fp8 = contents(tmp_path / "bf16"), contents(tmp_path / "fp8")
    assert {tensor.dtype for tensor in bf16.values()} == {torch.bfloat16}
    assert list(bf16[f"{stem}wk.weight"].shape) == list(fp8[f"{stem}wk.weight"].shape) == [128, 6144]
    assert list(bf16[f"{stem}weights_proj.weight"].shape) == [32, 6144]
    assert list(fp8[f"{stem}wk.weight_scale_inv"].shape) == [1, 48]
    assert list(fp8[f"{stem}wq_b.weight_scale_inv"].shape) == [32, 16]
    assert fp8[f"{stem}k_norm.weight"].dtype == torch.bfloat16


def test_the_command_line_offers_every_kind():
    assert get_args(Kind) == tuple(MODELS)


def test_other_users_can_read_it(tmp_path):
    write_fixture("glm-5.2-fp8", tmp_path, layers=1)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


@pytest.mark.parametrize(("kind", "shards"), [("deepseek-v3.2", 163), ("glm-5-bf16", 282), ("glm-5.2-fp8", 141)])
def test_layers_that_own_an_indexer(kind, shards):
    model = MODELS[kind]
    expected = {
        "deepseek-v3.2": list(range(62)),
        "glm-5-bf16": list(range(79)),
        "glm-5.2-fp8": [0, 1, *range(2, 75, 4), 78],
    }
    assert list(model.indexer_layers) == expected[kind]
    assert model.shards == shards


def test_a_few_layers_are_a_consistent_model(tmp_path):
    write_fixture("glm-5.2-fp8", tmp_path, layers=4)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["indexer_types"] == ["full", "full", "full", "shared", "shared", "shared", "full"]
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (7, 0)
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    census = Checkpoint(tmp_path)
    assert len(census.headers) == 12
    index = json.loads((tmp_path / INDEX).read_text())
    assert set(index["weight_map"]) == set(contents(tmp_path))
    shard_of = index["weight_map"]
    assert any(shard_of[n] != shard_of[n + "_scale_inv"] for n in shard_of if n + "_scale_inv" in shard_of)


def test_bytes_depend_on_the_seed_and_on_nothing_else(tmp_path):
    for name, layers, seed in (("a", 1, 0), ("b", 1, 0), ("c", 2, 0), ("d", 1, 1)):
        write_fixture("glm-5.2-fp8", tmp_path / name, layers=layers, seed=seed)
    a, b, c, d = (contents(tmp_path / name) for name in "abcd")
    same = {x: all(torch.equal(y[n].float(), a[n].float()) for n in a) for x, y in (("b", b), ("c", c))}
    assert same == {"b": True, "c": True}
    gate = "model.layers.0.self_attn.indexer.weights_proj.weight"
    assert not torch.equal(a[gate], d[gate])


def test_weights_have_outliers_and_scales_that_bf16_cannot_hold(tmp_path):
    write_fixture("glm-5.2-fp8", tmp_path, layers=1)
    tensors = contents(tmp_path)
    stem = "model.layers.0.self_attn.indexer."
    gate = tensors[f"{stem}weights_proj.weight"].float()
    assert gate.abs().max() > 20 * gate.abs().median()
    scale = tensors[f"{stem}wk.weight_scale_inv"]
    assert scale.unique().numel() == scale.numel()
    assert (scale != scale.bfloat16().float()).any()
    assert tensors[f"{stem}wk.weight"].float().abs().max() == 448


def test_power_of_two_scales(tmp_path):
    write_fixture("glm-5.2-fp8", tmp_path, layers=1, power_of_two_scales=True)
    scale = contents(tmp_path)["model.layers.0.self_attn.indexer.wk.weight_scale_inv"]
    assert torch.equal(scale, torch.exp2(scale.log2().round()))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize(
    ("kind", "layers", "message"),
    [("glm-6", None, "expected one of deepseek-v3.2"), ("glm-5.2-fp8", 0, "1 to 22"), ("glm-5.2-fp8", 23, "1 to 22")],
)
def test_impossible_requests(tmp_path, kind, layers, message):
    with pytest.raises(ValueError, match=message):
        write_fixture(kind, tmp_path / "new", layers)
    assert not (tmp_path / "new").exists()


def test_bf16_has_no_scales_to_round(tmp_path):
    with pytest.raises(ValueError, match="glm-5-bf16 is BF16"):
        write_fixture("glm-5-bf16", tmp_path / "new", 1, power_of_two_scales=True)
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(ValueError, match="not an empty directory"):
        write_fixture("glm-5.2-fp8", tmp_path, 1)
