"""`make gpu-kit`: one archive that runs without network, and without a GPU as far as that goes."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="would take an hour on a GPU")


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """The unpacked archive."""
    folder = Path(sys.executable).parent
    command = ["make", "-o", ".venv/.installed-dev", f"BIN={folder}", "gpu-kit"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    archive = ROOT / "build/gpu-kit.tar.gz"
    assert archive.stat().st_size < 20e6
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path_factory.mktemp("a folder"), filter="data")
    return Path(tmp_path_factory.getbasetemp(), "a folder0/gpu-kit")


@pytest.fixture
def run(kit, tmp_path):
    """Runs a command in an environment without this clone, and without an index for pip."""

    def run(*command, **extra):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PYTHON": sys.executable}
        return subprocess.run(command, cwd=tmp_path, env=environment | extra, capture_output=True, text=True)

    return run


def test_kit_without_a_gpu_says_what_it_would_run(kit, run):
    result = run("bash", kit / "run.sh", "7")
    assert result.returncode == 2, result.stderr
    *steps, last = result.stdout.splitlines()
    names = [line.split(":")[0].removeprefix("would run ") for line in steps]
    assert names == ["test", "sanitize", "ceilings", "bench", "tune", "ab", "report"]
    assert last == "no GPU here"
    assert "bench --minutes 7 --output results" in steps[3]


def test_kit_has_what_its_commands_need(kit, run):
    """Their modules come from the kit; tests are collected, and skipped with a reason; commands find no GPU."""
    run("bash", kit / "run.sh")
    environment = {"PYTHONPATH": str(kit / "site"), "PYTHONSAFEPATH": "1"}
    script = (
        "import indexproj.benchmarks.bench as a, rich as b, markdown_it as c; print(a.__file__, b.__file__, c.__file__)"
    )
    modules = run(sys.executable, "-c", script, **environment).stdout.split(f"{kit}/site/")
    assert len(modules) == 4
    folders = kit / "tests/gpu", kit / "tests/interpreter"
    tests = run(sys.executable, "-m", "pytest", "-q", "-m", "not full", "--rootdir", kit, *folders, **environment)
    assert tests.returncode == 0, tests.stdout
    assert "needs a GPU" in tests.stdout
    assert " passed" not in tests.stdout
    for command in ("bench", "tune"):
        result = run(sys.executable, "-m", "indexproj", command, **environment)
        assert (result.returncode, result.stderr) == (2, f"{command}: needs a GPU, but there is none\n")
    assert run("bash", kit / "tests/gpu/sanitize.sh").stderr.startswith("sanitize: compute-sanitizer is not installed")


def fake_python(folder, codes):
    """A Python with a GPU, on which each step exits with the next code."""
    path = folder / "python"
    path.write_text(f"""#!/bin/bash
case "$*" in
*torch*get_device_name*) echo "made-up GPU" ;;
*zipfile*) ;;
*) n=$(cat {folder}/count); echo $((n + 1)) > {folder}/count; codes=({codes}); exit ${{codes[n]}} ;;
esac
""")
    (folder / "count").write_text("0")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("codes", "expected"), [("0 0 0 0 0 0", 2), ("0 0 2 0 0 0", 2), ("1 0 2 0 0 0", 1), ("0 0 0 1 0 0", 1)]
)
def test_kit_exits_with_the_worst_code(kit, run, tmp_path, codes, expected):
    """Of all steps but compute-sanitizer, which is not installed here: that makes 2."""
    result = run("bash", kit / "run.sh", "1", PYTHON=fake_python(tmp_path, codes))
    assert result.returncode == expected, result.stdout
    assert (tmp_path / "count").read_text() == "6\n"
    assert f"== Results are in {kit}/results" in result.stdout
    assert "compute-sanitizer is not installed" in (kit / "results/sanitize.log").read_text()


@pytest.mark.parametrize("minutes", ["0", "-1", "1.5", "ten"])
def test_kit_refuses_bad_minutes(kit, run, minutes):
    result = run("bash", kit / "run.sh", minutes)
    assert (result.returncode, result.stderr) == (2, f"run.sh: expected a whole number of minutes, got {minutes}\n")


def test_kit_names_a_missing_package(kit, run, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *zipfile*) exit 0;; esac\necho "No module named torch" >&2\nexit 1\n')
    python.chmod(0o755)
    result = run("bash", kit / "run.sh", PYTHON=str(python))
    assert (result.returncode, result.stderr) == (2, f"run.sh: {python} lacks a package: No module named torch\n")
