"""Writes checkpoints with published layouts and random values, for tests, demos and bug reports."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

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
    files = [f"model-{shard + 1:05d}-of-{2 * count:05d}.safetensors" for shard in range(2 * count)]
    weight_map: dict[str, str] = {}
    for number, layer in enumerate(owners):
        names = sorted(tensors := _layer(model, layer))
        # Alternate, so that a weight and its scale are in different shards, as in published checkpoints.
        for file, inside in zip(files[2 * number :], (names[::2], names[1::2]), strict=False):
            data = save({name: tensors[name] for name in inside}, metadata={"format": "pt"})
            (directory / file).write_bytes(data)  # save_file sets mode 0600
            weight_map |= dict.fromkeys(inside, file)
    for name, value in (INDEX, {"metadata": {}, "weight_map": weight_map}), ("config.json", _config(model, owners)):
        (directory / name).write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return files


def _layer(model: Model, layer: int) -> dict[str, Tensor]:
    """All tensors of the indexer, and one beside it."""
    d, h, k = SHAPES[model.shape]
    generator = torch.Generator().manual_seed(1 + layer)  # `verify` draws x with seed 0
    wk, gate = random_weight(d, k, generator), random_weight(h, k, generator)
    wq_b, norm = torch.ones(h * d, model.config["q_lora_rank"]), getattr(torch, model.norm_dtype)
    tensors = {"k_norm.weight": torch.ones(d, dtype=norm), "k_norm.bias": torch.zeros(d, dtype=norm)}
    tensors["weights_proj.weight"] = gate.bfloat16()
    for name, weight in ("wk.weight", wk), ("wq_b.weight", wq_b):
        if "quantization_config" in model.config:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_blocks(weight)
        else:
            tensors[name] = weight.bfloat16()
    stem = f"model.layers.{layer}."
    named = {f"{stem}self_attn.indexer.{name}": tensor for name, tensor in tensors.items()}
    return {f"{stem}input_layernorm.weight": torch.ones(k, dtype=torch.bfloat16), **named}


def _config(model: Model, owners: tuple[int, ...]) -> dict[str, Any]:
    d, h, k = SHAPES[model.shape]
    layers = owners[-1] + 1
    hidden_layers = min(layers, model.indexer_layers[-1])
    config = model.config | {"hidden_size": k, "index_head_dim": d, "index_n_heads": h}
    config |= {"num_hidden_layers": hidden_layers, "num_nextn_predict_layers": layers - hidden_layers}
    if len(model.indexer_layers) < model.indexer_layers[-1]:
        config["indexer_types"] = ["full" if layer in owners else "shared" for layer in range(hidden_layers)]
    return config
