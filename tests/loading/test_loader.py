"""From files to weights: what loads, what is read, and whose problems count."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exports import EXPORTS, named, renamed
from indexproj.kernels import DenseMatrix
from indexproj.loading import Checkpoint, CheckpointError, Plan, load
from indexproj.loading.checkpoint import INDEX
from indexproj.loading.headers import parse
from support import GATE, INDEXER, SCALE, WK, bf16_layer, fp8_layer, only, problems_of, same, write_checkpoint


def test_load_by_any_path(tmp_path):
    """A file, its directory, or the index file, also in a directory named like a file."""
    tensors = fp8_layer()
    for name in ("model.safetensors", "anything.safetensors"):
        save_file(tensors, tmp_path / name)
    odd = write_checkpoint(tmp_path / "glm.safetensors", tensors)
    for path in (tmp_path, tmp_path / "anything.safetensors", odd, odd / INDEX):
        assert same(load(path)[0].gate, DenseMatrix(tensors[GATE]))


def test_load_some_layers(tmp_path):
    path = write_checkpoint(tmp_path, *map(fp8_layer, (0, 2, 11)))
    assert list(load(path)) == [0, 2, 11]
    assert load(path, []) == {}
    assert list(load(path, np.array([11]))) == [11]
    problem = only(problems_of(path, [1, 2]))
    assert str(problem) == "layer 1: expected one of the layers with an indexer, 0, 2, 11, found no indexer in it"
    with pytest.raises(TypeError, match="'str' object cannot be interpreted as an integer"):
        load(path, ["0"])
    with pytest.raises(ValueError, match="got meta"):
        load(path, device="meta")


def test_load_one_shard_of_several(tmp_path):
    tensors = fp8_layer()
    path = write_checkpoint(tmp_path, {SCALE: tensors.pop(SCALE)}, tensors)
    assert only(problems_of(path / "model-00002-of-00002.safetensors")).subject == SCALE


def test_load_fused_matrix_with_index_head_dim(tmp_path):
    """[160, 256] with D = 64 and without a config used to load as D = 128."""
    both = named(INDEXER.format(0), "wk_weights_proj", EXPORTS["bf16"](160, 256))
    path = write_checkpoint(tmp_path, both)
    assert "to split wk_weights_proj" in only(problems_of(path)).expected
    assert load(path, index_head_dim=64)[0].shape == (64, 96, 256)
    path = write_checkpoint(tmp_path, both, config={"index_head_dim": 128})
    assert load(path)[0].shape == (128, 32, 256)
    assert load(path, index_head_dim=np.int64(64))[0].shape == (64, 96, 256)
    with pytest.raises(CheckpointError, match="expected 64 in dimension 0 of the matrix"):
        load(write_checkpoint(tmp_path, bf16_layer()), index_head_dim=64)
    for value in ("128", "", True, 128.0):
        with pytest.raises(TypeError, match=f"index_head_dim: expected an integer, got {value!r}"):
            load(path, index_head_dim=value)


def test_load_reads_only_its_bytes(tmp_path):
    """Counted by the kernel: pages of the mapped file that the process has touched."""
    big = {f"model.layers.0.mlp.experts.{n}.w.weight": torch.zeros(64 << 20, dtype=torch.uint8) for n in range(3)}
    tensors = fp8_layer(k=7168, h=64)
    path = write_checkpoint(tmp_path, {**big, **tensors})
    needed = sum(tensors[name].nbytes for name in (WK, SCALE, GATE))
    checkpoint = Checkpoint(path)
    assert list(load(checkpoint)) == [0]
    maps = Path("/proc/self/smaps").read_text()
    touched = sum(map(int, re.findall(rf"{re.escape(str(path))}.*\n(?:.*\n)*?Rss: +(\d+) kB", maps))) << 10
    # A page fault maps up to 64 KiB around it; the header and three tensors cause a handful of partial ones.
    assert needed < touched < needed + (1 << 20)


def test_load_allocates_only_weights(tmp_path, poison):
    """Also for layers that share: every byte that a load returns is one of the checkpoint."""
    layers = {layer: fp8_layer(layer) for layer in (0, 1, 5)}
    loaded = load(write_checkpoint(tmp_path, *layers.values(), config={"num_hidden_layers": 6, "index_topk_freq": 4}))
    needed = sum(layer[name].nbytes for layer in layers.values() for name in layer if parse(name).matrix)
    assert sum(weights.nbytes for weights in loaded.values()) == needed
    assert all(matrix.dequantize().isfinite().all() for pair in loaded.values() for matrix in (pair.wk, pair.gate))


def test_names_without_an_indexer(tmp_path):
    tensors = renamed(fp8_layer(), "self_attn", "mlp")
    assert only(problems_of(write_checkpoint(tmp_path, tensors))).found == "none of 5 tensors"


def test_deepseek_inference_names(tmp_path):
    """One file per rank without an index, each with all indexers; `attn`, `scale` and `mtp`."""
    files, stems = {}, ("layers.0.attn", "layers.1.attn", "mtp.0.attn")
    for stem in stems:
        files |= renamed(renamed(fp8_layer(), "model.layers.0.self_attn", stem), "weight_scale_inv", "scale")
    for rank in range(2):
        save_file(files, tmp_path / f"model{rank}-mp2.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}))
    plan, loaded = Plan.of(Checkpoint(tmp_path)), load(tmp_path)
    assert [layer.is_mtp for layer in plan.layers.values()] == [False, False, True]
    for layer, stem in enumerate(stems):
        assert torch.equal(loaded[layer].wk.scale, files[f"{stem}.indexer.wk.scale"])
    assert list(load(tmp_path / "model1-mp2.safetensors")) == [0, 1, 2]


def without_scale(layer):
    return {name: tensor for name, tensor in fp8_layer(layer).items() if not name.endswith("wk.weight_scale_inv")}


@pytest.mark.parametrize(
    ("make", "config", "expected"),
    [
        (fp8_layer, {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, "layers below 2 (num_hidden"),
        (fp8_layer, {"num_hidden_layers": 4, "indexer_types": ["full"] * 4}, "weights for the indexers of layers 3"),
        (fp8_layer, {"num_hidden_layers": 3, "indexer_types": ["full"]}, "indexer_types to say full or shared"),
        (fp8_layer, {"num_nextn_predict_layers": "many"}, "num_nextn_predict_layers to be an integer"),
        (without_scale, {}, "layers.2.self_attn.indexer.wk.weight_scale_inv in model-00003-of-00003"),
        (lambda n: {f"mtp.{n}.attn.indexer.wk.weight": torch.ones(1)}, {}, "num_hidden_layers (config.json), after"),
    ],
)
def test_problems_of_other_layers(tmp_path, caplog, make, config, expected):
    """They do not concern layer 0, which loads with a warning."""
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1), make(2), config=config)
    assert expected in str(only(problems_of(path)))
    assert list(load(path, [0])) == [0]
    assert expected in only(caplog.records).getMessage()
