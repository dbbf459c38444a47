"""`indexproj tune`: its candidates, the search for the fastest with a made-up clock, and the table that it keeps."""

import functools
import itertools
import json
import math
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import fake_gpu
from indexproj.benchmarks import commands, gpu, tune
from indexproj.benchmarks.tune import FINALISTS, FIRST_ROUNDS, LAST_ROUNDS, MS, WrongError, candidates, search
from indexproj.indexer.models import PAIRS, SHAPES, fits
from indexproj.kernels import TARGETS, KernelConfig, Target, choose, dispatch, launch
from indexproj.kernels.dispatch import OUTS, out_dtypes, read_table
from indexproj.kernels.formats import parse_pair
from support import DEEPSEEK, GLM, invoke

DENSE, FP8, THREE = map(parse_pair, ("BF16, BF16", "FP8 128x128, BF16", "BF16, BF16, BF16"))
SM_90, GPU = TARGETS["sm_90"], "NVIDIA H100 80GB HBM3"
SPLIT = KernelConfig("split_k", 16, 64, 7, slices=4, num_warps=2)


# Also GPUs without an estimate of their own.
OTHERS = [Target("cuda", 86, 84), Target("cuda", 103, 160), Target("cuda", 121, 48), Target("hip", "gfx90a", 104)]


@pytest.mark.parametrize("target", [*TARGETS.values(), *OTHERS], ids=lambda target: target.name)
@pytest.mark.parametrize("pair", [pytest.param(pair, marks=[pytest.mark.full] * ("FP" in pair)) for pair in PAIRS])
def test_candidates_start_with_default(target, pair):
    formats = parse_pair(pair)
    for *ns, k in (SHAPES[name] for name in SHAPES if fits(name, pair)):
        found = {m: candidates(m, (*ns, k), formats, target) for m in MS}
        for m, configs in found.items():
            assert configs[0] == choose(m, (*ns, k), formats, target)
            assert 2 < len(set(configs)) == len(configs) <= 40
            for config in configs:
                steps = -(-k // (config.split_k * config.block_k * config.slices))
                assert (config.split_k - 1) * steps * config.block_k * config.slices < k  # no split without work
                assert math.prod(config.grid(m, *ns)) <= 4 * max(target.sm_count, m)
        everything = {config for configs in found.values() for config in configs}
        regimes = {config.regime for config in everything}
        # Three matrices have too many rows for gemv, and on few SMs for split_k.
        assert regimes == {"gemv", "split_k", "prefill"} if len(ns) == 2 else regimes - {"split_k"} == {"prefill"}
        assert len(everything) <= 120  # 16 cores compile all pairs in less than a minute


def test_candidates_fill_the_gpu_and_alternate_regimes():
    found = candidates(16, DEEPSEEK, FP8, SM_90)
    assert [config.regime for config in found[:7]] == ["split_k", "split_k", *["gemv", "split_k"] * 2, "gemv"]
    assert [config.regime for config in candidates(64, DEEPSEEK, FP8, SM_90)[2:4]] == ["split_k", "prefill"]
    programs = [math.prod(c.grid(m, 128, 64)) for m in MS for c in candidates(m, DEEPSEEK, FP8, SM_90)]
    assert 132 / 4 <= min(programs) < 132 / 3


@pytest.fixture
def clock(monkeypatch):
    """Its seconds pass while `timer` prepares a choice."""
    clock = SimpleNamespace(now=1000.0, timed=[])

    def timer(microseconds, cost, choice):
        clock.now += cost
        found = microseconds(choice)
        if isinstance(found, Exception):
            raise found
        return lambda: clock.timed.append(choice) or (found if isinstance(found, float) else next(found))

    clock.timer = timer
    monkeypatch.setattr(tune, "monotonic", lambda: clock.now)
    return clock


def find(clock, choices, times, always=1, seconds=1e9):
    timer = functools.partial(clock.timer, times.get, 1.0)
    return search((1, GLM, DENSE), [*choices], always, timer, clock.now + seconds)


def test_search_measures_finalists_again_in_turn(clock):
    # "b" looks fastest at first, and "c" in the long run, without a round that does not count; "d" has slow rounds.
    b, d = [*[1.0] * (FIRST_ROUNDS + 1), 0.5, *[1.0] * 4, *[5.0] * (LAST_ROUNDS - 4)], [4.0, 90.0, 4.0, 4.0]
    times = {"a": 9.0, "b": itertools.cycle(b), "c": 3.0, "d": itertools.cycle(d), "e": 8.0}
    found, tried = find(clock, times, times)
    assert list(found.items()) == [("c", 3.0), ("d", 4.0), ("b", 5.0), ("a", 9.0)]
    assert (tried, FINALISTS) == (5, 3)
    assert clock.timed == [*"abcde"] * (FIRST_ROUNDS + 1) + [*"abcd"] * (LAST_ROUNDS + 1)


def test_search_tries_nothing_new_after_the_deadline(clock):
    times = dict.fromkeys("abcdefgh", 1.0)
    assert find(clock, times, times, seconds=3.9) == (dict.fromkeys("abcd", 1.0), 4)
    assert find(clock, times, times, always=2, seconds=-1) == ({"a": 1.0, "b": 1.0}, 2)


@pytest.mark.parametrize("always", [1, 3])
def test_search_drops_what_cannot_run(clock, always):
    times = {"a": 2.0, "b": RuntimeError("out of resources"), "c": 1.0, "bf16": WrongError("off by nan")}
    assert find(clock, times, times, always) == ({"c": 1.0, "a": 2.0}, 4)
    with pytest.raises(RuntimeError, match=r"M = 1, \(128, 32, 6144\), BF16, BF16: b: out of resources"):
        find(clock, "bac", times)
    with pytest.raises(WrongError, match="BF16, BF16: split_k 16x16x256, K/7: off by"):
        find(clock, ("a", SPLIT), times | {SPLIT: WrongError("off by 1.0e-05 of the largest output")})


def speed(choice):
    """Seven splits are fastest, and torch with a bf16 gate."""
    return {"fp32": 7.0, "bf16": 2.0}[choice] if isinstance(choice, str) else 3.0 + abs(choice.split_k - 7) / 100


def test_tune_measures_every_case_in_time(clock, monkeypatch):
    """On an H100 that compiles 60 kernels in time and takes 20 ms to prepare one. A known config is tried first."""
    asked, cases = [], [(m, GLM, formats) for formats in (DENSE, FP8) for m in MS]

    def compile_all(target, kernels, seconds):
        assert seconds == 2.5
        clock.now += seconds
        asked.extend(kernels)
        return kernels[:60]

    monkeypatch.setattr(tune, "compile_all", compile_all)
    monkeypatch.setattr(tune, "target_of", lambda device: SM_90)
    monkeypatch.setattr(tune, "Sampler", lambda *_: mock.Mock(timer=functools.partial(clock.timer, speed, 0.02)))
    found = list(tune.tune(cases, "cuda", 5, {cases[-3]: SPLIT, (16, DEEPSEEK, FP8): SPLIT}))
    assert clock.now - 1000 <= 5 + 0.06
    steps = [f"compiled {n + 1} of {len(asked)}" for n in range(60)] + [f"measured {n + 1} of 30" for n in range(30)]
    assert [done for done, _ in found] == steps
    defaults = {(choose(*case, SM_90), *case[1:]) for case in cases}
    assert set(asked[: len(defaults)]) == defaults
    assert len(set(asked)) == len(asked)
    assert {choice for choice in clock.timed if choice not in OUTS} <= {config for config, *_ in asked[:60]}
    entries = [entry for _, entry in found if entry]
    assert [tune.case_of(entry) for entry in entries] == cases
    for case, entry in zip(cases, entries, strict=True):
        default, *others = candidates(*case, SM_90)
        others += [SPLIT] * (case == cases[-3])
        assert (entry["default_us"], entry["candidates"]) == (speed(default), 1 + len(others))
        assert 1 <= entry["tried"] <= 5  # a share of the time for each case
        assert entry["torch_us"] == ({"fp32": 7.0, "bf16": 2.0} if case[2] == DENSE else {})
    assert KernelConfig(**entries[-3]["config"]) == SPLIT


@pytest.mark.parametrize(("us", "expected"), [(3.25, []), (3.2, []), (3.18, ["bf16"])])
def test_torch_must_be_faster_by_two_percent(us, expected):
    assert tune.entry_of((16, GLM, DENSE), {"bf16": us, SPLIT: 3.25}, SPLIT)["torch_for"] == expected


@pytest.fixture
def h100(monkeypatch, tmp_path, mm_to_fp32):
    """A made-up H100: everything but the compiler, the kernels and the clock is real. Returns the cases asked for."""
    fake_gpu.install(monkeypatch.setattr)
    monkeypatch.setattr(gpu, "description", lambda: {"GPU": GPU})
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(commands, "SHAPES", fake_gpu.SHAPES)
    monkeypatch.setattr(tune, "MS", (1, 16))
    monkeypatch.setattr(tune, "target_of", lambda _: SM_90)
    monkeypatch.setattr(tune, "compile_all", lambda target, kernels, seconds: kernels)
    asked, measure = [], tune.tune
    monkeypatch.setattr(tune, "tune", lambda *arguments: asked.append(arguments) or measure(*arguments))
    return asked


run = functools.partial(invoke, "tune", code=0)


def entries_of(path):
    return json.loads(path.read_text())["entries"]


PAIR = ("--shape", "glm-5", "--pair", "BF16, BF16")
SMALL, V4 = fake_gpu.SHAPES["glm-5"], fake_gpu.SHAPES["deepseek-v4-pro"]


def test_tune_writes_what_launches_read(h100, monkeypatch, tmp_path):
    """Also for three matrices."""
    path = tmp_path / "indexproj/nvidia-h100-80gb-hbm3.json"
    pairs = "--pair", "FP8 128x128, BF16", "--pair", "BF16, BF16, BF16"
    result = run(*PAIR, "--shape", "deepseek-v4-pro", *pairs, "--seconds", 50)
    assert f"Kept in {path}." in result.stdout
    cases = [(m, *each) for each in ((SMALL, DENSE), (SMALL, FP8), (V4, THREE)) for m in (1, 16)]
    assert h100 == [(cases, torch.device("cpu"), 50, {})]
    assert list(read_table(path, GPU)) == cases
    for entry in entries_of(path):
        assert entry["tried"] == entry["candidates"] > 1
        assert len(entry["torch_us"]) == (2 if entry["formats"] == ["BF16", "BF16"] else 0)
        assert f"{tune.summary(entry)}\n" in result.stdout
    table = dict.fromkeys(cases, (SPLIT, [out_dtypes("fp32", 3)]))
    monkeypatch.setattr(launch, "table_of", lambda device: table)
    monkeypatch.setattr(launch, "target_of", lambda device: SM_90)
    plan = launch.plan_of(launch.Signature.of(V4, THREE), 16)
    assert (plan.config, plan.prefers_torch) == (SPLIT, True)


def test_tune_tries_known_configs_and_keeps_entries_of_these_versions(h100, tmp_path):
    path = tmp_path / "table.json"
    run(*PAIR, "--pair", "FP8 128x128, BF16", "--output", path)
    old = entries_of(path)
    known = {tune.case_of(entry): KernelConfig(**entry["config"]) for entry in old}
    unknown = old[0] | {"m": 2, "config": old[0]["config"] | {"clusters": 2}}, old[0] | {"formats": ["INT4", "BF16"]}
    table = json.loads(path.read_text()) | {"versions": {"triton": "3.0"}, "entries": [*unknown, *old]}
    path.write_text(json.dumps(table))
    assert run(*PAIR, "--output", path).stderr.count("is of other versions: tries its configs first") == 1
    assert h100[1][3] == known
    assert [tune.case_of(entry) for entry in entries_of(path)] == [(m, SMALL, DENSE) for m in (1, 16)]
    run("--shape", "glm-5", "--pair", "FP8 128x128, BF16", "--output", path)
    assert len(h100[2][3]) == 2
    assert read_table(path, GPU).keys() == known.keys()


def test_failed_write_leaves_the_old_table(h100, tmp_path):
    path = tmp_path / "table.json"
    run(*PAIR, "--output", path)
    before = path.read_bytes()
    (tmp_path / f"table.json.{os.getpid()}").symlink_to("/dev/full")
    assert run(*PAIR, "--output", path, code=2).stderr == "tune: [Errno 28] No space left on device\n"
    assert path.read_bytes() == before


TABLES = {"schema": 0}, {"gpu": "H200"}, {"entries": 3}, {"entries": [{"m": 16}]}


@pytest.mark.parametrize("change", ["", "[]", "null", "\ud800", "[" * 100_000, *TABLES])
def test_tune_does_not_replace_another_file(h100, tmp_path, change):
    path = tmp_path / "table.json"
    table = {"schema": dispatch.TABLE_SCHEMA, "gpu": GPU, "versions": dispatch.versions(), "entries": []}
    text = json.dumps(table | change) if isinstance(change, dict) else change
    path.write_bytes(before := text.encode("utf-8", "surrogatepass"))
    assert f"tune: {path} cannot be extended; move it away" in run(*PAIR, "--output", path, code=2).stderr
    assert "tune: [Errno" in run("--output", path / "table.json", code=2).stderr
    assert (path.read_bytes(), h100) == (before, [])


def test_wrong_kernel_ends_tune_and_keeps_what_was_measured(h100, monkeypatch, tmp_path):
    def launch(x, *arguments, **named):
        if len(x) == 1:  # others are left as they are
            fake_gpu.launch(x, *arguments, **named)

    monkeypatch.setattr(gpu, "launch", launch)
    path = tmp_path / "table.json"
    assert (
        "M = 16, (128, 32, 256), BF16, BF16: split_k 16x16x512: off by nan"
        in run(*PAIR, "--output", path, code=1).stderr
    )
    assert len(entries_of(path)) == 1
