"""`indexproj compile`, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from indexproj.kernels.gates import configs
from indexproj.kernels.target import INTERPRETED
from support import DEEPSEEK, GLM

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")
PAIR = "FP8 128x128, BF16"


def test_report():
    command = [Path(sys.executable).with_name("indexproj"), "compile", "--target", "sm_90", "--pair", PAIR]
    table, data = (
        subprocess.run([*command, *options], capture_output=True, text=True, timeout=600)
        for options in ((), ("--json",))
    )
    assert (table.returncode, data.returncode) == (0, 0), table.stderr + data.stderr
    rows = [row for row in json.loads(data.stdout) if row["pair"] == PAIR]
    expected = [(shape, str(config), m) for shape, sizes in (("deepseek-v3.2", DEEPSEEK), ("glm-5", GLM))
                for config, m in configs("sm_90", sizes).items()]  # fmt: skip
    assert [(row["shape"], row["kernel"], row["m"]) for row in rows] == expected
    for row in rows:
        assert (row["target"], row["faults"]) == ("sm_90", [])
        assert row["registers"] <= 255
        assert row["loads"]["16"] > 0
        if row["weight_reads"] == 1 and row["shape"] == "glm-5":
            weights = 128 * 6144 + 4 * 48 + 2 * 32 * 6144
            assert row["bytes_per_program"] == (weights + 2 * row["m"] * 6144 * row["x_reads"]) // row["programs"]
        cells = [
            cell.strip() for line in table.stdout.splitlines() if row["kernel"] in line for cell in line.split("│")
        ]
        assert {str(row["registers"]), str(row["shared_memory"]), "ok"} <= set(cells)
