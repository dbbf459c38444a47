"""README and docs: commands and code run, names and files exist. Also: imports only go down."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import torch

from indexproj.indexer.vllm.plugin import INDEXERS
from indexproj.loading.encodings import ENCODINGS
from support import fp8_layer, invoke, write_checkpoint

ROOT = Path(__file__).parent.parent
README, LOADING, VLLM = ((ROOT / page).read_text() for page in ("README.md", "docs/loading.md", "docs/vllm.md"))
FLOORS = ("kernels", "loading", "indexer", "benchmarks", "main")


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_readme_commands_and_code(tmp_path):
    """Every `indexproj` line, then the Python blocks on the checkpoint that the first one wrote."""
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("indexproj ")]
    assert [command.split()[1] for command in commands] == ["fixture", "audit", "verify"]
    script = ["from indexproj.__main__ import app"]
    script += [f"assert not app({shlex.split(command)[1:]}, standalone_mode=False)" for command in commands]
    script += blocks("python")
    script += ["assert k.shape == (16, 128) and (k - exact_k).abs().max() < 0.01 * exact_k.abs().max()"]
    script += ["assert gate.shape == (16, 64) and (gate - exact_gate).abs().max() < 0.01 * exact_gate.abs().max()"]
    script += ["assert weights.shape == (128, 64, 7168)"]
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    command = [sys.executable, "-c", "\n".join(script)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_loading_page_code(tmp_path, monkeypatch, capsys):
    (code,) = blocks("python", LOADING)
    exec(code, {})
    assert "model.layers.0.self_attn.indexer.wk.weight_scale_inv: expected scales" in capsys.readouterr().out
    write_checkpoint(tmp_path / "checkpoint", fp8_layer())
    (command,) = blocks("bash", LOADING)
    monkeypatch.chdir(tmp_path)
    result = invoke(*command.split()[1:])
    assert json.loads(result.stdout)["loads"]


def test_loading_page_lists_every_encoding():
    rows = {line: line.split("|")[1].strip().split(", ") for line in LOADING.splitlines() if line.startswith("|")}
    for encoding in ENCODINGS:
        (row,) = [row for row, names in rows.items() if encoding.name in names]
        assert ("rounded" in row) != (encoding.exact is None)
        assert all(dtype in row or "the same" in row for dtype in encoding.weight_dtypes)


def test_make_targets_and_names_exist():
    found = re.findall(r"^make ([^#\n]+)|`make ([^`]+)`", README + VLLM, re.MULTILINE)
    targets = {target for line in map("".join, found) for target in line.split()}
    assert {"demo", "test"} <= targets
    subprocess.run(["make", "-n", *sorted(targets)], cwd=ROOT, check=True, capture_output=True)
    assert not [name for name in (*INDEXERS, "INDEXPROJ_VLLM") if name not in VLLM]
    test, file = re.search(r"-k (\w+) (\S+)", (ROOT / "tests/gpu/sanitize.sh").read_text()).groups()
    assert f"def {test}(" in (ROOT / file).read_text()
    paths = re.findall(r"`((?:kernels|loading|indexer|benchmarks|tests)/[\w/.]*)`", README + LOADING + VLLM)
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_imports_only_go_down():
    """No module imports from a floor above its own, and there are no circles. Lazy imports count."""
    paths = {}
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            paths[".".join(["indexproj", *(part for part in parts if part not in ("main", "__init__"))])] = path
    graph = {name: set(imports(name, path, paths)) for name, path in paths.items()}
    assert "indexproj.kernels.formats" in graph["indexproj.indexer.cli.synthetic"]
    floor_of = {name: FLOORS.index(path.relative_to(ROOT).parts[0]) for name, path in paths.items()}
    for name, imported in graph.items():
        above = [other for other in imported & paths.keys() if floor_of[other] > floor_of[name]]
        assert not above, f"{name} imports {above}"
        if any(other.split(".")[0] == "vllm" for other in imported):
            assert name.startswith(("indexproj.indexer.vllm.", "indexproj.benchmarks.")), f"{name} imports vllm"
    TopologicalSorter({name: imported & paths.keys() for name, imported in graph.items()}).prepare()  # CycleError


def imports(name, path, modules):
    """Full names of the modules that a module imports anywhere in its code."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield from (full if (full := f"{base}.{alias.name}") in modules else base for alias in node.names)
