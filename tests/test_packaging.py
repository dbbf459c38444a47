"""The wheel, installed in an empty environment."""

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
FLOORS = ("main", "kernels", "loading", "indexer", "benchmarks")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs a script in an environment that has the wheel and none of its dependencies."""
    source = tmp_path_factory.mktemp("source")
    for name in (*FLOORS, "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", source, source], check=True)
    (wheel,) = source.glob("*.whl")
    venv.create(source / "venv")
    python = source / "venv/bin/python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True)

    def run(script, **environment):
        result = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    return run


def test_one_top_level_name(run):
    names = ("indexproj", *FLOORS, "tests")
    found = run(f"import importlib.util as u; print(*(n for n in {names} if u.find_spec(n)))")
    assert found == ["indexproj"]


def test_wheel_contents(run):
    files = set(run("import importlib.metadata as m; print(*m.files('indexproj'), sep='\\n')"))
    sources = [path for floor in FLOORS for suffix in ("*.py", "py.typed", "*.schema.json")
               for path in (ROOT / floor).rglob(suffix)]  # fmt: skip
    expected = {f"indexproj/{path.relative_to(ROOT)}".replace("/main/", "/") for path in sources}
    assert {file for file in files if file.startswith("indexproj/") and ".pyc" not in file} == expected
    data = {f"indexproj/{floor}py.typed" for floor in ("", "kernels/", "loading/", "indexer/")}
    assert expected > {*data, "indexproj/indexer/cli/audit.schema.json"}
    assert any(file.endswith("LICENSE") for file in files)
    assert any(file.endswith("bin/indexproj") for file in files)


def test_import_needs_no_gpu_no_driver_and_no_vllm(run):
    script = f"""
import sys
sys.path.append({sysconfig.get_path("purelib")!r})
sys.modules["vllm"] = None  # an import of it raises
import indexproj.kernels, indexproj.loading, indexproj.indexer.vllm.plugin
from indexproj.indexer import IndexerProjection
import torch, triton
assert indexproj.indexer.__file__.startswith(sys.prefix), indexproj.indexer.__file__
assert not torch.cuda.is_initialized()
assert triton.runtime.driver._active is None
"""
    run(script, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")


def test_vllm_entry_point(run):
    script = "import importlib.metadata as m; print(*(p.value for p in m.entry_points(group='vllm.general_plugins')))"
    assert run(script) == ["indexproj.indexer.vllm:register"]


def test_requirements_allow_every_triton_that_torch_pins():
    requirements = map(Requirement, importlib.metadata.requires("indexproj"))
    allowed = {r.name: r.specifier for r in requirements if "extra" not in str(r.marker)}
    assert set(allowed) == {"torch", "triton", "safetensors", "numpy", "rich", "typer"}
    pins = {"2.11.0": "3.6.0", "2.12.1": "3.7.0", "2.13.0": "3.7.1", "2.14.1": "3.8.0", "2.15.0": "3.9.0"}
    assert all(torch in allowed["torch"] and triton in allowed["triton"] for torch, triton in pins.items())
    assert "2.16.0" not in allowed["torch"]
    assert "3.10.0" not in allowed["triton"]
