"""The kernels compile with the Triton of every torch from 2.11 on, not only with the newest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from indexproj.benchmarks.gates import PAIRS
from indexproj.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["3.6.0", "3.7.1", "3.8.0"])
def environment(request, tmp_path):
    """One in which that version of Triton is imported."""
    folder = ROOT / f"build/triton-{request.param}"
    if not (folder / "triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"triton=={request.param}"], check=True)
    return {**os.environ, "PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(tmp_path)}


def test_one_config_of_each_regime_and_pair(environment):
    script = Path(__file__).with_name("older.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    version = environment["PYTHONPATH"].rpartition("-")[2]
    assert json.loads(result.stdout) == {"version": version, "count": 2 * 3 * len(PAIRS), "faults": []}


def test_launches_reach_the_driver(environment):
    """By what Triton keeps to itself, and may change: the runner of a compiled kernel."""
    tests = ROOT / "tests/kernels/test_launch.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", tests, "-k", "short_way"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "2 passed" in result.stdout
