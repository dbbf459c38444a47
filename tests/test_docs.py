"""What the README shows is run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from indexproj.indexer.vllm.plugin import INDEXERS, SWITCH
from indexproj.loading.encodings import ENCODINGS
from support import fp8_layer, write_checkpoint

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
LOADING = (ROOT / "docs/loading.md").read_text()
VLLM = (ROOT / "docs/vllm.md").read_text()
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_commands_and_code(tmp_path):
    """Every `indexproj` line in turn, then the Python blocks on what they wrote."""
    environment = dict(ENVIRONMENT)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("indexproj ")]
    assert [command.split()[1] for command in commands] == ["fixture", "audit", "verify"]
    for command in commands:
        result = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    code = "\n".join(blocks("python"))
    code += "\nassert k.shape == (16, 128) and (k - exact_k).abs().max() < 0.01 * exact_k.abs().max()"
    code += "\nassert gate.shape == (16, 64) and (gate - exact_gate).abs().max() < 0.01 * exact_gate.abs().max()"
    code += "\nassert weights.shape == (128, 64, 7168)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_loading_page(tmp_path):
    (code,) = blocks("python", LOADING)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "model.layers.0.self_attn.indexer.wk.weight_scale_inv: expected scales" in result.stdout
    write_checkpoint(tmp_path / "checkpoint", fp8_layer())
    (command,) = blocks("bash", LOADING)
    result = subprocess.run(command, shell=True, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["loads"]


def test_loading_page_lists_every_encoding():
    rows = {line: line.split("|")[1].strip().split(", ") for line in LOADING.splitlines() if line.startswith("|")}
    for encoding in ENCODINGS:
        (row,) = [row for row, names in rows.items() if encoding.name in names]
        assert ("rounded" in row) != encoding.is_native
        assert all(dtype in row or "the same" in row for dtype in encoding.weight_dtypes)


def test_make_targets_exist():
    targets = {
        target
        for line in map("".join, re.findall(r"^make ([^#\n]+)|`make ([^`]+)`", README + VLLM, re.MULTILINE))
        for target in line.split()
    }
    assert {"demo", "test"} <= targets
    subprocess.run(["make", "-n", *sorted(targets)], cwd=ROOT, check=True, capture_output=True)


def test_vllm_page_names_what_is_swapped():
    for name in (*INDEXERS, SWITCH):
        assert name in VLLM + README


def test_named_files_exist():
    for path in re.findall(r"`((?:kernels|loading|indexer|benchmarks|tests)/[\w/.]*)`", README + LOADING + VLLM):
        assert (ROOT / path).exists(), path


def test_the_floors_import_only_downwards():
    above = {
        "kernels": ("loading", "indexer", "benchmarks"),
        "loading": ("indexer", "benchmarks"),
        "indexer": ("benchmarks",),
    }
    for floor, forbidden in above.items():
        for path in (ROOT / floor).rglob("*.py"):
            text = path.read_text()
            imported = re.findall(r"^\s*(?:from|import) \.*(?:indexproj\.)?(\w+)", text, re.MULTILINE)
            assert not set(imported) & set(forbidden), path
            if path.parent.name != "vllm":
                assert "vllm" not in imported, path
