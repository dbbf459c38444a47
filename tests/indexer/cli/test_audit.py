"""`indexproj audit`: the table, the JSON and its schema."""

import json
from importlib.resources import files

import jsonschema
import pytest
import torch

from exports import EXPORTS, layer_of
from indexproj.indexer.cli import fixture
from indexproj.loading import Problem
from indexproj.loading.problems import ranges
from support import INDEXER, bf16_layer, fp8_layer, invoke, table_rows, write_checkpoint


@pytest.mark.parametrize(
    ("model", "layers", "wk", "shape", "size", "bf16_size"),
    [
        pytest.param(
            "deepseek-v3.2", range(62), "FP8 128x128", "128, 64, 7168", "1.84", "2.75", marks=pytest.mark.full
        ),
        pytest.param("glm-5-bf16", range(79), "BF16", "128, 32, 6144", "1.97", "1.97", marks=pytest.mark.full),
        ("glm-5.2-fp8", [0, 1, *range(2, 75, 4), 78], "FP8 128x128", "128, 32, 6144", "1.18", "1.97"),
    ],
)
def test_audit_published_layouts(tmp_path, monkeypatch, model, layers, wk, shape, size, bf16_size):
    monkeypatch.setattr(fixture, "random_weight", lambda n, k, _: torch.ones(n, k))  # takes most of the time
    fixture.write_fixture(model, tmp_path)
    result = invoke("audit", tmp_path, code=0)
    for file in tmp_path.iterdir():
        file.unlink()  # a gigabyte, which pytest would keep
    *hidden, mtp = layers
    runs = [*ranges(hidden).split(", "), f"{mtp} (MTP)"]
    assert table_rows(result) == [[run, wk, "BF16", size, bf16_size, shape, "yes", "yes"] for run in runs]
    assert f"Layers with an indexer: {len(layers)}. Tensors: " in result.stdout


def audit_json(path):
    """The report, after validation against the schema in the package."""
    schema = json.loads(files("indexproj.indexer.cli").joinpath("audit.schema.json").read_text())
    result = invoke("audit", path, "--json")
    report = json.loads(result.stdout)
    jsonschema.Draft202012Validator(schema).validate(report)
    assert result.exit_code == (0 if report["loads"] else 2)
    assert bool(report["problems"]) != report["loads"]
    return report


def test_audit_every_encoding(tmp_path):
    path = write_checkpoint(tmp_path, *(layer_of(name, layer=layer) for layer, name in enumerate(EXPORTS)))
    report = audit_json(path)
    for layer, make in zip(report["layers"], EXPORTS.values(), strict=True):
        export = make(128, 256)
        assert layer["wk"]["encoding"] == export.encoding
        assert layer["wk"]["in_memory"] == ("native" if export.is_native else "bf16")
        assert {tensor["name"].rpartition(".")[2] for tensor in layer["wk"]["tensors"]} == set(export.tensors)
    rows = table_rows(invoke("audit", path))
    assert {row[1] for row in rows} >= {"BF16", "F32 to BF16", "INT4 to BF16", "NVFP4", "MXFP8"}


def test_audit_table_fits_100_columns(tmp_path):
    shards = (layer_of("fp8_packed", "fp8_packed", layer, (256, 128), 16384) for layer in (9, 10))
    path = write_checkpoint(tmp_path, *shards, config={"num_hidden_layers": 10, "index_head_dim": 256})
    lines = invoke("audit", path).stdout.splitlines()
    assert "10 (MTP) │ FP8 packed UE8M0 │ FP8 packed UE8M0 │ 6.49 │      12.58 │ 256, 128, 16384" in lines[-2]
    assert max(map(len, lines)) <= 100


def test_audit_problems(tmp_path):
    bias = {INDEXER.format(1) + "wk.bias": torch.zeros(128)}
    path = write_checkpoint(tmp_path, fp8_layer(0) | fp8_layer(1) | bias)
    report = audit_json(path)
    assert [problem["subject"].rpartition(".")[2] for problem in report["problems"]] == ["bias"]
    assert [layer["wk"]["encoding"] for layer in report["layers"]] == ["FP8 128x128", None]
    assert [row[-1] for row in table_rows(invoke("audit", path))] == ["yes", "no"]
    report = audit_json(tmp_path / "nowhere")
    assert (report["layers"], report["counts"]) == ([], None)


def test_audit_warnings_and_unread_shards(tmp_path):
    """Warnings go to stderr and to the JSON, and do not change the exit code."""
    config = {"num_hidden_layers": 2, "indexer_types": ["full", "full"], "index_topk_pattern": "FS"}
    unread = {"model.embed_tokens.weight": torch.ones(1)}
    path = write_checkpoint(tmp_path, bf16_layer(0), bf16_layer(1), unread, config=config)
    (path / "model-00003-of-00003.safetensors").unlink()
    (warning,) = audit_json(path)["warnings"]
    assert (warning["subject"], warning["found"]) == ("config.json", "a difference in layers 1")
    result = invoke("audit", path, code=0)
    assert result.stderr == f"warning: {Problem(**warning)}\n"
    assert "1 shards without projection tensors are missing or unreadable." in result.stdout
    (path / "config.json").unlink()
    assert invoke("audit", path).stderr.startswith("warning: config.json: expected the model's config ")
    assert len(audit_json(path)["warnings"]) == 1
