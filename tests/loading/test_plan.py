"""Which layers there are, and what the config says of them."""

import pytest
import torch
from safetensors.torch import save_file

from indexproj.loading import Checkpoint, Plan, load
from support import GATE, INDEXER, WK, bf16_layer, fp8_layer, only, problems_of, write_checkpoint


def test_an_indexer_without_its_projection(tmp_path):
    tensors = fp8_layer(1)
    for leaf in ("wk.weight", "wk.weight_scale_inv", "weights_proj.weight"):
        del tensors[INDEXER.format(1) + leaf]
    problems = problems_of(write_checkpoint(tmp_path, fp8_layer(0), tensors))
    assert [problem.subject for problem in problems] == [
        INDEXER.format(1) + leaf for leaf in ("wk.weight", "weights_proj.weight")
    ]


def test_missing_gate(tmp_path):
    tensors = fp8_layer()
    del tensors[GATE]
    assert only(problems_of(write_checkpoint(tmp_path, tensors))).subject == GATE


@pytest.mark.parametrize(
    ("key", "value", "tensor"), [("index_head_dim", 64, WK), ("hidden_size", 512, WK), ("index_n_heads", 32, GATE)]
)
def test_a_config_that_contradicts_the_tensors(tmp_path, key, value, tensor):
    path = write_checkpoint(tmp_path, fp8_layer(), config={"num_hidden_layers": 1, key: value})
    problem = only(problems_of(path))
    assert problem.subject == tensor
    assert f"config.json: {key}" in problem.expected


def test_a_layer_that_differs_from_the_others(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1), fp8_layer(2, k=384))
    problem = only(problems_of(path))
    assert (problem.subject, problem.found) == (INDEXER.format(2) + "wk.weight", "(128, 16, 384)")
    assert list(load(path, [0, 1])) == [0, 1]


@pytest.mark.parametrize(("d", "h", "faulty"), [(256, 256, None), (257, 16, WK), (128, 257, GATE)])
def test_rows_that_a_kernel_can_hold(tmp_path, d, h, faulty):
    path = write_checkpoint(tmp_path, bf16_layer(d=d, h=h))
    if faulty is None:
        assert load(path)[0].shape == (d, h, 256)
    else:
        problem = only(problems_of(path))
        assert (problem.subject, problem.expected) == (faulty, "at most 256 rows")


def test_a_config_may_hold_anything_else(tmp_path):
    config = {
        "torch_dtype": ["many"],
        "index_head_dim": None,
        "indexer_types": None,
        "text_config": 3,
        "layer_types": 1,
    }
    assert list(load(write_checkpoint(tmp_path, fp8_layer(), config=config))) == [0]


def test_mtp_layers_lie_beyond_the_hidden_layers(tmp_path):
    config = {"num_hidden_layers": 9, "text_config": {"num_hidden_layers": 2}}  # the latter counts
    path = write_checkpoint(tmp_path, fp8_layer(1), fp8_layer(2), config=config)
    assert [plan.is_mtp for plan in Plan.of(Checkpoint(path)).layers.values()] == [False, True]


def test_a_layer_under_two_spellings(tmp_path):
    other = {name.replace("layers.0.", "layers.00."): tensor for name, tensor in fp8_layer().items()}
    problems = problems_of(write_checkpoint(tmp_path, {**fp8_layer(), **other}))
    assert len(problems) == 3
    assert all("layers.0" in problem.expected for problem in problems)


def test_a_model_without_indexer(tmp_path):
    shards = {"model.norm.weight": torch.ones(4)}, {"lm_head.weight": torch.ones(4)}
    assert only(problems_of(write_checkpoint(tmp_path, *shards))).found == "none of 2 tensors"


def test_two_prefixes_for_one_layer(tmp_path):
    other = {f"language_model.{name}": tensor for name, tensor in fp8_layer().items()}
    problems = problems_of(write_checkpoint(tmp_path, fp8_layer(), other))
    assert all(problem.expected.startswith("all of layer 0 under ") for problem in problems)
    assert len(problems) == 3


def test_hidden_layers_have_one_prefix(tmp_path):
    """Layer 0 of a draft model, or of MTP layers counted from 0, is not this model's; that of MTP layers may differ."""
    layers = fp8_layer(2), fp8_layer(3), {name.replace("model.", "model.mtp."): t for name, t in fp8_layer(4).items()}
    assert not Plan.of(Checkpoint(write_checkpoint(tmp_path, *layers, config={"num_hidden_layers": 4}))).problems
    strange = {name.replace("model.", "model.mtp."): tensor for name, tensor in fp8_layer(0, k=384).items()}
    problems = problems_of(write_checkpoint(tmp_path, *layers, strange, config={"num_hidden_layers": 4}))
    assert [problem.subject for problem in problems] == ["model.mtp.layers.0.self_attn.indexer.wk.weight"] * 2
    assert problems[0].expected == "hidden layers under model.layers, as most are"
    assert problems[1].expected == "(D, H, K) = (128, 16, 256), as in most layers"


def plan_of(tmp_path, owners, config):
    """The plan of tiny layers under a config."""
    path = write_checkpoint(tmp_path, *(fp8_layer(layer) for layer in owners), config=config)
    return Plan.of(Checkpoint(path))


GLM_52 = [0, 1, *range(2, 78, 4)]
FULL_AND_SHARED = ["full" if layer in GLM_52 else "shared" for layer in range(78)]


@pytest.mark.parametrize(
    "schedule",
    [
        {"index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"indexer_types": FULL_AND_SHARED},
        {"index_topk_pattern": "".join(word[0].upper() for word in FULL_AND_SHARED)},
        {"index_topk_pattern": FULL_AND_SHARED},
        {"indexer_types": FULL_AND_SHARED, "index_topk_freq": 4, "index_skip_topk_offset": 3},
        {"indexer_types": FULL_AND_SHARED, "index_topk_freq": 1},
        {"text_config": {"num_hidden_layers": 78, "indexer_types": FULL_AND_SHARED}},
        {
            "indexer_types": [*FULL_AND_SHARED, "shared"]
        },  # one more, for the MTP layer: of hidden layers it says nothing
        {"model_type": "glm_moe_dsa", "index_topk_freq": 4, "index_skip_topk_offset": 3},
    ],
)
def test_schedules_that_agree_with_the_weights(tmp_path, schedule):
    config = {"num_hidden_layers": 78, "num_nextn_predict_layers": 1, **schedule}
    plan = plan_of(tmp_path, [*GLM_52, 78], config)
    assert not plan.problems
    assert [layer for layer in range(80) if plan.runs(layer)] == [*GLM_52, 78]
    assert [layer for layer in range(80) if plan.has_weights(layer)] == [*GLM_52, 78]


def test_weights_of_layers_that_share_are_legal(tmp_path):
    plan = plan_of(tmp_path, range(6), {"num_hidden_layers": 6, "index_topk_freq": 4})
    assert not plan.problems
    assert [plan.runs(layer) for layer in range(6)] == [True, True, False, False, False, True]
    assert all(plan.has_weights(layer) for layer in range(6))
    assert not plan.runs(-1)


@pytest.mark.parametrize(
    ("schedule", "expected", "found"),
    [
        (
            {"index_topk_freq": 4},
            "indexers of layers 5, which run by index_topk_freq = 4 (index_skip_topk_offset = 2, the default)",
            "an indexer in layers 0-2, 6 only",
        ),
        (
            {"index_topk_freq": 1},
            "weights for the indexers of layers 3-5, 7, which run",
            "an indexer in layers 0-2, 6 only",
        ),
        ({"model_type": "deepseek_v32"}, "layers 3-5, 7, which run by the default of deepseek_v32", "0-2, 6 only"),
        ({"model_type": "glm_moe_dsa"}, "layers 3-5, 7, which run by the default of glm_moe_dsa", "0-2, 6 only"),
        ({"indexer_types": ["full"] * 4 + ["shared"] * 4}, "layers 3, which run by indexer_types", "0-2, 6 only"),
        (
            {"indexer_types": FULL_AND_SHARED[:8], "index_topk_freq": 4},
            "indexer_types and index_topk_freq = 4 (index_skip_topk_offset = 2, the default) to say the same",
            "a difference in layers 2, 5-6",
        ),
        (
            {"indexer_types": FULL_AND_SHARED[:8], "index_topk_pattern": "FFFSSFFS"},
            "indexer_types and index_topk_pattern to say the same",
            "a difference in layers 5",
        ),
        (
            {"indexer_types": ["full"] * 7},
            "indexer_types to say full or shared for each of 8 layers",
            "['full', 'full'",
        ),
        ({"indexer_types": ["full", 3] * 4}, "indexer_types to say full or shared", "['full', 3"),
        ({"index_topk_pattern": "FXFXFXFX"}, "index_topk_pattern to say F or S for each of 8 layers", "'FXFXFXFX'"),
        (
            {"indexer_types": ["full"] * 7, "model_type": "glm_moe_dsa"},
            "indexer_types to say full or shared for each of 8 layers",
            "['full', 'full'",
        ),
        ({"index_topk_pattern": 3}, "index_topk_pattern to say F or S for each of 8 layers", "3"),
        ({"index_topk_freq": 0}, "index_topk_freq and index_skip_topk_offset to be integers", "0 and 2"),
        ({"index_topk_freq": "4"}, "index_topk_freq and index_skip_topk_offset to be integers", "'4' and 2"),
        ({"index_topk_freq": True}, "index_topk_freq and index_skip_topk_offset to be integers", "True and 2"),
        (
            {"index_topk_freq": 4, "index_skip_topk_offset": 2.5},
            "index_topk_freq and index_skip_topk_offset to be integers",
            "4 and 2.5",
        ),
        (
            {"num_hidden_layers": 2, "indexer_types": {"full": 1, "shared": 2}},
            "indexer_types to say full or shared for each of 2 layers",
            "{'full': 1",
        ),
        ({"num_nextn_predict_layers": 0, "num_hidden_layers": 6}, "layers below 6", "an indexer in layers 6"),
    ],
)
def test_schedules_that_contradict(tmp_path, schedule, expected, found):
    path = write_checkpoint(
        tmp_path, *(fp8_layer(layer) for layer in (0, 1, 2, 6)), config={"num_hidden_layers": 8, **schedule}
    )
    problem = only(problems_of(path))
    assert problem.subject == "config.json"
    assert expected in problem.expected
    assert found in problem.found


def test_one_file_of_several_cannot_contradict_a_schedule(tmp_path):
    path = write_checkpoint(tmp_path, fp8_layer(0), fp8_layer(1), config={"num_hidden_layers": 2, "index_topk_freq": 1})
    assert list(load(path / "model-00002-of-00002.safetensors")) == [1]
    save_file(fp8_layer(1), path / "model.safetensors")  # which is the only one, by its name
    assert "layers 0, which run" in only(problems_of(path / "model.safetensors")).expected


@pytest.mark.parametrize(
    "kinds",
    [
        ["linear_attention"] * 3 + ["indexed_attention"],
        ["linear", "linear", "linear", None, "linear"],  # the last one is of an MTP layer
    ],
)
def test_layers_of_linear_attention_have_no_indexer(tmp_path, kinds):
    config = {"num_hidden_layers": 4, "indexer_types": ["full"] * 4, "linear_attn_config": {}}
    plan = plan_of(tmp_path, [3], config | {"layer_types": kinds})
    assert not plan.problems
    assert [plan.runs(layer) for layer in range(4)] == [False, False, False, True]
    assert plan_of(tmp_path, [3], config | {"layer_types": ["indexed_attention", *kinds[1:]]}).problems
    assert not plan_of(tmp_path, [3], config).problems  # without layer_types nobody can say which these are
    config.pop("linear_attn_config")
    assert plan_of(tmp_path, [3], config | {"layer_types": kinds[:3]}).problems  # too few to say anything


def test_mtp_layers_by_their_own_name_are_counted_behind_the_hidden_ones(tmp_path):
    tensors = {name.replace("layers.1.", "mtp_layers.1."): tensor for name, tensor in fp8_layer(1).items()}
    config = {"num_hidden_layers": 78, "num_nextn_predict_layers": 1}
    path = write_checkpoint(tmp_path, fp8_layer(1), tensors, config=config)
    assert [(plan.layer, plan.is_mtp) for plan in Plan.of(Checkpoint(path)).layers.values()] == [(1, False), (79, True)]
    loaded = load(path)
    assert list(loaded) == [1, 79]
    (path / "config.json").unlink()
    problem = only(problems_of(path))
    assert problem.subject.startswith("model.mtp_layers.1.")
    assert problem.expected == "num_hidden_layers in config.json, behind which mtp_layers are counted"


@pytest.mark.parametrize("value", ["many", True, -1, 1.5, 10**9])
def test_sizes_are_numbers(tmp_path, value):
    problem = only(problems_of(write_checkpoint(tmp_path, fp8_layer(), config={"num_hidden_layers": value})))
    assert problem.expected == "num_hidden_layers to be an integer from 0 to 999999"
