"""The kernels compile with the Triton of every torch from 2.11 on, not only with the newest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from indexproj.kernels.gates import PAIRS
from indexproj.kernels.target import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0"])
def test_one_config_of_each_regime_and_pair(version, tmp_path):
    folder = ROOT / f"build/triton-{version}"
    if not (folder / "triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", folder, f"triton=={version}"]
        subprocess.run(pip, check=True)
    environment = {**os.environ, "PYTHONPATH": str(folder), "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("older.py")
    result = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout) == {"version": version, "count": 2 * 3 * len(PAIRS), "faults": []}
