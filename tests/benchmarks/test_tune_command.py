"""`indexproj tune`: the table that it writes, and its errors."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

import fake_gpu
from indexproj.__main__ import app
from indexproj.benchmarks import commands, gpu, tune
from indexproj.benchmarks.compiled import signature
from indexproj.benchmarks.tune import Case, WrongError
from indexproj.kernels import TARGETS, KernelConfig, choose, dispatch, launch
from indexproj.kernels.dispatch import out_dtypes, read_table
from indexproj.kernels.formats import parse_pair
from support import DEEPSEEK, GLM

DENSE, FP8, SM_90 = parse_pair("BF16, BF16"), parse_pair("FP8 128x128, BF16"), TARGETS["sm_90"]
THREE, SPLIT = parse_pair("BF16, BF16, BF16"), KernelConfig("split_k", 16, 64, 5)
GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def h100(monkeypatch, tmp_path):
    """A GPU that measures nothing, for the command; the cases and seconds that it was asked for."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    monkeypatch.setattr(gpu, "current_gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "MS", (1, 16))
    asked = []

    def measure(cases, device, seconds, known):
        asked.append((cases, device, seconds, known))
        yield "compiled 1 of 2", None
        for number, case in enumerate(cases, 1):
            config = choose(*case, SM_90)
            medians = {config: float(len(asked)), **({"bf16": 0.5} if case.formats == DENSE else {})}
            entry = tune._entry(case, medians, config) | {"tried": 1, "candidates": 9}
            yield f"measured {number} of {len(cases)}", entry

    monkeypatch.setattr(tune, "tune", measure)
    return asked


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def entries_of(path):
    return json.loads(path.read_text())["entries"]


PAIR = ("--shape", "glm-5", "--pair", "BF16, BF16")


def test_tune_writes_what_dispatch_reads(h100, tmp_path):
    path = tmp_path / "indexproj/nvidia-h100-80gb-hbm3.json"
    result = run(*PAIR, "--pair", "FP8 128x128, BF16")
    assert f"Kept in {path}." in result.stdout
    cases = [Case(m, GLM, formats) for formats in (DENSE, FP8) for m in (1, 16)]
    assert h100 == [(cases, torch.device("cuda", 0), 110, {})]
    for text in ("glm-5, BF16, BF16; us", "gemv 1x2048", " 0.50* ", "dispatches to torch.mm"):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 100
    assert read_table(path, GPU) == {
        case: (choose(*case, SM_90), (out_dtypes("bf16", 2),) if case.formats == DENSE else ()) for case in cases
    }
    assert len(path.read_text().splitlines()) == 6  # one entry per line


def test_tune_end_to_end_on_a_made_up_gpu(monkeypatch, tmp_path, mm_to_fp32):
    """Everything but the compiler, the graphs and the clock."""
    fake_gpu.install(monkeypatch.setattr)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: GPU)
    shapes = {"glm-5": (128, 32, 256), "deepseek-v4-pro": (256, 64, 128, 512)}
    monkeypatch.setattr(commands, "SHAPES", shapes)
    monkeypatch.setattr(tune, "MS", (1, 16))
    monkeypatch.setattr(tune, "target_of", lambda _: SM_90)
    monkeypatch.setattr(tune, "compile_all", lambda target, kernels, seconds: kernels)
    path, v4 = tmp_path / "table.json", ("--shape", "deepseek-v4-pro", "--pair", "BF16, BF16, BF16")
    run(*PAIR, *v4, "--pair", "FP8 128x128, BF16", "--output", path)
    table = read_table(path, GPU)
    problems = [("glm-5", DENSE), ("glm-5", FP8), ("deepseek-v4-pro", THREE)]
    assert list(table) == [(m, shapes[name], formats) for name, formats in problems for m in (1, 16)]
    for entry in entries_of(path):
        assert entry["tried"] == entry["candidates"] > 1
        assert len(entry["torch_us"]) == (2 if set(entry["formats"]) == {"BF16"} else 0)
    # What a launch looks up.
    monkeypatch.setattr(launch, "table_of", lambda device: dict.fromkeys(table, (SPLIT, [out_dtypes("fp32", 3)])))
    monkeypatch.setattr(launch, "target_of", lambda device: SM_90)
    plan = launch.plan_of(signature(shapes["deepseek-v4-pro"], THREE), 16)
    assert (plan.config, plan.prefers_torch) == (SPLIT, True)


def test_tune_keeps_other_entries(h100, tmp_path):
    path = tmp_path / "table.json"
    run(*PAIR, "--pair", "FP8 128x128, BF16", "--output", path)
    run("--shape", "glm-5", "--shape", "deepseek-v3.2", "--pair", "FP8 128x128, BF16", "--seconds", 7, "--output", path)
    assert [seconds for _, _, seconds, _ in h100[1:]] == [7, 7]
    assert [(tuple(entry["shape"]), entry["us"]) for entry in entries_of(path)] == [
        (GLM, 1.0), (GLM, 1.0), (GLM, 2.0), (GLM, 2.0), (DEEPSEEK, 3.0), (DEEPSEEK, 3.0),
    ]  # fmt: skip


def test_merged_keeps_entries_with_more_tried():
    def entry(us, tried, m=16):
        return {"m": m, "shape": [*GLM], "formats": ["BF16", "BF16"], "us": us, "tried": tried}

    old = [entry(1.0, 5)]
    assert tune.merged(old, [entry(2.0, 4)]) == old
    assert tune.merged(old, [entry(2.0, 5)]) == [entry(2.0, 5)]
    assert tune.merged(old, [entry(2.0, 4, m=8)]) == [*old, entry(2.0, 4, m=8)]


@pytest.mark.parametrize(
    "change",
    [
        "", "{", "[]", "3", "null", "\ud800", "[" * 100_000, {"schema": 0}, {"gpu": "NVIDIA H200"},
        {"entries": None}, {"entries": [3]}, {"entries": [{"m": 16}]},
    ],
)  # fmt: skip
def test_tune_starts_anew_with_a_warning(h100, tmp_path, change):
    path = tmp_path / "table.json"
    run(*PAIR, "--output", path)
    text = json.dumps(json.loads(path.read_text()) | change) if isinstance(change, dict) else change
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    result = run(*PAIR, "--output", path)
    assert f"tune: starting a new table: {path} cannot be extended" in result.stderr
    assert [entry["us"] for entry in entries_of(path)] == [2.0, 2.0]


def test_configs_of_other_versions_are_tried_first(h100, tmp_path):
    path = tmp_path / "table.json"
    run(*PAIR, "--output", path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"versions": {"triton": "3.0"}}))
    result = run(*PAIR, "--output", path)
    assert result.stderr.count("measured with other versions; its configs are tried first") == 1
    *_, known = h100[1]
    assert known == {case: choose(*case, SM_90) for case in (Case(m, GLM, DENSE) for m in (1, 16))}
    assert [entry["us"] for entry in entries_of(path)] == [2.0, 2.0]  # nothing that was measured then is kept


def test_tune_refuses_a_bad_path_before_measuring(h100, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    assert "tune: " in run("--output", tmp_path / "file/table.json", code=2).stderr

    def no_home(gpu):
        raise RuntimeError("no home directory")

    monkeypatch.setattr(dispatch, "table_path", no_home)
    assert "tune: no home directory" in run(code=2).stderr
    assert h100 == []


@pytest.mark.parametrize(
    ("error", "code"),
    [(WrongError("prefill is off"), 1), (RuntimeError("no kernel image"), 2), (KeyboardInterrupt(), 2)],
)
@pytest.mark.parametrize("count", [0, 3])
def test_tune_errors_keep_what_was_measured(h100, monkeypatch, tmp_path, error, code, count):
    measure = tune.tune

    def fail(*arguments):
        yield from itertools.islice(measure(*arguments), 1 + count)
        raise error

    monkeypatch.setattr(tune, "tune", fail)
    path = tmp_path / "table.json"
    message = run("--shape", "glm-5", "--output", path, code=code).stderr
    assert f"tune: {error}" in message or f"tune: {error}interrupted" in message
    assert (len(entries_of(path)) if count else path.exists()) == count


def test_tune_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "tune: needs a GPU, but there is none" in run(code=2).stderr
    assert "--pair must be one of" in run("--pair", "FP8", code=2).stderr
