"""The command line: help, version, exit codes and messages on stderr. `verify` is in tests/interpreter."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import indexproj
from support import fp8_layer, invoke, write_checkpoint

MODULE = [sys.executable, "-m", "indexproj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["audit", "nowhere"],
            "nowhere: expected the directory of a checkpoint or a .safetensors file, found no such",
        ),
        (["audit", "{tiny}/config.json"], "or a .safetensors file, found another file"),
        (["audit", "{tiny}/.."], "expected model.safetensors.index.json or model.safetensors, found no .safetensors"),
        (["fixture", "glm-9", "new"], "expected one of deepseek-v3.2, glm-5-bf16, glm-5.2-fp8, got 'glm-9'"),
        (["fixture", "glm-5.2-fp8", "new", "--layers", "0"], "glm-5.2-fp8 has 1 to 22 indexer layers, got 0"),
        (["fixture", "glm-5.2-fp8", "new", "--layers", "23"], "glm-5.2-fp8 has 1 to 22 indexer layers, got 23"),
        (["fixture", "glm-5.2-fp8", "{tiny}/config.json/x"], "Not a directory"),
        (["fixture", "glm-5.2-fp8", "{tiny}"], "is not an empty directory"),
        (["benchmark"], "No such command"),
    ],
)
def test_bad_input_exits_with_2(tmp_path, arguments, message):
    tiny = write_checkpoint(tmp_path / "tiny", fp8_layer(), config={})
    result = invoke(*(argument.format(tiny=tiny) for argument in arguments), code=2)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1 or "Usage" in result.stderr
    assert not Path("new").exists()


@pytest.mark.parametrize("arguments", [["audit", "."], ["audit", ".", "--json"], ["--help"]])
def test_full_disk(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(write_checkpoint(tmp_path, fp8_layer(), config={}))
    with open("/dev/full", "w") as full:
        result = subprocess.run([*MODULE, *arguments], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (2, "[Errno 28] No space left on device\n")


def test_help_imports_neither_torch_nor_triton():
    script = "import sys\nfrom indexproj.__main__ import app\n"
    script += "try: app(['--help'])\nexcept SystemExit: pass\nassert not {'torch', 'triton'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("fixture", "audit", "verify", "compile", "tune", "bench"):
        assert f"\n  {command} " in result.stdout


@pytest.mark.parametrize("command", [MODULE, [Path(sys.executable).with_name("indexproj")]])
def test_version(command):
    output = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    assert output == f"indexproj {importlib.metadata.version('indexproj')}\n"
    assert indexproj.__version__ in output
