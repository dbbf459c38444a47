"""Checkpoints laid out as the published ones, with made-up values: for tests, demonstrations and bug reports."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...kernels.formats import SCALE_BLOCK, scale_shape
from ...loading.checkpoint import INDEX
from .synthetic import quantize_blocks, random_weight

D = 128


@dataclass(frozen=True)
class Model:
    """What a published checkpoint looks like, as far as the indexer is concerned.

    Attributes:
        hidden_size: K.
        heads: H.
        is_fp8: wk and wq_b are FP8 with 128x128 blocks; otherwise everything is BF16.
        norm_dtype: dtype of k_norm.
        hidden_layers: num_hidden_layers; one MTP layer follows.
        indexer_layers: the layers that own an indexer, MTP included.
        shard_name: name of a shard, from its number and the number of shards.
        shards: how many there are in all.
        config: the rest of config.json.
    """

    hidden_size: int
    heads: int
    q_lora_rank: int
    is_fp8: bool
    norm_dtype: torch.dtype
    hidden_layers: int
    indexer_layers: tuple[int, ...]
    shard_name: str
    shards: int
    config: dict[str, Any]


_GLM = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "index_topk": 2048,
    "kv_lora_rank": 512,
    "num_attention_heads": 64,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}
_FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [SCALE_BLOCK, SCALE_BLOCK],
}

MODELS = {
    "deepseek-v3.2": Model(
        hidden_size=7168, heads=64, q_lora_rank=1536, is_fp8=True, norm_dtype=torch.float32,
        hidden_layers=61, indexer_layers=tuple(range(62)),
        shard_name="model-{:05d}-of-{:06d}.safetensors", shards=163,
        config={
            "architectures": ["DeepseekV32ForCausalLM"],
            "model_type": "deepseek_v32",
            "index_topk": 2048,
            "kv_lora_rank": 512,
            "num_attention_heads": 128,
            "qk_rope_head_dim": 64,
            "torch_dtype": "bfloat16",
            "quantization_config": _FP8,
        },
    ),
    "glm-5-bf16": Model(
        hidden_size=6144, heads=32, q_lora_rank=2048, is_fp8=False, norm_dtype=torch.bfloat16,
        hidden_layers=78, indexer_layers=tuple(range(79)),
        shard_name="model-{:05d}-of-{:05d}.safetensors", shards=282,
        config=_GLM,
    ),
    "glm-5.2-fp8": Model(
        hidden_size=6144, heads=32, q_lora_rank=2048, is_fp8=True, norm_dtype=torch.bfloat16,
        hidden_layers=78, indexer_layers=(0, 1, *range(2, 78, 4), 78),
        shard_name="model-{:05d}-of-{:05d}.safetensors", shards=141,
        # The ignore list names a tensor that does not exist (`indexers_proj`), as the published one does.
        config={
            **_GLM,
            "index_topk_freq": 4,
            "index_skip_topk_offset": 3,
            "quantization_config": {**_FP8, "modules_to_not_convert": ["lm_head", "self_attn.indexers_proj"]},
        },
    ),
}  # fmt: skip


def write_fixture(
    kind: str, directory: Path, layers: int | None = None, seed: int = 0, power_of_two_scales: bool = False
) -> list[str]:
    """Writes a checkpoint with the published names, dtypes, shapes, shard layout and config.json.

    Args:
        kind: a key of MODELS.
        directory: made if need be; must be empty.
        layers: how many indexers, the first ones; all of them where left out.
        seed: the same one gives the same bytes.
        power_of_two_scales: FP8 scales are rounded up to powers of two ("scale_fmt": "ue8m0").

    Returns:
        Names of the shards.

    Raises:
        ValueError: an unknown kind, an impossible number of layers, scales of BF16, or a directory that is not empty.
    """
    if kind not in MODELS:
        raise ValueError(f"fixture: expected one of {', '.join(MODELS)}, got {kind!r}")
    model = MODELS[kind]
    count = len(model.indexer_layers) if layers is None else layers
    if not 1 <= count <= len(model.indexer_layers):
        raise ValueError(f"fixture: {kind} has 1 to {len(model.indexer_layers)} indexer layers, got {layers}")
    if power_of_two_scales and not model.is_fp8:
        raise ValueError(f"fixture: {kind} is BF16 and has no scales to round")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"fixture: {directory} is not an empty directory")
    directory.mkdir(parents=True, exist_ok=True)

    owners = model.indexer_layers[:count]
    layers_written = owners[-1] + 1
    makers: dict[str, Callable[[], Tensor]] = {}
    for layer in range(layers_written):
        makers |= _layer(model, f"model.layers.{layer}.", layer in owners, seed, power_of_two_scales)
    names = list(makers)
    # Cut by number of tensors, so that, as in the originals, a weight and its scale can be in different shards.
    shards = max(2, round(model.shards * layers_written / (model.hidden_layers + 1)))
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = model.shard_name.format(shard + 1, shards)
        inside = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        data = save({name: makers[name]() for name in inside}, metadata={"format": "pt"})
        (directory / file).write_bytes(data)  # save_file would keep it from other users
        weight_map |= dict.fromkeys(inside, file)
    files = sorted(set(weight_map.values()))
    total_size = sum((directory / file).stat().st_size for file in files)
    _write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    _write_json(directory / "config.json", _config(model, owners, layers_written, power_of_two_scales))
    return files


def _layer(
    model: Model, prefix: str, has_indexer: bool, seed: int, power_of_two_scales: bool
) -> dict[str, Callable[[], Tensor]]:
    """name -> maker of every tensor of a layer, in order of names."""

    def generator(name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))

    def weight(name: str, n: int) -> Tensor:
        return random_weight(n, model.hidden_size, generator(name))

    def quantized(name: str) -> tuple[Tensor, Tensor]:
        return quantize_blocks(weight(name, D), power_of_two_scales)

    def codes(name: str, shape: tuple[int, int]) -> Tensor:
        # Nobody multiplies by these neighbours: any codes but NaN will do.
        return torch.randint(0, 0x7F, shape, dtype=torch.uint8, generator=generator(name)).view(torch.float8_e4m3fn)

    makers: dict[str, Callable[[], Tensor]] = {
        f"{prefix}input_layernorm.weight": lambda: torch.ones(model.hidden_size, dtype=torch.bfloat16)
    }
    if not has_indexer:
        return makers
    indexer = f"{prefix}self_attn.indexer."
    wk, gate, wq_b = f"{indexer}wk.weight", f"{indexer}weights_proj.weight", f"{indexer}wq_b.weight"
    wq_b_shape = (model.heads * D, model.q_lora_rank)
    makers[f"{indexer}k_norm.bias"] = lambda: torch.zeros(D, dtype=model.norm_dtype)
    makers[f"{indexer}k_norm.weight"] = lambda: torch.ones(D, dtype=model.norm_dtype)
    makers[gate] = lambda: weight(gate, model.heads).bfloat16()
    if model.is_fp8:
        makers[wk] = lambda: quantized(wk)[0]
        makers[f"{wk}_scale_inv"] = lambda: quantized(wk)[1]
        makers[wq_b] = lambda: codes(wq_b, wq_b_shape)
        makers[f"{wq_b}_scale_inv"] = lambda: torch.full(scale_shape(wq_b_shape), 1e-4)
    else:
        makers[wk] = lambda: weight(wk, D).bfloat16()
        makers[wq_b] = lambda: codes(wq_b, wq_b_shape).bfloat16()
    return makers


def _config(model: Model, owners: tuple[int, ...], layers: int, power_of_two_scales: bool) -> dict[str, Any]:
    config = {
        **model.config,
        "hidden_size": model.hidden_size,
        "index_head_dim": D,
        "index_n_heads": model.heads,
        "num_hidden_layers": min(layers, model.hidden_layers),
        "num_nextn_predict_layers": max(0, layers - model.hidden_layers),
        "q_lora_rank": model.q_lora_rank,
    }
    if len(model.indexer_layers) <= model.hidden_layers:
        config["indexer_types"] = [
            "full" if layer in owners else "shared" for layer in range(min(layers, model.hidden_layers))
        ]
    if model.is_fp8 and power_of_two_scales:
        config["quantization_config"] = {**config["quantization_config"], "scale_fmt": "ue8m0"}
    return config


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
