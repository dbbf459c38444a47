"""`make gpu-kit`: one archive that runs without network, and without a GPU as far as that goes."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run everything on the GPU")
def test_kit_without_a_gpu(tmp_path):
    """Says what it would run. What that needs comes from the kit, and finds no GPU."""
    command = ["make", "-o", ".venv/.installed-dev", f"BIN={Path(sys.executable).parent}", "gpu-kit"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    kit = tmp_path / "a folder"
    with tarfile.open(ROOT / "build/gpu-kit.tar.gz") as tar:
        tar.extractall(kit)
    # Without this clone, and without an index for pip.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PIP_NO_INDEX": "1", "PYTHON": sys.executable}

    def run(*command):
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    result = run("bash", kit / "run.sh", "7")
    assert result.returncode == 2, result.stderr
    *steps, last = result.stdout.splitlines()
    names = [line.split(":")[0].removeprefix("would run ") for line in steps]
    assert names == ["test", "sanitize", "ceilings", "bench", "tune", "ab", "report"]
    assert "bench --minutes 7 --output results" in steps[3]
    assert last == "no GPU here"
    environment["PYTHONPATH"] = str(kit / "site")
    script = "import indexproj.benchmarks.bench as a, rich as b, pygments as c; print(a, b, c)"
    assert run(sys.executable, "-c", script).stdout.count(f"{kit}/site/") == 3
    folders = kit / "tests/gpu", kit / "tests/interpreter"
    tests = run(sys.executable, "-m", "pytest", "-q", "-m", "not full", "--rootdir", kit, *folders)
    assert tests.returncode == 0, tests.stdout
    assert "needs a GPU" in tests.stdout
    assert " passed" not in tests.stdout
    bench = run(sys.executable, "-m", "indexproj", "bench")
    assert (bench.returncode, bench.stderr) == (2, "bench: needs a GPU, but there is none\n")


@pytest.fixture
def kit(tmp_path):
    """Starts the scripts alone, with a Python that has a GPU and whose steps run a line of shell.

    There are six steps, besides that of compute-sanitizer, which is not installed here and makes 2.
    """
    shutil.copytree(ROOT / "tests/gpu", tmp_path / "tests/gpu")
    shutil.copy(ROOT / "tests/gpu/run.sh", tmp_path)
    python = tmp_path / "python"

    def start(step, minutes="1", gpu="echo a GPU"):
        cases = f"*zipfile*) exit 0;; *get_device_name*) {gpu}; exit;;"
        python.write_text(f'#!/bin/bash\ncase "$*" in {cases} esac\n{step}\n')
        python.chmod(0o755)
        command = ["env", "-i", "PATH=/usr/bin:/bin", f"PYTHON={python}", "bash", "run.sh", minutes]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize(("codes", "expected"), [("0 0 0 0 0 0", 2), ("1 0 2 0 0 0", 1), ("0 0 0 1 0 0", 1)])
def test_kit_exits_with_the_worst_code(kit, tmp_path, codes, expected):
    (tmp_path / "codes").write_text(codes)
    process = kit('read -r code rest < codes; echo "$rest" > codes; exit $code')
    log = process.communicate()[0]
    assert process.returncode == expected
    assert (tmp_path / "codes").read_text() == "\n"
    assert "compute-sanitizer is not installed" in log
    assert f"== Results are in {tmp_path}/results" in log
    assert (tmp_path / "results/log.txt").read_text() == log


def test_interrupted_kit_ends_its_step(kit):
    process = kit("echo process $$; exec sleep 100")
    step = next(line.split()[1] for line in process.stdout if line.startswith("process "))
    process.send_signal(signal.SIGINT)
    assert "run.sh: interrupted; results are kept" in process.communicate(timeout=10)[0]
    assert process.returncode == 2
    with pytest.raises(ProcessLookupError):
        os.kill(int(step), 0)


@pytest.mark.parametrize(
    ("minutes", "message"),
    [*((text, f"expected a whole number of minutes, got {text}") for text in ("0", "-1", "1.5", "ten")),
     ("10", "{0}/python lacks a package: No module named torch")],
)  # fmt: skip
def test_kit_refuses_bad_minutes_and_python(kit, tmp_path, minutes, message):
    process = kit("exit 0", minutes, gpu="echo No module named torch >&2; exit 1")
    assert process.communicate()[1] == f"run.sh: {message.format(tmp_path)}\n"
    assert process.returncode == 2
