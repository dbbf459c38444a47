"""`indexproj compile` with the real compiler."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton

from indexproj.benchmarks.compiled import configs
from indexproj.indexer.models import SHAPES, fits
from indexproj.kernels import TARGETS, launch, project
from indexproj.kernels.formats import parse_pair
from indexproj.kernels.target import INTERPRETED
from stub import stub_driver
from support import GLM, invoke, weights

pytestmark = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1 disables compilation")
FP8 = "FP8 128x128, BF16"


def compiled(*options):
    return invoke("compile", *options, code=0).stdout


def test_compile_table_and_json():
    rows = json.loads(compiled("--target", "sm_90", "--pair", FP8, "--json"))
    signatures = {shape: launch.Signature.of(SHAPES[shape], parse_pair(FP8)) for shape in SHAPES if fits(shape, FP8)}
    expected = [(shape, *each) for shape, sig in signatures.items() for each in configs(TARGETS["sm_90"], sig).items()]
    assert [(row["shape"], row["kernel"], row["m"]) for row in rows] == [(a, str(b), c) for a, b, c in expected]
    for row in rows:
        assert (row["target"], row["pair"], row["activation"], row["faults"]) == ("sm_90", FP8, None, [])
        assert row["loads"]["16"] > 0
    glm = {row["kernel"]: row for row in rows if row["shape"] == "glm-5"}
    weights_bytes = 128 * 6144 + 4 * 48 + 2 * 32 * 6144
    assert glm["gemv 4x2048"]["bytes"] == weights_bytes + 160 * 2 * 4 * 6144
    assert glm["prefill 128xNx64"]["bytes"] == 512 * weights_bytes + 2 * 65536 * 6144
    lines = compiled("--target", "sm_90", "--pair", FP8, "--shape", "glm-5").splitlines()
    cells = [line.split()[-9:-6] for line in lines if line.strip().endswith(" ok")]
    assert cells == [[str(row[key]) for key in ("m", "registers", "shared_memory")] for row in glm.values()]
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("options", "sm_count", "asked_for"),
    [
        ("", 132, {}),
        ("--sm-count 78", 78, {}),
        ("--batch-invariant", 132, {"batch_invariant": True}),
        ("--activation fp8", 132, {"activation": "fp8"}),
        pytest.param("--activation fp8_ue8m0", 132, {"activation": "fp8_ue8m0"}, marks=pytest.mark.full),
    ],
)
def test_server_compiles_nothing_that_the_cache_holds(options, sm_count, asked_for, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # restored after the command has set it
    target = replace(TARGETS["sm_90"], sm_count=sm_count)
    line = 'indexproj compile --target sm_90 --shape glm-5 --pair "FP8 128x128, BF16" --cache cache\n'
    assert line in (Path(__file__).parents[2] / "docs/benchmarks.md").read_text()
    assert f"TRITON_CACHE_DIR={tmp_path / 'cache'}," in compiled(*shlex.split(line + options)[2:])
    hits = []
    w, x = weights(FP8, GLM), torch.empty(65536, GLM[2], dtype=torch.bfloat16)  # memory that nobody touches
    out = torch.empty(65536, 128 + 32, dtype=torch.bfloat16)
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **seen: hits.append(seen["cache_hit"]))
    with stub_driver(tmp_path / "cache", target):
        for kernel in launch.KERNELS.values():
            kernel.device_caches.clear()  # what other tests have compiled
        for m in [2**power for power in range(17)]:
            project(x[:m], w, **asked_for)
            project(x[:m], w, out=out[:m], **asked_for)
    invariant = "batch_invariant" in asked_for
    sig = launch.Signature.of(GLM, parse_pair(FP8), asked_for.get("activation"), batch_invariant=invariant)
    assert hits == [True] * 2 * len(configs(target, sig))


@pytest.mark.parametrize("activation", ["", "--activation fp8"])
@pytest.mark.parametrize("target", ["sm_90 --sm-count 78", "gfx942 --sm-count 80 --batch-invariant"])
def test_compile_for_fewer_sms(target, activation):
    """A second wave of programs is not a fault there."""
    compiled("--target", *f"{target} {activation}".split(), "--shape", "deepseek-v3.2", "--pair", FP8)
