"""The kernels compile with the Triton version of every torch since 2.11."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from indexproj.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 disables compilation")
ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["3.6.0", "3.7.1", "3.8.0"])
def older(request, tmp_path):
    """A version of Triton, and environment variables with which Python imports it."""
    folder = ROOT / f"build/triton-{request.param}"
    if not (folder / "triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"triton=={request.param}"], check=True)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return request.param, {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}


def test_older_triton_compiles_each_regime_and_format(older):
    version, environment = older
    script = Path(__file__).with_name("older.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout) == {"version": version, "count": 2 * 4 * 5, "faults": []}


def test_older_triton_launches(older):
    """Launches call the runner of a compiled kernel, which is not public and may change."""
    tests = ROOT / "tests/kernels/test_launch.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", tests, "-k", "direct_launch"]
    result = subprocess.run(command, cwd=ROOT, env=older[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:]
    assert "2 passed" in result.stdout
