"""What the README shows is run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_commands_and_code(tmp_path):
    """Every `indexproj` line in turn, then the Python blocks on what they wrote."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
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


def test_make_targets_exist():
    targets = {target for line in re.findall(r"^make ([^#\n]+)", README, re.MULTILINE) for target in line.split()}
    assert {"demo", "test"} <= targets
    subprocess.run(["make", "-n", *sorted(targets)], cwd=ROOT, check=True, capture_output=True)


def test_named_files_exist():
    for path in re.findall(r"`((?:kernels|loading|indexer|benchmarks|tests)/[\w/.]*)`", README):
        assert (ROOT / path).exists(), path


def test_the_floors_import_only_downwards():
    above = {
        "kernels": ("loading", "indexer", "benchmarks"),
        "loading": ("indexer", "benchmarks"),
        "indexer": ("benchmarks",),
    }
    for floor, forbidden in above.items():
        for path in (ROOT / floor).rglob("*.py"):
            imported = re.findall(r"^\s*(?:from|import) \.*(?:indexproj\.)?(\w+)", path.read_text(), re.MULTILINE)
            assert not set(imported) & set(forbidden), path
            assert "vllm" not in imported, path
