"""Fixtures against what is known of published FP8 and BF16 checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file

from indexproj.indexer.cli.fixture import write_fixture
from indexproj.loading import Checkpoint
from indexproj.loading.checkpoint import INDEX
from support import WK

STEM = "model.layers.0.self_attn.indexer."
F8, F32, BF16 = torch.float8_e4m3fn, torch.float32, torch.bfloat16


def contents(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def glm(tmp_path_factory):
    path = tmp_path_factory.mktemp("glm")
    write_fixture("glm-5.2-fp8", path, layers=1)
    return path


def test_names_dtypes_and_shapes(tmp_path, glm):
    files = write_fixture("deepseek-v3.2", tmp_path / "deepseek", layers=1)
    assert files == [f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)]
    assert len({path.stat().st_mode for path in (tmp_path / "deepseek").iterdir()}) == 1
    write_fixture("glm-5-bf16", tmp_path / "bf16", layers=1)
    deepseek, bf16, fp8 = map(contents, (tmp_path / "deepseek", tmp_path / "bf16", glm))
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in deepseek.items()} == {
        "model.layers.0.input_layernorm.weight": (BF16, [7168]),
        f"{STEM}k_norm.bias": (F32, [128]),
        f"{STEM}k_norm.weight": (F32, [128]),
        f"{STEM}weights_proj.weight": (BF16, [64, 7168]),
        f"{STEM}wk.weight": (F8, [128, 7168]),
        f"{STEM}wk.weight_scale_inv": (F32, [1, 56]),
        f"{STEM}wq_b.weight": (F8, [8192, 1536]),
        f"{STEM}wq_b.weight_scale_inv": (F32, [64, 12]),
    }
    assert {tensor.dtype for tensor in bf16.values()} == {BF16} == {fp8[f"{STEM}k_norm.weight"].dtype}
    assert list(bf16[f"{STEM}wq_b.weight"].shape) == list(fp8[f"{STEM}wq_b.weight"].shape) == [4096, 2048]
    scale = fp8[f"{STEM}wk.weight_scale_inv"].repeat_interleave(128, 1)
    torch.testing.assert_close(fp8[WK].float() * scale, bf16[WK].float(), rtol=0.07, atol=1e-5)  # one matrix, twice


def test_first_layers_are_a_consistent_model(tmp_path, glm):
    write_fixture("glm-5.2-fp8", tmp_path, layers=4)
    config, written = json.loads((tmp_path / "config.json").read_text()), contents(tmp_path)
    assert config["indexer_types"] == ["full", "full", "full", "shared", "shared", "shared", "full"]
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (7, 0)
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    assert len(Checkpoint(tmp_path).headers) == 12
    shard_of = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    assert set(shard_of) == set(written)
    assert any(shard_of[n] != shard_of[n + "_scale_inv"] for n in shard_of if n + "_scale_inv" in shard_of)
    assert all(torch.equal(written[name].view(torch.uint8), t.view(torch.uint8)) for name, t in contents(glm).items())


def test_values_have_outliers_and_scales_that_bf16_rounds(glm):
    tensors = contents(glm)
    gate = tensors[f"{STEM}weights_proj.weight"].float()
    assert gate.abs().max() > 20 * gate.abs().median()
    scale = tensors[f"{STEM}wk.weight_scale_inv"]
    assert scale.unique().numel() == scale.numel()
    assert (scale != scale.bfloat16().float()).any()
    assert tensors[WK].float().abs().max() == 448
