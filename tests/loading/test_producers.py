"""Checkpoints written by compressed-tensors, ModelOpt and torchao load as the values that these libraries decode.

Expected values come from the library's own unpacking and dequantization, in fp64 where it allows that.
"""

from functools import partial

import modelopt.torch.quantization as mtq
import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from transformers import GlmMoeDsaConfig, GlmMoeDsaForCausalLM

from indexproj.loading import Checkpoint, CheckpointError, Plan, load
from producers import FORMATS, calibrate, compress, export, torchao_file, uneven
from support import INDEXER, write_checkpoint

WK, GATE = (INDEXER.format(0) + matrix for matrix in ("wk.", "weights_proj."))

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, of zeros and of what newer versions of torch will do


def write(path, wk, gate):
    tensors = {f"{stem}{leaf}": tensor for stem, leaves in ((WK, wk), (GATE, gate)) for leaf, tensor in leaves.items()}
    return write_checkpoint(path, {name: tensor.contiguous() for name, tensor in tensors.items()})


def check(plan, matrix, expected, form):
    assert (plan.encoding.name, plan.encoding.exact is None) == (form.encoding, form.encoding != "INT4")
    assert expected.isfinite().all()
    assert expected.count_nonzero() > expected.numel() / 2
    values = expected if plan.encoding.exact is None else expected.bfloat16().double()
    torch.testing.assert_close(matrix.dequantize(torch.float64), values, rtol=form.rtol, atol=0)


@pytest.mark.parametrize("shape", ["unaligned", pytest.param("aligned", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", FORMATS)
def test_format(tmp_path, name, shape):
    form = FORMATS[name]
    d, h, k = (192, 20, form.k) if shape == "unaligned" else (128, 32, 256)
    wk, gate = (form.produce(uneven(n, k, form.width)) for n in (d, h))
    path = write(tmp_path, wk, gate)
    plan, weights = Plan.of(Checkpoint(path)).layers[0], load(path)[0]
    check(plan.wk, weights.wk, form.decode(wk), form)
    check(plan.gate, weights.gate, form.decode(gate), form)


REFUSED = {
    # Their words look like twice, or half, as many 4-bit integers in groups of 256, or 64; only the shape tells.
    "compressed-tensors W8A16": (partial(compress, preset="W8A16"), "weight_shape"),
    "compressed-tensors W2A16": (partial(compress, preset="W2A16"), "weight_shape"),
    "compressed-tensors W8A8": (partial(compress, preset="W8A8"), "weight"),
    "compressed-tensors MXFP6A16": (partial(compress, preset="MXFP6A16"), "weight_scale"),
    "ModelOpt W4A8_NVFP4_FP8": (partial(export, config=mtq.W4A8_NVFP4_FP8_CFG), "weight_scale"),
    "ModelOpt INT4_AWQ": (partial(export, config=mtq.INT4_AWQ_CFG), "weight_scale"),
    "torchao MXTensor": (torchao_file, "_weight_scale"),  # may be in a GEMM library's order
}


@pytest.mark.parametrize(("produce", "leaf"), REFUSED.values(), ids=REFUSED)
def test_unsupported_formats(tmp_path, produce, leaf):
    path = write(tmp_path, produce(uneven(128, 256, 128)), produce(uneven(32, 256, 128)))
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert {WK + leaf, GATE + leaf} <= {problem.subject for problem in caught.value.problems}


def glm(width):
    """A GLM-5 of two layers, as transformers builds it."""
    config = GlmMoeDsaConfig(
        architectures=["GlmMoeDsaForCausalLM"], vocab_size=128, hidden_size=256, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=128, kv_lora_rank=128,
        qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, first_k_dense_replace=2,
        index_topk=16, index_head_dim=128, index_n_heads=32,
    )  # fmt: skip
    model = GlmMoeDsaForCausalLM(config).bfloat16().eval()
    for layer in model.model.layers:
        layer.self_attn.indexer.wk.weight.data = uneven(128, 256, width)
        layer.self_attn.indexer.weights_proj.weight.data = uneven(32, 256, width)
    return model


def save_compressed(model, path, preset):
    apply_quantization_config(model, QuantizationConfig(config_groups={preset: ["Linear"]}, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            calibrate(module)
    ModelCompressor.from_pretrained_model(model).compress_model(model)
    model.save_pretrained(path)


def export_modelopt(model, path, config):
    model = mtq.quantize(model, config, lambda model: model(torch.arange(64)[None]))
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=path)


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("compressed-tensors NVFP4A16", partial(save_compressed, preset="NVFP4A16")),
        ("compressed-tensors W4A16_ASYM", partial(save_compressed, preset="W4A16_ASYM")),
        ("ModelOpt NVFP4", partial(export_modelopt, config=mtq.NVFP4_DEFAULT_CFG)),
        ("ModelOpt FP8_PB_WO", partial(export_modelopt, config=mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG)),
    ],
)
def test_whole_model(tmp_path, name, save):
    """All layers of a model's checkpoint, against the library's reading of its tensors."""
    form = FORMATS[name]
    save(glm(form.width), tmp_path)
    stored, layers = load_file(tmp_path / "model.safetensors"), load(tmp_path)
    assert list(layers) == [0, 1]
    for number, plan in Plan.of(Checkpoint(tmp_path)).layers.items():
        for stem, matrix, loaded in ((WK, plan.wk, layers[number].wk), (GATE, plan.gate, layers[number].gate)):
            stem = stem.replace("layers.0", f"layers.{number}")
            leaves = {name.removeprefix(stem): tensor for name, tensor in stored.items() if name.startswith(stem)}
            check(matrix, loaded, form.decode(leaves), form)
