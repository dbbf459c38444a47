"""The search for the fastest kernel, with a made-up clock and GPU, and the table that `indexproj tune` keeps."""

import itertools
import math

import pytest

from indexproj.benchmarks import tune
from indexproj.benchmarks.tune import FINALISTS, FIRST_ROUNDS, LAST_ROUNDS, MS, Case, WrongError, candidates, search
from indexproj.indexer.models import PAIRS, SHAPES, fits
from indexproj.kernels import TARGETS, KernelConfig, Target, choose
from indexproj.kernels.formats import Format, parse_pair
from support import DEEPSEEK, GLM

DENSE, FP8, SM_90 = parse_pair("BF16, BF16"), parse_pair("FP8 128x128, BF16"), TARGETS["sm_90"]
GPU = "NVIDIA H100 80GB HBM3"
SPLIT, GEMV = KernelConfig("split_k", 16, 64, 6, slices=4), KernelConfig("gemv", 8, 128, slices=8)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    ("shape", "pair"),
    [
        pytest.param(shape, pair, marks=[] if set(parse_pair(pair)) == {Format.BF16} else pytest.mark.full)
        for shape, pair in itertools.product(SHAPES, PAIRS)
        if fits(shape, pair)
    ],
)
def test_candidates_start_with_default(name, shape, pair):
    *ns, k = shape = SHAPES[shape]
    everything = set()
    for m in MS:
        found = candidates(m, shape, parse_pair(pair), TARGETS[name])
        assert found[0] == choose(m, shape, parse_pair(pair), TARGETS[name])
        assert len(set(found)) == len(found) <= 40
        for config in found:
            steps = -(-k // (config.split_k * config.block_k * config.slices))
            assert (config.split_k - 1) * steps * config.block_k * config.slices < k  # no split without work
            assert math.prod(config.grid(m, *ns)) <= 4 * max(TARGETS[name].sm_count, m)
        everything |= set(found)
    assert {config.regime for config in everything} >= {"split_k", "prefill"}
    assert len(ns) == 3 or "gemv" in {config.regime for config in everything}
    assert len(everything) <= 120  # 16 cores compile all pairs in less than a minute


def test_candidates_fill_the_gpu_and_alternate_regimes():
    found = candidates(16, DEEPSEEK, FP8, SM_90)
    assert [config.regime for config in found[:7]] == ["split_k", "split_k", *["gemv", "split_k"] * 2, "gemv"]
    assert [config.regime for config in candidates(64, DEEPSEEK, FP8, SM_90)[2:4]] == ["split_k", "prefill"]
    programs = [math.prod(c.grid(m, 128, 64)) for m in MS for c in candidates(m, DEEPSEEK, FP8, SM_90)]
    assert 132 / 4 <= min(programs) < 132 / 3
    assert KernelConfig("split_k", 16, 64, 4, 2, 8, 32, 8) not in found  # 6 * 4 programs, a fifth of a wave


class Clock:
    """Seconds that pass while something is sampled."""

    def __init__(self):
        self.now, self.sampled = 1000.0, []

    def __call__(self):
        return self.now

    def sampler(self, microseconds, cost=0.1):
        def sample(choice):
            self.sampled.append(choice)
            self.now += cost
            found = microseconds[choice]
            found = next(found) if isinstance(found, itertools.cycle) else found
            if isinstance(found, Exception):
                raise found
            return found

        return sample


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(tune, "monotonic", clock)
    return clock


def find(clock, choices, times, always=1, seconds=1e9, cost=0.1):
    return search(list(choices), always, clock.sampler(times, cost), clock.now + seconds)


def test_search_measures_finalists_again_in_turn(clock):
    # "b" looks fastest at first, and "c" in the long run.
    times = {"a": 9.0, "b": itertools.cycle([1.0] * FIRST_ROUNDS + [5.0] * LAST_ROUNDS), "c": 3.0, "d": 4.0, "e": 8.0}
    found, tried = find(clock, times, times)
    assert list(found.items()) == [("c", 3.0), ("d", 4.0), ("b", 5.0), ("a", 9.0)]
    assert tried == list("abcde")
    assert clock.sampled[5 * FIRST_ROUNDS :] == ["a", "b", "c", "d"] * LAST_ROUNDS
    assert FINALISTS == 3


def test_search_takes_the_median_of_the_last_rounds(clock):
    times = {"a": 5.0, "b": itertools.cycle([3.0, 90.0, 3.0, 3.0])}
    assert find(clock, "ab", times)[0] == {"b": 3.0, "a": 5.0}
    times = {"a": itertools.cycle([1.0] * FIRST_ROUNDS + [4.0] * 4 + [5.0] * 5)}
    assert find(clock, "a", times)[0] == {"a": 5.0}


def test_search_tries_nothing_new_after_the_deadline(clock):
    times = dict.fromkeys("abcdefgh", 1.0)
    find(clock, times, times, seconds=4 * 0.5 * FIRST_ROUNDS - 0.1, cost=0.5)
    assert set(clock.sampled) == set("abcd")
    assert find(clock, times, times, seconds=-1) == ({"a": 1.0}, ["a"])


@pytest.mark.parametrize("always", [1, 3])
def test_search_drops_what_cannot_run(clock, always):
    times = {"a": 2.0, "b": RuntimeError("out of resources"), "c": 1.0}
    assert find(clock, "abc", times, always) == ({"c": 1.0, "a": 2.0}, ["a", "b", "c"])
    assert clock.sampled.count("b") == 1
    late = itertools.cycle([1.0] * FIRST_ROUNDS + [RuntimeError("out of memory")])
    assert find(clock, "ab", {"a": 2.0, "b": late}, always)[0] == {"a": 2.0}


def test_search_errors(clock):
    times = {"a": 2.0, "b": RuntimeError("out of resources"), "c": WrongError("c")}
    with pytest.raises(RuntimeError, match="b cannot be measured: out of resources"):
        find(clock, "bac", times)
    broken = itertools.cycle([2.0] * FIRST_ROUNDS + [RuntimeError("illegal memory access")])
    with pytest.raises(RuntimeError, match="a cannot be measured, after c failed: illegal"):
        find(clock, "abc", {"a": broken, "b": 1.0, "c": RuntimeError("d")})
    with pytest.raises(WrongError):
        find(clock, "abc", times)


def speed(choice):
    """Seven splits are fastest, and torch with a bf16 gate."""
    return {"fp32": 7.0, "bf16": 2.0}[choice] if isinstance(choice, str) else 3.0 + abs(choice.split_k - 7) / 100


@pytest.fixture
def tune_both(clock, monkeypatch):
    """Tunes BF16 and FP8 on an H100 that takes 10 ms per sample, with the given compiler."""

    class Speeds(dict):
        def __missing__(self, choice):
            return speed(choice)

    def run(seconds, compiler, known=None):
        monkeypatch.setattr(tune, "compile_all", compiler)
        return list(tune.tune([Case(m, GLM, formats) for formats in (DENSE, FP8) for m in MS], "cuda", seconds, known))

    monkeypatch.setattr(tune, "target_of", lambda device: SM_90)
    monkeypatch.setattr(tune, "_measurer", lambda case, device: clock.sampler(Speeds(), cost=0.01))
    return run


@pytest.mark.parametrize("seconds", [110, 5])
def test_tune_measures_every_case_in_time(clock, tune_both, seconds):
    limits = []

    def compiler(target, kernels, limit):
        limits.append(limit)
        clock.now += limit
        assert len(set(kernels)) == len(kernels)
        return kernels

    found = tune_both(seconds, compiler)
    entries = [entry for _, entry in found if entry]
    assert [(entry["formats"], entry["m"]) for entry in entries] == [
        ([str(format) for format in formats], m) for formats in (DENSE, FP8) for m in MS
    ]
    # Compiling has half of the time; the last rounds are not cut short.
    assert limits == [seconds / 2]
    assert clock.now - 1000 <= seconds + len(entries) * 0.01 * (FIRST_ROUNDS + LAST_ROUNDS * (3 + FINALISTS))
    steps = [done for done, _ in found[:-30]]
    assert steps == [f"compiled {n + 1} of {len(steps)}" for n in range(len(steps))]
    assert [done for done, _ in found[-30:]] == [f"measured {n + 1} of 30" for n in range(30)]
    for entry, (formats, m) in zip(entries, itertools.product((DENSE, FP8), MS), strict=True):
        known = candidates(m, GLM, formats, SM_90)
        assert entry["default_us"] == speed(known[0])
        assert entry["candidates"] == len(known)
        if seconds == 110:
            assert entry["tried"] == len(known)
            config = KernelConfig(**entry["config"])
            assert entry["us"] == min(map(speed, known)) == speed(config)
            assert entry["kernel"] == str(config)
            assert entry["torch_us"] == ({"fp32": 7.0, "bf16": 2.0} if formats == DENSE else {})
            assert entry["torch_for"] == (["bf16"] if formats == DENSE else [])
    tried = [entry["tried"] for entry in entries]
    assert min(tried) == (6 if seconds == 110 else 1)
    assert seconds == 110 or max(tried) <= 4  # a share of the time for each case


@pytest.mark.parametrize(("us", "expected"), [(3.25, []), (3.2, []), (3.18, ["bf16"])])
def test_torch_must_be_faster_by_two_percent(us, expected):
    assert tune._entry(Case(16, GLM, DENSE), {"bf16": us, SPLIT: 3.25}, SPLIT)["torch_for"] == expected


def test_tune_compiles_defaults_first_and_measures_what_compiled(tune_both):
    asked = []

    def compiler(target, kernels, limit):
        asked.extend(kernels)
        return kernels[:20]

    entries = [entry for _, entry in tune_both(110, compiler) if entry]
    cases = list(itertools.product((DENSE, FP8), MS))
    defaults = {(choose(m, GLM, formats, SM_90), GLM, formats) for formats, m in cases}
    assert set(asked[: len(defaults)]) == defaults
    for entry, (formats, m) in zip(entries, cases, strict=True):
        _, *others = candidates(m, GLM, formats, SM_90)
        assert entry["tried"] == 1 + sum((config, GLM, formats) in asked[:20] for config in others)


def test_known_configs_are_tried_first(clock, tune_both):
    """Those of a table of another Triton: also in little time, and if `candidates` has them not."""
    case, other = Case(16, GLM, FP8), Case(16, DEEPSEEK, FP8)
    config = KernelConfig("split_k", 16, 64, split_k=7, slices=4, num_warps=2)
    assert config not in candidates(*case, SM_90)
    found = tune_both(20, lambda target, kernels, limit: kernels, {case: config, other: SPLIT})
    (entry,) = [each for _, each in found if each and (each["m"], each["formats"][0]) == (16, "FP8 128x128")]
    assert KernelConfig(**entry["config"]) == config
    assert SPLIT not in clock.sampled


@pytest.mark.parametrize("arch", [86, 89, 103, 121, "gfx90a"])
def test_candidates_for_gpus_without_an_estimate_of_their_own(arch):
    target = Target("hip" if isinstance(arch, str) else "cuda", arch, sm_count=100)
    for m in (1, 64, 4096):
        assert choose(m, GLM, DENSE, target) in tune.candidates(m, GLM, DENSE, target)
