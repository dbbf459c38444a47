"""The wheel: what is in it, and that it imports in an environment without a GPU, a driver and vLLM."""

import importlib.metadata
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FLOORS = ("main", "kernels", "loading", "indexer", "benchmarks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in (*FLOORS, "tests", "pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "-q", "wheel", "--no-deps", "--no-build-isolation", "-w", source, source]
    subprocess.run(command, check=True)
    return zipfile.ZipFile(*source.glob("*.whl"))


def test_wheel_contents(wheel):
    """One top-level name, with all modules and data, and the entry points."""
    (info,) = {name.split("/")[0] for name in wheel.namelist()} - {"indexproj"}
    files = {name for name in wheel.namelist() if not name.startswith(f"{info}/")}
    sources = [path for floor in FLOORS for suffix in ("*.py", "py.typed", "*.schema.json")
               for path in (ROOT / floor).rglob(suffix)]  # fmt: skip
    assert files == {f"indexproj/{path.relative_to(ROOT)}".replace("/main/", "/") for path in sources}
    data = {f"indexproj/{floor}py.typed" for floor in ("", "kernels/", "loading/", "indexer/")}
    assert files > {*data, "indexproj/indexer/cli/audit.schema.json"}
    assert any(name.endswith("LICENSE") for name in wheel.namelist())
    found = wheel.read(f"{info}/entry_points.txt").decode().split()
    assert found == ["[console_scripts]", "indexproj", "=", "indexproj.__main__:main",
                     "[vllm.general_plugins]", "indexproj", "=", "indexproj.indexer.vllm:register"]  # fmt: skip


def test_import_needs_no_gpu_no_driver_and_no_vllm(wheel, tmp_path):
    wheel.extractall(tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
sys.modules["vllm"] = None  # an import of it raises
import indexproj.kernels, indexproj.loading, indexproj.indexer.vllm.plugin
from indexproj.indexer import IndexerProjection
import torch, triton
assert indexproj.indexer.__file__.startswith(sys.path[0]), indexproj.indexer.__file__
assert not torch.cuda.is_initialized()
assert triton.runtime.driver._active is None
"""
    environment = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    result = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_requirements_allow_every_triton_that_torch_pins():
    requirements = map(Requirement, importlib.metadata.requires("indexproj"))
    allowed = {r.name: r.specifier for r in requirements if "extra" not in str(r.marker)}
    assert set(allowed) == {"torch", "triton", "safetensors", "numpy", "rich", "typer"}
    pins = {"2.11.0": "3.6.0", "2.12.1": "3.7.0", "2.13.0": "3.7.1", "2.14.1": "3.8.0", "2.15.0": "3.9.0"}
    assert all(torch in allowed["torch"] and triton in allowed["triton"] for torch, triton in pins.items())
    assert "2.16.0" not in allowed["torch"]
    assert "3.10.0" not in allowed["triton"]
