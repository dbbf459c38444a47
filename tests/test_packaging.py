"""The wheel, in an environment that has nothing else."""

import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(python, script, **environment):
    result = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """python of an empty environment with the wheel in it, and without what it depends on."""
    source = tmp_path_factory.mktemp("source")
    for name in ("main", "kernels", "loading", "indexer", "benchmarks", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        source / "dist",
        source,
    ]
    subprocess.run(build, check=True)
    (wheel,) = (source / "dist").glob("*.whl")
    venv.create(source / "venv", with_pip=True)
    python = source / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    return python


def test_one_top_level_name(installed):
    run(
        installed,
        """
import importlib.util as util
assert util.find_spec("indexproj").submodule_search_locations
for name in ("main", "kernels", "loading", "indexer", "benchmarks", "tests"):
    assert util.find_spec(name) is None, name
""",
    )


def test_what_the_wheel_holds(installed):
    files = run(installed, "import importlib.metadata as m; print(*m.files('indexproj'), sep='\\n')").splitlines()
    sources = {
        f"indexproj/{path.relative_to(ROOT)}".replace("/main/", "/")
        for name in ("main", "kernels", "loading", "indexer", "benchmarks")
        for path in (ROOT / name).rglob("*.py")
    }
    assert {file for file in files if file.endswith(".py")} == sources
    assert {file for file in files if file.endswith("py.typed")} == {
        f"indexproj/{name}py.typed" for name in ("", "kernels/", "loading/", "indexer/")
    }
    assert "indexproj/benchmarks/stub.c" in files
    assert any(file.endswith("LICENSE") for file in files)


def test_importing_needs_no_gpu_no_driver_and_no_vllm(installed):
    dependencies = sysconfig.get_path("purelib")
    run(
        installed,
        f"""
import sys
sys.path.append({dependencies!r})

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vllm":
            raise AssertionError("vllm was imported")

sys.meta_path.insert(0, Refuse())
import indexproj.indexer
from indexproj.indexer import IndexerProjection
import indexproj.kernels, indexproj.loading, indexproj.indexer.vllm.plugin
import torch, triton
assert indexproj.indexer.__file__.startswith(sys.prefix), indexproj.indexer.__file__
assert not torch.cuda.is_initialized()
assert triton.runtime.driver._active is None
""",
        CUDA_VISIBLE_DEVICES="",
        HIP_VISIBLE_DEVICES="",
    )


def test_vllm_finds_the_plugin(installed):
    found = run(
        installed,
        "from importlib.metadata import entry_points as e; print(*(p.value for p in e(group='vllm.general_plugins')))",
    )
    assert found.split() == ["indexproj.indexer.vllm:register"]


def test_the_requirements_hold_every_pair_that_torch_pins():
    from packaging.requirements import Requirement

    requires = {}
    for line in subprocess.run(
        [sys.executable, "-c", "import importlib.metadata as m; print(*m.requires('indexproj'), sep='\\n')"],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines():  # fmt: skip
        requirement = Requirement(line)
        if "extra" not in str(requirement.marker):
            requires[requirement.name] = requirement.specifier
    assert set(requires) == {"torch", "triton", "safetensors", "numpy", "rich", "typer"}
    for torch, triton in (
        ("2.11.0", "3.6.0"),
        ("2.12.1", "3.7.0"),
        ("2.13.0", "3.7.1"),
        ("2.14.1", "3.8.0"),
        ("2.15.0", "3.9.0"),
    ):
        assert torch in requires["torch"]
        assert triton in requires["triton"]
    assert "2.16.0" not in requires["torch"]
    assert "3.10.0" not in requires["triton"]
