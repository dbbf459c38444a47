"""Which layers own an indexer, and how config.json is checked against them."""

import pytest
from safetensors.torch import save_file

from exports import refused, renamed, stream, stream_problems
from indexproj.loading import Checkpoint, Plan, load
from indexproj.loading.headers import parse
from support import GATE, INDEXER, WK, bf16_layer, fp8_layer, only, problems_of, write_checkpoint


def plan_of(tmp_path, owners, config):
    """The plan of tiny layers under a config."""
    path = write_checkpoint(tmp_path, *(bf16_layer(layer, k=32) for layer in owners), config=config)
    return Plan.of(Checkpoint(path))


def test_indexer_without_projection(tmp_path):
    others = {name: tensor for name, tensor in fp8_layer(1).items() if not parse(name).matrix}
    problems = problems_of(write_checkpoint(tmp_path, fp8_layer(0), others))
    stem = INDEXER.format(1)
    assert [problem.subject for problem in problems] == [f"{stem}wk.weight", f"{stem}weights_proj.weight"]


INTEGER = "num_hidden_layers to be an integer from 0 to 999999"


@pytest.mark.parametrize(
    ("config", "subject", "expected"),
    [
        ({"index_head_dim": 64}, WK, "64 in dimension 0 of the matrix (index_head_dim)"),
        ({"hidden_size": 512}, WK, "512 in dimension 1 of the matrix (hidden_size)"),
        ({"index_n_heads": 32}, GATE, "32 in dimension 0 of the matrix (index_n_heads)"),
        *(({"num_hidden_layers": value}, "config.json", INTEGER) for value in ("many", True, -1, 1.5, 10**9)),
    ],
)
def test_config_contradicts_tensors(tmp_path, config, subject, expected):
    problem = only(refused(tmp_path, fp8_layer(), config))
    assert (problem.subject, problem.expected) == (subject, expected)


def test_matrices_that_differ_in_k(tmp_path):
    problem = only(refused(tmp_path, {**bf16_layer(), GATE: bf16_layer(k=128)[GATE]}))
    assert (problem.subject, problem.expected, problem.found) == (GATE, "wk's K = 256", "BF16 [16, 128]")


@pytest.mark.parametrize(("d", "h", "k"), [(128, 16, 384), (128, 32, 256), (64, 16, 256)])
def test_layer_unlike_the_others(tmp_path, d, h, k):
    layers = fp8_layer(0) | fp8_layer(1) | fp8_layer(2, d, h, k)
    problem = only(refused(tmp_path, layers))
    assert (problem.subject, problem.found) == (f"{INDEXER.format(2)}wk.weight", f"({d}, {h}, {k})")
    assert problem.expected == "(D, H, K) = (128, 16, 256), like most layers"
    assert list(load(tmp_path, [0, 1])) == [0, 1]
    assert {problem.subject for problem in refused(tmp_path, layers, {"hidden_size": 384})} > {WK}


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
    strange = renamed(fp8_layer(0, k=384), "model.", "model.mtp.")
    problems = refused(tmp_path, layers | strange, {"num_hidden_layers": 4})
    assert [problem.subject for problem in problems] == ["model.mtp.layers.0.self_attn.indexer.wk.weight"] * 2
    assert problems[0].expected == "hidden layers under model.layers, like most layers"
    assert problems[1].expected == "(D, H, K) = (128, 16, 256), like most layers"


def test_mtp_layers_by_their_own_name(tmp_path):
    tensors, config = fp8_layer(1) | renamed(fp8_layer(1), "layers.1.", "mtp_layers.1."), {"num_hidden_layers": 78}
    nested = {"num_hidden_layers": 9, "text_config": config | {"num_nextn_predict_layers": 1}}  # takes precedence
    plan = Plan.of(Checkpoint(write_checkpoint(tmp_path, tensors, config=nested)))
    assert [(layer.layer, layer.is_mtp) for layer in plan.layers.values()] == [(1, False), (79, True)]
    assert list(load(tmp_path)) == list(stream(tensors, [1, 79], config)) == [1, 79]
    assert len(refused(tmp_path, tensors | fp8_layer(79), config)) == 3  # two layers with one number
    (tmp_path / "config.json").unlink()
    streamed, missing = stream_problems(tensors, [1, 79])
    assert missing.subject == "layer 79"
    for problem in (streamed, only(problems_of(write_checkpoint(tmp_path, tensors)))):
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
        {"text_config": {"num_hidden_layers": 8, "indexer_types": TYPES}}, {"model_type": "glm_moe_dsa", **FREQ},
        {"indexer_types": [*TYPES, "shared"]},  # one more, for the MTP layer
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
        ({"index_topk_pattern": 3}, f"index_topk_pattern {EACH}", "3"),
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


@pytest.mark.parametrize(
    ("other", "source", "layers"),
    [({"index_topk_freq": 4}, DEFAULT, "2, 5-6"), ({"index_topk_pattern": "FFFSSFFS"}, "index_topk_pattern", "5")],
)
def test_schedules_that_disagree(tmp_path, caplog, other, source, layers):
    """Layers load all the same, so this is a warning that names both sources."""
    plan = plan_of(tmp_path, OWNERS, {"num_hidden_layers": 8, "indexer_types": TYPES, **other})
    assert not plan.problems
    warning = only(plan.warnings)
    assert (warning.expected, warning.found) == (
        f"indexer_types and {source} to agree", f"a difference in layers {layers}"
    )  # fmt: skip
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


@pytest.mark.parametrize(
    "kinds", [["linear_attention"] * 3 + ["indexed_attention"], ["linear", "linear", "linear", None, "linear"]]
)
def test_linear_attention_has_no_indexer(tmp_path, kinds):
    """The fifth entry is an MTP layer's."""
    config = {"num_hidden_layers": 4, "indexer_types": ["full"] * 4, "linear_attn_config": {}}
    plan = plan_of(tmp_path, [3], config | {"layer_types": kinds})
    assert not plan.problems
    assert [plan.runs(layer) for layer in range(4)] == [False, False, False, True]
    assert plan_of(tmp_path, [3], config | {"layer_types": ["indexed_attention", *kinds[1:]]}).problems
    assert not plan_of(tmp_path, [3], config).problems  # without layer_types, these layers are unknown
    config.pop("linear_attn_config")
    assert plan_of(tmp_path, [3], config | {"layer_types": kinds[:3]}).problems  # too short to count


def test_config_may_hold_anything_else(tmp_path):
    """Of repeated keys, the last one counts, as everywhere."""
    config = {"torch_dtype": ["many"], "index_head_dim": None, "indexer_types": None, "text_config": 3}
    plan = plan_of(tmp_path, [0], config | {"layer_types": 1})
    assert not plan.problems
    assert not plan.warnings
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2, "hidden_size": 64, "hidden_size": 32}')
    assert list(load(tmp_path)) == [0]
