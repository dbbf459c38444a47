"""Writes checkpoints with published layouts and random values, for tests, demos and bug reports."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ...kernels.formats import scale_shape
from ...loading.checkpoint import INDEX
from ..models import MODELS, SHAPES, Model
from .synthetic import quantize_blocks, random_weight


def write_fixture(name: str, directory: Path, layers: int | None = None) -> list[str]:
    """Writes a model of MODELS with its published names, dtypes, shapes and config.json; always the same bytes.

    layers is the number of indexers to write, counted from the first; all by default. Returns the file names of the
    shards. Raises ValueError for an unknown model, layers out of range and a directory that is not empty.
    """
    if name not in MODELS:
        raise ValueError(f"fixture: expected one of {', '.join(MODELS)}, got {name!r}")
    model = MODELS[name]
    count = len(model.indexer_layers) if layers is None else layers
    if not 1 <= count <= len(model.indexer_layers):
        raise ValueError(f"fixture: {name} has 1 to {len(model.indexer_layers)} indexer layers, got {layers}")
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"fixture: {directory} is not an empty directory")
    directory.mkdir(parents=True, exist_ok=True)

    owners = model.indexer_layers[:count]
    layers_written = owners[-1] + 1
    names = [name for layer in range(layers_written) for name in _names(model, layer, layer in owners)]
    # Split by number of tensors, so a weight and its scale can be in different shards, as in published checkpoints.
    shards = 2 * layers_written
    files = [f"model-{shard + 1:05d}-of-{shards:05d}.safetensors" for shard in range(shards)]
    weight_map: dict[str, str] = {}
    for shard, file in enumerate(files):
        inside = names[len(names) * shard // shards : len(names) * (shard + 1) // shards]
        tensors = {name: _tensor(model, name) for name in inside}
        (directory / file).write_bytes(save(tensors, metadata={"format": "pt"}))  # save_file sets mode 0600
        weight_map |= dict.fromkeys(inside, file)
    total_size = sum((directory / file).stat().st_size for file in files)
    _write_json(directory / INDEX, {"metadata": {"total_size": total_size}, "weight_map": weight_map})
    _write_json(directory / "config.json", _config(model, owners))
    return files


def _names(model: Model, layer: int, has_indexer: bool) -> Iterator[str]:
    yield f"model.layers.{layer}.input_layernorm.weight"
    if has_indexer:
        leaves = ["k_norm.bias", "k_norm.weight", "weights_proj.weight", "wk.weight", "wq_b.weight"]
        if model.is_fp8:
            leaves += ["wk.weight_scale_inv", "wq_b.weight_scale_inv"]
        yield from (f"model.layers.{layer}.self_attn.indexer.{leaf}" for leaf in sorted(leaves))


def _tensor(model: Model, name: str) -> Tensor:
    d, h, k = SHAPES[model.shape]
    norm_dtype = getattr(torch, model.norm_dtype)
    wq_b_shape = (h * d, model.config["q_lora_rank"])
    # A weight and its scale come from the same values.
    digest = hashlib.sha256(name.removesuffix("_scale_inv").encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    match name.split(".")[-2:]:
        case "input_layernorm", _:
            return torch.ones(k, dtype=torch.bfloat16)
        case "k_norm", role:
            return torch.full((d,), float(role == "weight"), dtype=norm_dtype)
        case "weights_proj", _:
            return random_weight(h, k, generator).bfloat16()
        case "wk", role:
            weight = random_weight(d, k, generator)
            if not model.is_fp8:
                return weight.bfloat16()
            codes, scale = quantize_blocks(weight)
            return codes if role == "weight" else scale
        case "wq_b", "weight":
            # Not part of the projection: any finite codes will do.
            bits = torch.randint(0, 0x7F, wq_b_shape, dtype=torch.uint8, generator=generator)
            codes = bits.view(torch.float8_e4m3fn)
            return codes if model.is_fp8 else codes.bfloat16()
    return torch.full(scale_shape(wq_b_shape), 1e-4)


def _config(model: Model, owners: tuple[int, ...]) -> dict[str, Any]:
    d, h, k = SHAPES[model.shape]
    layers = owners[-1] + 1
    hidden_layers = min(layers, model.indexer_layers[-1])
    config = {
        **model.config,
        "hidden_size": k,
        "index_head_dim": d,
        "index_n_heads": h,
        "num_hidden_layers": hidden_layers,
        "num_nextn_predict_layers": layers - hidden_layers,
    }
    if len(model.indexer_layers) < model.indexer_layers[-1]:
        config["indexer_types"] = ["full" if layer in owners else "shared" for layer in range(hidden_layers)]
    return config


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
