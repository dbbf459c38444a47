"""dots3-note, whose checkpoints have wk and weights_proj both in FP8, and whose other modules need a GPU.

Replaced here: FlashAttention's module, which a CPU build lacks, the sparse backend (by the CPU's MLA backend), and
torchvision. There are no towers for images and audio.
"""

import importlib.machinery
import json
import sys
from unittest import mock

import pytest
import torch
from vllm import ModelRegistry
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend

from engine import harness
from engine.checkpoints import DEEPSEEK, HEADS, LAYERS, D, H, K, checkpoint, deepseek, pair, values, write
from engine.harness import activations, build, projections

CONFIG = {
    **{name: setting for name, setting in DEEPSEEK.items() if name != "rope_theta"},
    "architectures": ["TinyDots3"], "model_type": "dots3_note", "layer_types": ["full_attention"] * LAYERS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_gate_type": "headwise", "apply_mla_qkv_lora_rescale": False,
    "swa_kv_lora_rank": 64, "swa_qk_rope_head_dim": 64,
}  # fmt: skip
FLASH_ATTENTION = ["compile_flash_attn_varlen_func_from_specs", "flash_attn_varlen_func", "get_scheduler_metadata"]
STUBS = ["torchvision", "torchvision.io", "torchvision.transforms", "torchvision.transforms.v2"]
STUBS += ["vllm.third_party.deep_gemm", "vllm.vllm_flash_attn", "vllm.vllm_flash_attn.flash_attn_interface"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Of a folder with what the model reads besides weights and config."""
    stubs = {}
    for name in STUBS:
        stubs[name] = mock.MagicMock(__path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
    missing = {name: mock.MagicMock() for name in FLASH_ATTENTION if not hasattr(fa_utils, name)}
    with (
        mock.patch.dict(sys.modules, stubs),
        mock.patch.dict(ModelRegistry.models),
        mock.patch.multiple(fa_utils, create=True, **missing),
    ):
        from vllm.models.dots3_note.nvidia import model, multimodal

        ModelRegistry.register_model("TinyDots3", multimodal.Dots3NoteForCausalLM)
        directory = tmp_path_factory.mktemp("dots3")
        (directory / "added_tokens.json").write_text(json.dumps({multimodal.IMAGE_PAD: 100}))
        with mock.patch.object(model, "Dots3NotePaddedSparseBackend", CPUMLABackend):
            yield directory


def tensors_of(makers):
    tensors = deepseek()
    for layer in range(LAYERS):
        tensors |= values(f"model.layers.{layer}.self_attn.", g_proj=(HEADS, K), k_rope_only_layernorm=(64,))
    tensors = {name: tensor for name, tensor in tensors.items() if f"layers.{LAYERS}." not in name}
    return checkpoint(makers, tensors)


@pytest.mark.parametrize("gate", ["fp8_block", "bf16"])
def test_fp8_pair_stays_fp8(path, gate):
    tensors, truth = tensors_of(pair("fp8_block", gate))
    stock, swapped = (build(write(path, tensors, CONFIG), switch) for switch in ("0", "1"))
    harness.assert_neighbors_equal(stock, swapped)
    assert list(projections(swapped)) == list(range(LAYERS))
    assert {module.qweight.dtype for module in projections(swapped).values()} == {torch.float8_e4m3fn}
    harness.assert_outputs(swapped, truth)
    x = activations()[0]
    for layer, module in projections(stock).items():
        harness.assert_close(module(x)[0], x.double() @ truth[layer].T, 2**-7)
        assert module(x)[0].shape == (len(x), D + H)
