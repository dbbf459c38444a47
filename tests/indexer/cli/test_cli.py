"""The command line: tables, exit codes, and errors on stderr."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from exports import EXPORTS, named
from indexproj.__main__ import app
from indexproj.benchmarks.gates import COMPILED, PAIRS, SHAPES, Row
from support import INDEXER, fp8_layer, write_checkpoint


def indexproj(*arguments, **environment):
    command = [Path(sys.executable).with_name("indexproj"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=600)


@pytest.fixture
def fixture_of(tmp_path):
    path = tmp_path / "checkpoint"
    yield lambda kind, *options: indexproj("fixture", kind, path, *options).check_returncode() or path
    shutil.rmtree(path, ignore_errors=True)  # pytest would keep gigabytes


def rows(output):
    return [[cell.strip() for cell in line.strip("│\n ").split("│")] for line in output.splitlines() if line[:1] == "│"]


@pytest.mark.parametrize(
    ("kind", "layers", "wk", "shape", "kept", "upcast"),
    [
        ("deepseek-v3.2", range(62), "FP8 128x128", "128, 64, 7168", "1.84", "2.75"),
        ("glm-5-bf16", range(79), "BF16", "128, 32, 6144", "1.97", "1.97"),
        ("glm-5.2-fp8", [0, 1, *range(2, 75, 4), 78], "FP8 128x128", "128, 32, 6144", "1.18", "1.97"),
    ],
)
def test_audit_of_every_published_layout(fixture_of, kind, layers, wk, shape, kept, upcast):
    result = indexproj("audit", fixture_of(kind))
    assert result.returncode == 0, result.stderr
    expected = [[str(layer), wk, "BF16", kept, upcast, shape, "yes", "yes"] for layer in layers]
    expected[-1][0] += " (MTP)"
    assert rows(result.stdout) == expected
    assert f"Layers with an indexer: {len(expected)}." in result.stdout


def validated(result):
    """The JSON that a command printed, held against the schema in the package."""
    schema = json.loads(files("indexproj.indexer.cli").joinpath("audit.schema.json").read_text())
    report = json.loads(result.stdout)
    jsonschema.Draft202012Validator(schema).validate(report)
    assert result.returncode == (0 if report["loads"] else 2)
    assert bool(report["problems"]) != report["loads"]
    return report


@pytest.mark.parametrize("kind", ["deepseek-v3.2", "glm-5-bf16", "glm-5.2-fp8"])
def test_audit_as_json(fixture_of, kind):
    report = validated(indexproj("audit", fixture_of(kind, "--layers", "4"), "--json"))
    assert [layer["layer"] for layer in report["layers"]] == ([0, 1, 2, 6] if kind == "glm-5.2-fp8" else [0, 1, 2, 3])
    wk = report["layers"][3]["wk"]
    assert wk["encoding"] == ("BF16" if kind == "glm-5-bf16" else "FP8 128x128")
    assert wk["in_memory"] == "native"
    assert {tensor["name"].rpartition(".")[2] for tensor in wk["tensors"]} >= {"weight"}


def test_audit_of_every_encoding_as_json(tmp_path):
    layers = {}
    for layer, make in enumerate(EXPORTS.values()):
        stem = INDEXER.format(layer)
        layers |= named(stem, "wk", make(128, 256)) | named(stem, "weights_proj", EXPORTS["bf16"](16, 256))
    path = write_checkpoint(tmp_path / "all", layers)
    report = validated(indexproj("audit", path, "--json"))
    for layer, name in zip(report["layers"], EXPORTS, strict=True):
        export = EXPORTS[name](128, 256)
        assert layer["wk"]["encoding"] == export.encoding
        assert layer["wk"]["in_memory"] == ("native" if export.is_native else "bf16")
    table = rows(indexproj("audit", path).stdout)
    assert {row[1] for row in table} >= {"BF16", "F32 to BF16", "INT4 to BF16", "NVFP4", "MXFP8"}


def test_audit_of_what_does_not_load_as_json(tmp_path):
    tensors = fp8_layer()
    tensors["model.layers.0.self_attn.indexer.wk.bias"] = torch.zeros(128)
    report = validated(indexproj("audit", write_checkpoint(tmp_path / "tiny", tensors), "--json"))
    assert [problem["subject"].rpartition(".")[2] for problem in report["problems"]] == ["bias"]
    assert report["layers"][0]["wk"]["encoding"] is None
    report = validated(indexproj("audit", tmp_path / "nowhere", "--json"))
    assert (report["layers"], report["counts"]) == ([], None)


@pytest.mark.parametrize("encoding", ["nvfp4", "mxfp8"])
def test_verify_runs_the_kernels_on_the_encoding_of_the_checkpoint(tmp_path, encoding):
    stem = INDEXER.format(0)
    tensors = named(stem, "wk", EXPORTS[encoding](128, 256)) | named(stem, "weights_proj", EXPORTS["bf16"](16, 256))
    result = indexproj("verify", write_checkpoint(tmp_path / "tiny", tensors), "--m", 1)
    assert result.returncode == 0, result.stderr
    ((_, wk, *_, verdict),) = rows(result.stdout)
    assert (wk, verdict) == (encoding.upper(), "ok")


def test_verify_shows_how_much_closer_native_fp8_is(fixture_of):
    result = indexproj("verify", fixture_of("deepseek-v3.2", "--layers", "2"), "--layer", 1, "--m", 9, "--m", 65)
    assert result.returncode == 0, result.stderr
    table = rows(result.stdout)
    assert [row[5:7] for row in table] == [["9", "split_k"], ["65", "tiled"]]
    for layer, wk, gate, kept, upcast, _, _, ours, theirs, closer, verdict in table:
        assert (layer, wk, gate, kept, upcast, verdict) == ("1", "FP8 128x128", "BF16", "1.84", "2.75", "ok")
        assert float(ours) <= 2e-6 < 1e-4 < float(theirs)
        assert int(re.sub(r"\D", "", closer)) > 100
    if not torch.cuda.is_available():
        assert "interpreter" in result.stdout


def test_verify_without_a_scale_names_it(fixture_of):
    path = fixture_of("glm-5.2-fp8", "--layers", "2")
    name = "model.layers.1.self_attn.indexer.wk.weight_scale_inv"
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        if tensors.pop(name, None) is not None:
            save_file(tensors, file)
            damaged = file.name
    for command in ("verify", "audit"):
        result = indexproj(command, path)
        assert result.returncode == 2
        assert (
            f"{name} in {damaged}: expected the tensor that the index puts there, found no such tensor" in result.stderr
        )
        assert "Traceback" not in result.stderr
    assert [row[-1] for row in rows(result.stdout)] == ["yes", "no"]
    assert indexproj("verify", path, "--layer", "0", "--m", "1").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["audit", "nowhere"], "nowhere: expected model.safetensors.index.json or model.safetensors"),
        (["verify", "nowhere"], "nowhere: expected model.safetensors.index.json or model.safetensors"),
        (
            ["verify", "{tiny}", "--layer", "9"],
            "layer 9: expected one of the layers with an indexer, 0, found no indexer in it",
        ),
        (["verify", "{tiny}", "--m", "0"], "--m must be from 1 to 65536, got 0"),
        (["fixture", "glm-9", "new"], "'glm-9' is not one of 'deepseek-v3.2', 'glm-5-bf16', 'glm-5.2-fp8'"),
        (["fixture", "glm-5.2-fp8", "{tiny}/config.json/x"], "Not a directory"),
        (["audit", "{tiny}/config.json"], "found another kind of file"),
        (["fixture", "glm-5.2-fp8", "{tiny}"], "is not an empty directory"),
        (["benchmark"], "No such command"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(tmp_path, arguments, message):
    tiny = write_checkpoint(tmp_path / "tiny", fp8_layer(), config={})
    result = indexproj(*(argument.format(tiny=tiny) for argument in arguments))
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_wrong_kernel_ends_with_1(tmp_path):
    """The verdict is made from the numbers: with a bound of zero everything is wrong."""
    script = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import indexproj.indexer.cli.verify as verify
verify.MAX_ERROR = 0.0
sys.argv = ["indexproj", "verify", sys.argv[1], "--m", "1"]
from indexproj.__main__ import app
app()
"""
    tiny = write_checkpoint(tmp_path / "tiny", fp8_layer())
    result = subprocess.run([sys.executable, "-c", script, tiny], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert rows(result.stdout)[0][-1] == "WRONG"


def test_a_matrix_of_zeros_is_an_error(tmp_path):
    tensors = fp8_layer()
    tensors["model.layers.0.self_attn.indexer.wk.weight_scale_inv"].zero_()
    result = indexproj("verify", write_checkpoint(tmp_path / "tiny", tensors), "--m", 2)
    assert result.returncode == 2
    assert "found nothing but 0" in result.stderr


def test_no_number_is_cut_in_a_narrow_terminal(tmp_path):
    tiny = write_checkpoint(tmp_path / "tiny", fp8_layer())
    result = indexproj("verify", tiny, "--m", 2, COLUMNS="60")
    assert "…" not in result.stdout


def test_help_needs_neither_torch_nor_triton():
    script = "import sys; sys.argv = ['indexproj', '--help']\nfrom indexproj.__main__ import app\n"
    script += "try: app()\nexcept SystemExit: pass\nassert not {'torch', 'triton'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("fixture", "audit", "verify"):
        assert command in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--target is one of sm_80, sm_90"),
        (("--all", "--target", "sm_90"), "--all goes without --target"),
        (("--target", "sm_70"), "got sm_70"),
        (("--target", "sm_90", "--pair", "INT4, BF16"), "got INT4, BF16"),
        (("--target", "sm_90", "--shape", "glm"), "--shape is one of deepseek-v3.2; glm-5; got glm"),
        (("--target", "sm_90", "--cache", __file__), "--cache"),
        (("--target", "sm_90", "--target", "sm_100", "--sm-count", "78"), "one --target, got sm_90, sm_100"),
        (("--all", "--sm-count", "78"), "--sm-count goes with one --target"),
        (("--target", "sm_90", "--sm-count", "0"), "Invalid value for '--sm-count'"),
    ],
)
def test_compile_names_what_there_is(arguments, message):
    result = CliRunner().invoke(app, ["compile", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(("command", "pairs"), [("compile", COMPILED), ("tune", PAIRS)])
def test_help_lists_shapes_and_pairs(command, pairs):
    text = " ".join(CliRunner().invoke(app, [command, "--help"]).stdout.split())
    listed = set(re.findall(r'"([\w ]+, [\w ]+)"', text))
    assert listed == set(pairs)
    for name, (d, h, k) in SHAPES.items():
        assert f"{name} (D={d}, H={h}, K={k})" in text


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"indexproj {importlib.metadata.version('indexproj')}\n")


def test_compile_needs_the_compiler(monkeypatch):
    monkeypatch.setattr("indexproj.kernels.target.INTERPRETED", True)
    result = CliRunner().invoke(app, ["compile", "--target", "sm_90"])
    assert result.exit_code == 2
    assert "nothing is compiled under TRITON_INTERPRET=1" in result.stderr


def test_compile_ends_with_1_and_says_which_kernel_is_at_fault(monkeypatch):
    facts = {"target": "sm_90", "shape": "glm-5", "pair": "BF16, BF16", "gate": "fp32", "programs": 1,
             "weight_reads": 1, "x_reads": 1, "bytes_per_program": 9}  # fmt: skip
    numbers = {"registers": 255, "shared_memory": 0, "per_sm": 1, "mma": 0, "loads": {16: 3}}
    rows = [Row(kernel=kernel, m=4, **facts, **numbers, faults=faults)
            for kernel, faults in (("gemv", ()), ("tiled", ("2 spills",)))]  # fmt: skip
    monkeypatch.setattr("indexproj.benchmarks.gates.rows", lambda *_: rows)
    result = CliRunner().invoke(app, ["compile", "--target", "sm_90"])
    assert result.exit_code == 1
    assert result.stderr.endswith("sm_90, BF16, BF16, tiled, M = 4: 2 spills\n")
    assert [line.split()[-2] for line in result.stdout.splitlines() if "3x16" in line] == ["ok", "faulty"]
