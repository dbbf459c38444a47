"""Which layers own an indexer, what config.json says about them, what loads, and whose problems count."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from exports import EXPORTS, named, refused, renamed, stream, stream_problems
from indexproj.kernels import Format, Matrix
from indexproj.loading import Checkpoint, CheckpointError, Plan, load
from indexproj.loading.checkpoint import INDEX
from indexproj.loading.headers import parse
from support import GATE, INDEXER, WK, bf16_layer, fp8_layer, only, problems_of, same, write_checkpoint


def plan_of(tmp_path, owners, config):
    path = write_checkpoint(tmp_path, *(bf16_layer(layer, k=32) for layer in owners), config=config)
    return Plan.of(Checkpoint(path))


def test_indexer_without_projection(tmp_path):
    others = {name: tensor for name, tensor in fp8_layer(1).items() if not parse(name).matrix}
    wk, gate = problems_of(write_checkpoint(tmp_path, fp8_layer(0), others))
    assert wk.subject == INDEXER.format(1) + "wk.weight"
    assert gate.subject == INDEXER.format(1) + "weights_proj.weight"


INTEGER = "num_hidden_layers to be an integer from 0 to 999999"


@pytest.mark.parametrize(
    ("change", "config", "subject", "expected"),
    [
        ({}, {"index_head_dim": 64}, WK, "64 in dimension 0 of the matrix (index_head_dim)"),
        ({}, {"hidden_size": 512}, WK, "512 in dimension 1 of the matrix (hidden_size)"),
        ({}, {"index_n_heads": 32}, GATE, "32 in dimension 0 of the matrix (index_n_heads)"),
        ({GATE: torch.ones(16, 128)}, {}, GATE, "wk's K = 256"),
        *(({}, {"num_hidden_layers": value}, "config.json", INTEGER) for value in ("many", True, -1, 1.5, 10**9)),
    ],
)
def test_shapes_and_sizes_that_differ(tmp_path, change, config, subject, expected):
    problem = only(refused(tmp_path, fp8_layer() | change, config))
    assert (problem.subject, problem.expected) == (subject, expected)


@pytest.mark.parametrize(("old", "new"), [("model.", "text.model."), ("layers.0.", "layers.00.")])
def test_layer_under_two_names(tmp_path, old, new):
    one = {name: tensor for name, tensor in fp8_layer().items() if parse(name).matrix}
    two = renamed(one, old, new)
    problems = refused(tmp_path, one | two)
    assert [problem.subject for problem in problems] == sorted(two)
    assert all(problem.expected.startswith("all tensors of layer 0 under ") for problem in problems)
    halves = dict([*one.items()][:1]) | dict([*two.items()][1:])  # together, they are complete
    assert {problem.subject for problem in refused(tmp_path / "halves", halves)} > {*halves} & {*two}


def test_hidden_layers_have_one_prefix(tmp_path):
    """Layer 0 of a draft model, or of MTP layers numbered from 0, is not this model's; MTP layers may differ."""
    layers = fp8_layer(2) | fp8_layer(3) | renamed(fp8_layer(4), "model.", "model.mtp.")
    plan = Plan.of(Checkpoint(write_checkpoint(tmp_path, layers, config={"num_hidden_layers": 4})))
    assert not plan.problems
    assert [layer.is_mtp for layer in plan.layers.values()] == [False, False, True]
    strange = renamed(fp8_layer(), "model.", "model.mtp.")
    problem = only(refused(tmp_path, layers | strange, {"num_hidden_layers": 4}))
    assert problem.subject == "model.mtp.layers.0.self_attn.indexer.wk.weight"
    assert problem.expected == "hidden layers under model.layers, like most layers"


def test_mtp_layers_by_their_own_name(tmp_path):
    tensors, config = fp8_layer(1) | renamed(fp8_layer(1), "layers.1.", "mtp_layers.1."), {"num_hidden_layers": 78}
    nested = {"num_hidden_layers": 9, "text_config": config | {"num_nextn_predict_layers": 1}}  # takes precedence
    plan = Plan.of(Checkpoint(write_checkpoint(tmp_path, tensors, config=nested)))
    assert [(layer.layer, layer.is_mtp) for layer in plan.layers.values()] == [(1, False), (79, True)]
    assert list(load(tmp_path)) == list(stream(tensors, [1, 79], config)) == [1, 79]
    assert len(refused(tmp_path, tensors | fp8_layer(79), config)) == 3  # two layers with one number
    streamed, missing = stream_problems(tensors, [1, 79])
    assert missing.subject == "layer 79"
    for problem in (streamed, only(problems_of(write_checkpoint(tmp_path / "alone", tensors)))):
        assert problem.subject.startswith("model.mtp_layers.1.")
        assert problem.expected == "num_hidden_layers (config.json), after which mtp_layers are numbered"


# As in GLM-5.2: layers 0, 1, 2 and every fourth run an indexer, the others share the tokens of an earlier one.
OWNERS = [0, 1, 2, 6]
TYPES = ["full" if layer in OWNERS else "shared" for layer in range(8)]
FREQ = {"index_topk_freq": 4, "index_skip_topk_offset": 3}
EACH, INTEGERS = "to say full or shared (F or S) for each of 8 layers", "and index_skip_topk_offset to be integers"
DEFAULT = "index_topk_freq = 4 (index_skip_topk_offset = 2, the default)"


@pytest.mark.parametrize(
    "schedule",
    [
        FREQ, {"indexer_types": TYPES}, {"index_topk_pattern": "FFFSSSFS"}, {"index_topk_pattern": TYPES},
        {"indexer_types": TYPES, **FREQ}, {"indexer_types": TYPES, "index_topk_freq": 1},
        {"model_type": "glm_moe_dsa", **FREQ}, {"indexer_types": [*TYPES, "shared"]},  # one more, for the MTP layer
    ],
)  # fmt: skip
def test_schedules_that_fit(tmp_path, schedule):
    plan = plan_of(tmp_path, [*OWNERS, 8], {"num_hidden_layers": 8, "num_nextn_predict_layers": 1, **schedule})
    assert not plan.problems
    assert not plan.warnings
    assert plan.config.schedules
    assert [layer for layer in range(-1, 10) if plan.runs(layer)] == list(load(tmp_path)) == [*OWNERS, 8]


@pytest.mark.parametrize(
    ("schedule", "expected", "found"),
    [
        ({"index_topk_freq": 4}, f"indexers of layers 5, which run by {DEFAULT}", "an indexer in layers 0-2, 6 only"),
        ({"index_topk_freq": 1}, "weights for the indexers of layers 3-5, 7, which run", "in layers 0-2, 6 only"),
        ({"model_type": "deepseek_v32"}, "layers 3-5, 7, which run by the default of deepseek_v32", "0-2, 6 only"),
        ({"model_type": "glm_moe_dsa"}, "layers 3-5, 7, which run by the default of glm_moe_dsa", "0-2, 6 only"),
        ({"indexer_types": ["full"] * 4 + ["shared"] * 4}, "layers 3, which run by indexer_types", "0-2, 6 only"),
        ({"indexer_types": ["full"] * 7, "model_type": "glm_moe_dsa"}, f"indexer_types {EACH}", "['full', 'full'"),
        ({"indexer_types": ["full", 3] * 4}, f"indexer_types {EACH}", "['full', 3"),
        ({"indexer_types": {"full": 1, "shared": 2}, "num_hidden_layers": 2}, "for each of 2 layers", "{'full': 1"),
        ({"index_topk_pattern": "FXFXFXFX"}, f"index_topk_pattern {EACH}", "'FXFXFXFX'"),
        *(({"index_topk_freq": freq}, INTEGERS, f"{freq!r} and 2") for freq in (0, "4", True)),
        ({"index_topk_freq": 4, "index_skip_topk_offset": 2.5}, INTEGERS, "4 and 2.5"),
    ],
)
def test_schedules_that_contradict_weights(tmp_path, schedule, expected, found):
    plan_of(tmp_path, OWNERS, {"num_hidden_layers": 8, **schedule})
    problem = only(problems_of(tmp_path))
    assert problem.subject == "config.json"
    assert expected in problem.expected
    assert found in problem.found


def test_schedules_that_disagree(tmp_path, caplog):
    """Layers load all the same, so this is a warning that names both sources."""
    plan = plan_of(tmp_path, OWNERS, {"num_hidden_layers": 8, "indexer_types": TYPES, "index_topk_freq": 4})
    assert not plan.problems
    warning = only(plan.warnings)
    assert warning.expected == f"indexer_types and {DEFAULT} to agree"
    assert warning.found == "a difference in layers 2, 5-6"
    assert list(load(tmp_path)) == OWNERS
    assert only(caplog.records).getMessage() == str(warning)


def test_weights_of_layers_that_share(tmp_path):
    plan = plan_of(tmp_path, range(7), {"num_hidden_layers": 6, "index_topk_freq": 4})
    assert not plan.problems
    assert [layer for layer in range(-1, 8) if plan.runs(layer)] == [0, 1, 5, 6]
    assert list(load(tmp_path)) == list(range(7))
    assert list(load(tmp_path, filter(plan.runs, plan.layers))) == [0, 1, 5, 6]


def test_one_file_of_several_cannot_contradict_a_schedule(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1), config={"num_hidden_layers": 2, "index_topk_freq": 1})
    assert list(load(path / "model-00002-of-00002.safetensors")) == [1]
    save_file(fp8_layer(1), path / "model.safetensors")  # by its name, the only file
    assert "layers 0, which run" in only(problems_of(path / "model.safetensors")).expected


@pytest.mark.parametrize("kinds", [["linear_attention"] * 3 + ["indexed_attention"], ["linear"] * 3 + [None, "MTP"]])
def test_linear_attention_has_no_indexer(tmp_path, kinds):
    config = {"num_hidden_layers": 4, "indexer_types": ["full"] * 4, "linear_attn_config": {}}
    plan = plan_of(tmp_path, [3], config | {"layer_types": kinds})
    assert not plan.problems
    assert [plan.runs(layer) for layer in range(4)] == [False, False, False, True]
    assert plan_of(tmp_path, [3], config | {"layer_types": ["indexed_attention", *kinds[1:]]}).problems
    assert not plan_of(tmp_path, [3], config).problems  # without layer_types, these layers are unknown
    config.pop("linear_attn_config")
    assert plan_of(tmp_path, [3], config | {"layer_types": kinds[:3]}).problems  # too short to count


def test_config_may_hold_anything_else(tmp_path):
    plan = plan_of(tmp_path, [0], {"index_head_dim": None, "indexer_types": None, "text_config": 3, "layer_types": 1})
    assert not plan.problems
    assert not plan.warnings


def test_load_by_any_path(tmp_path):
    """A file, its directory, or the index file, also in a directory named like a file."""
    tensors = fp8_layer()
    for name in ("model.safetensors", "anything.safetensors"):
        save_file(tensors, tmp_path / name)
    odd = write_checkpoint(tmp_path / "glm.safetensors", tensors)
    for path in (tmp_path, tmp_path / "anything.safetensors", odd, odd / INDEX):
        assert same(load(path)[0].gate, Matrix(Format.BF16, tensors[GATE]))


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


def test_load_fused_matrix_with_index_head_dim(tmp_path):
    both = named(INDEXER.format(0), "wk_weights_proj", EXPORTS["bf16"](160, 256))
    path = write_checkpoint(tmp_path, both)
    assert "to split wk_weights_proj" in only(problems_of(path)).expected
    path = write_checkpoint(tmp_path, both, config={"index_head_dim": 128})
    assert load(path, index_head_dim=np.int64(64))[0].shape == (64, 96, 256)
    with pytest.raises(CheckpointError, match="expected 64 in dimension 0 of the matrix"):
        load(write_checkpoint(tmp_path, bf16_layer()), index_head_dim=64)
    for value in ("128", True):
        with pytest.raises(TypeError, match=f"index_head_dim: expected an integer, got {value!r}"):
            load(path, index_head_dim=value)


def test_load_reads_and_allocates_only_its_bytes(tmp_path, poison):
    """Also for layers that share. The kernel counts the pages of the mapped file that the process has touched."""
    big = {f"model.layers.0.mlp.experts.{n}.w.weight": torch.zeros(64 << 20, dtype=torch.uint8) for n in range(3)}
    tensors = fp8_layer(0, h=64, k=7168) | fp8_layer(1, h=64, k=7168)
    needed = sum(tensor.nbytes for name, tensor in tensors.items() if parse(name).matrix)
    config = {"num_hidden_layers": 2, "indexer_types": ["full", "shared"]}
    path = write_checkpoint(tmp_path, big | tensors, config=config)
    checkpoint = Checkpoint(path)  # keeps the file mapped
    loaded = load(checkpoint)
    maps = Path("/proc/self/smaps").read_text()
    touched = sum(map(int, re.findall(rf"{re.escape(str(path))}.*\n(?:.*\n)*?Rss: +(\d+) kB", maps))) << 10
    # A page fault maps up to 64 KiB around it; the header and six tensors cause a handful of partial ones.
    assert needed < touched < needed + (1 << 20)
    assert sum(weights.nbytes for weights in loaded.values()) == needed
    assert all(matrix.dequantize().isfinite().all() for pair in loaded.values() for matrix in (pair.wk, pair.gate))


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


@pytest.mark.parametrize(
    ("make", "config", "expected"),
    [
        (fp8_layer, {"num_hidden_layers": 2, "num_nextn_predict_layers": 0}, "layers below 2 (num_hidden"),
        (fp8_layer, {"num_hidden_layers": 4, "indexer_types": ["full"] * 4}, "weights for the indexers of layers 3"),
        (fp8_layer, {"num_hidden_layers": 3, "indexer_types": ["full"]}, "indexer_types to say full or shared"),
        (partial(fp8_layer, k=384), {}, "expected (D, H, K) = (128, 16, 256), like most layers, found (128, 16, 384)"),
        (fp8_layer, {"num_nextn_predict_layers": "many"}, "num_nextn_predict_layers to be an integer"),
        (lambda n: {f"{INDEXER.format(n)}wk.weight": torch.ones(9, 9)}, {}, "layers.2.self_attn.indexer.weights"),
        (lambda n: {f"mtp.{n}.attn.indexer.wk.weight": torch.ones(1)}, {}, "num_hidden_layers (config.json), after"),
    ],
)
def test_problems_of_other_layers(tmp_path, caplog, make, config, expected):
    """They do not concern layer 0, which loads with a warning."""
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1), make(2), config=config)
    assert expected in str(only(problems_of(path)))
    assert list(load(path, [0])) == [0]
    assert expected in only(caplog.records).getMessage()
