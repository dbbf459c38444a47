"""The kernels compile, and launch on a stub, with the Triton version of every torch since 2.11."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from indexproj.kernels.target import INTERPRETED

ROOT = Path(__file__).parents[2]
# Launches call the runner of a compiled kernel, which is not public and may change.
TESTS = ["tests/compile_only/test_gates.py", "tests/kernels/test_launch.py", "-k", "with_a_factor or direct_launch"]


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 disables compilation")
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.8.0"])
def test_older_triton_compiles_and_launches(version, tmp_path):
    folder = ROOT / f"build/triton-{version}"
    if not (folder / "triton").exists():
        pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", folder]
        subprocess.run([*pip, f"triton=={version}"], check=True)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path)}
    script = f"import pytest, triton; assert triton.__version__ == {version!r}; pytest.main({['-q', *TESTS]})"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert "\n12 passed" in result.stdout, result.stdout[-2000:] + result.stderr[-2000:]
