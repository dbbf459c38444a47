"""Tiny checkpoints of DeepSeek-V3.2, HY-V4, GLM-5.3-Flash and dots3-note, with real tensor names."""

# ruff: noqa: E402
import json
import os
import sys
from pathlib import Path

# Before vLLM and Triton are imported:
os.environ.setdefault("VLLM_PLUGINS", "")  # tests switch the plugin on and off
os.environ["TRITON_INTERPRET"] = "1"
sys.modules.setdefault("kernels", None)  # see tests/conftest.py, which spawned processes do not read

import torch
from safetensors.torch import save_file

from exports import EXPORTS, named
from indexproj.indexer.cli.synthetic import quantize_blocks, random_weight
from indexproj.indexer.models import MODELS
from indexproj.loading.headers import parse

M, K, D, H = 5, 256, 128, 16
# vLLM does not decode an FP8 kv_b_proj with less than a block of 128 rows, or one alone; its MLA backend needs KV_RANK.
HEADS, Q_RANK, KV_RANK, NOPE, ROPE, V, INNER, VOCAB = 4, 128, 512, 32, 64, 32, 128, 128
LAYERS = 2
INDEXER = "model.layers.{}.self_attn.indexer."
ROWS = {"wk": D, "weights_proj": H, "wk_weights_proj": D + H}

DEEPSEEK = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "torch_dtype": "bfloat16",
    "hidden_size": K, "vocab_size": VOCAB, "num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1,
    "index_head_dim": D, "index_n_heads": H, "index_topk": 64, "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS, "q_lora_rank": Q_RANK, "kv_lora_rank": KV_RANK, "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE, "v_head_dim": V, "intermediate_size": INNER, "first_k_dense_replace": 1000,
    "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}  # fmt: skip
DENSE = {**DEEPSEEK, "mlp_layer_types": ["dense"] * LAYERS, "indexer_types": ["full"] * LAYERS}
HY_V4 = {
    **DENSE, "architectures": ["HYV4ForCausalLM"], "model_type": "hy_v4", "enable_ihc": False, "gated_mla": False,
    "layer_types": ["deepseek_sparse_attention"] * LAYERS, "learnable_sink": False,
}  # fmt: skip
GLM5NEXT = {
    **DENSE, "model_type": "glm5_next_text", "qk_rope_head_dim": 0, "layer_types": ["indexed_attention"] * LAYERS,
    "index_kpool": 4, "indexer_rope_interleave": True, "mhc": False, "mla_use_nope": True,
}  # fmt: skip
DOTS3 = {
    **DEEPSEEK, "model_type": "dots3_note", "layer_types": ["full_attention"] * LAYERS, "swa_kv_lora_rank": KV_RANK,
    "attention_gate_type": "headwise", "apply_mla_qkv_lora_rescale": False, "swa_qk_rope_head_dim": ROPE,
}  # fmt: skip


def pair(wk, gate="bf16"):
    """Name of a matrix -> function that makes an Export from (n, k), from the names in EXPORTS."""
    return {"wk": EXPORTS[wk], "weights_proj": EXPORTS[gate]}


BF16, FP8, FUSED = pair("bf16"), pair("fp8_block"), {"wk_weights_proj": EXPORTS["bf16"]}
BOTH_FP8, NVFP4, INT4 = pair("fp8_block", "fp8_block"), pair("nvfp4", "nvfp4"), pair("int4")


def values(prefix, **shapes):
    """`prefix` + name + ".weight" -> random bf16 values, in 1-D around 1; "__" in a name stands for a dot."""
    return {f"{prefix}{name.replace('__', '.')}.weight": value(*shape) for name, shape in shapes.items()}


def value(*shape):
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape)
    return random_weight(*shape, torch.default_generator).bfloat16()


def decoder_layer(prefix):
    """The tensors of a layer with a dense MLP and an indexer."""
    attention, indexer = f"{prefix}self_attn.", f"{prefix}self_attn.indexer."
    queries = {"q_a_proj": (Q_RANK, K), "q_b_proj": (HEADS * (NOPE + ROPE), Q_RANK), "q_a_layernorm": (Q_RANK,)}
    keys = {"kv_a_proj_with_mqa": (KV_RANK + ROPE, K), "kv_b_proj": (HEADS * (NOPE + V), KV_RANK)}
    return {
        **values(attention, **queries, **keys, kv_a_layernorm=(KV_RANK,), o_proj=(K, HEADS * V)),
        **values(f"{prefix}mlp.", gate_proj=(INNER, K), up_proj=(INNER, K), down_proj=(K, INNER)),
        **values(prefix, input_layernorm=(K,), post_attention_layernorm=(K,)),
        **values(indexer, k_norm=(D,), weights_proj=(H, K), wk=(D, K), wq_b=(H * D, Q_RANK)),
        f"{indexer}k_norm.bias": value(D),
    }


def deepseek(**attention):
    """A BF16 checkpoint with one MTP layer. attention: name -> shape of matrices in self_attn that differ."""
    tensors = values("", model__embed_tokens=(VOCAB, K), model__norm=(K,), lm_head=(VOCAB, K))
    for layer in range(LAYERS + 1):
        stem = f"model.layers.{layer}."
        tensors |= decoder_layer(stem) | values(f"{stem}self_attn.", **attention)
    mtp = {"embed_tokens": (VOCAB, K), "eh_proj": (K, 2 * K), "enorm": (K,), "hnorm": (K,)}
    mtp |= {"shared_head__head": (VOCAB, K), "shared_head__norm": (K,)}
    return tensors | values(stem, **mtp)


def hy_v4():
    """Its MTP layer has another name and other parts."""
    old, new = f"model.layers.{LAYERS}.", "model.mtp_layers.0."
    lost = (f"{old}embed_tokens", f"{old}shared_head")
    tensors = {name.replace(old, new): tensor for name, tensor in deepseek().items() if not name.startswith(lost)}
    return tensors | values(new, final_layernorm=(K,))


def glm5next():
    """Without RoPE, and with tensors that pool keys."""
    tensors = deepseek(q_b_proj=(HEADS * NOPE, Q_RANK), kv_a_proj_with_mqa=(KV_RANK, K))
    for layer in range(LAYERS + 1):
        tensors[f"{INDEXER.format(layer)}index_kpool_compress_gate"] = value(D, K)
        tensors[f"{INDEXER.format(layer)}index_kpool_compress_ape"] = value(4, D).float()
    return tensors


def dots3():
    return deepseek(g_proj=(HEADS, K), k_rope_only_layernorm=(64,))


def checkpoint(makers, tensors=None):
    """A checkpoint with new tensors for every projection, and layer -> [D + H, K] fp64, the values to be loaded.

    makers: name of a matrix -> function that makes an Export from (n, k). tensors: by default those of `deepseek()`.
    """
    tensors = deepseek() if tensors is None else tensors
    result, truth = only_projections(tensors, False), {}
    for stem in dict.fromkeys(name[: name.index("indexer.") + 8] for name in only_projections(tensors)):
        exports = {name: make(ROWS[name], K) for name, make in makers.items()}
        truth[parse(stem + "wk").layer(LAYERS)] = torch.cat([export.loaded for export in exports.values()])
        for name, export in exports.items():
            result |= named(stem, name, export)
    return result, truth


def only_projections(tensors, which=True):
    """The tensors of projections, or with which=False all others."""
    parts = ".indexer.wk", ".indexer.weights_proj"
    return {name: tensor for name, tensor in tensors.items() if any(part in name for part in parts) == which}


def fp8_checkpoint(directory, model="deepseek-v3.2"):
    """A checkpoint that is FP8 throughout, as the model is published: its path, and the values of its projections."""
    wide = ("embed_tokens.", "lm_head.", "weights_proj.", "eh_proj.", "shared_head.")  # matrices that stay BF16
    tensors, truth = checkpoint(FP8)
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2 and tensor.dtype == torch.bfloat16 and not any(part in name for part in wide):
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(tensor.float())
    config = {**DEEPSEEK, "quantization_config": MODELS[model].config["quantization_config"]}
    return write(directory, tensors, config), truth


def write(directory: Path, tensors, config=DEEPSEEK) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(config))
    return directory
