"""`indexproj compile`, as a user runs it."""

import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from indexproj.benchmarks.gates import COMPILED, PAIRS, configs
from indexproj.benchmarks.stub import stub_driver
from indexproj.kernels import TARGETS, launch, project
from indexproj.kernels.target import INTERPRETED
from support import DEEPSEEK, GLM, weights

pytestmark = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under TRITON_INTERPRET=1")
PAIR = "FP8 128x128, BF16"
COMMAND = [Path(sys.executable).with_name("indexproj"), "compile"]


def test_report():
    table, data = (
        subprocess.run(
            [*COMMAND, "--target", "sm_90", "--pair", PAIR, *options], capture_output=True, text=True, timeout=600
        )
        for options in ((), ("--json",))
    )
    assert (table.returncode, data.returncode) == (0, 0), table.stderr + data.stderr
    rows = [row for row in json.loads(data.stdout) if row["pair"] == PAIR]
    expected = [(shape, str(config), m) for shape, sizes in (("deepseek-v3.2", DEEPSEEK), ("glm-5", GLM))
                for config, m in configs(TARGETS["sm_90"], sizes, PAIRS[PAIR]).items()]  # fmt: skip
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


@pytest.mark.parametrize(
    ("options", "pair", "sm_count", "asked_for"),
    [
        ("", PAIR, 132, {}),
        ("--sm-count 78", PAIR, 78, {}),
        ("--batch-invariant", PAIR, 132, {"batch_invariant": True}),
        ("", "W8A8, BF16", 132, {"activation": "fp8"}),
        ("", "W8A8 ue8m0, BF16", 132, {"activation": "fp8_ue8m0"}),
    ],
)
def test_a_server_compiles_nothing_that_the_cache_holds(options, pair, sm_count, asked_for, tmp_path, monkeypatch):
    """Up to the driver, which does nothing, the launches are those of a server on an H100 or H20."""
    target = dataclasses.replace(TARGETS["sm_90"], sm_count=sm_count)
    line = 'indexproj compile --target sm_90 --shape glm-5 --pair "FP8 128x128, BF16" --cache cache\n'
    assert line in (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()
    command = [*COMMAND, *shlex.split(line.replace(PAIR, pair) + options)[2:]]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    assert f"TRITON_CACHE_DIR={tmp_path / 'cache'}" in result.stdout
    asked = []
    w, x = weights("fp8-dense", GLM), torch.empty(65536, GLM[2], dtype=torch.bfloat16)  # memory that nobody touches
    out = torch.empty(65536, 128 + 32, dtype=torch.bfloat16)
    monkeypatch.setattr(launch, "_ready", {})
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **seen: asked.append(seen["cache_hit"]))
    with stub_driver(tmp_path / "cache", target):
        for kernel in launch.KERNELS.values():
            kernel.device_caches.clear()  # what other tests have compiled
        for m in [2**power for power in range(17)]:
            project(x[:m], w, **asked_for)
            project(x[:m], w, out=out[:m], **asked_for)
    is_invariant = "batch_invariant" in asked_for
    assert asked == [True] * 2 * len(configs(target, GLM, COMPILED[pair], batch_invariant=is_invariant))


@pytest.mark.parametrize("options", ["--target sm_90 --sm-count 78", "--target gfx942 --sm-count 80 --batch-invariant"])
def test_fewer_sms_are_fine_for_deepseek(options):
    """Where a launch then comes in a second wave, that is no fault."""
    command = [*COMMAND, *options.split(), "--shape", "deepseek-v3.2", "--pair", PAIR, "--pair", "W8A8, BF16"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
