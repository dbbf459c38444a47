"""The search for the fastest kernel, with a clock and a GPU that are made up."""

import contextlib
import itertools
import math
import os
from dataclasses import replace
from unittest import mock

import pytest
import torch
from typer.testing import CliRunner

from indexproj.__main__ import app
from indexproj.benchmarks import timing, tune
from indexproj.benchmarks.gates import PAIRS, SHAPES
from indexproj.benchmarks.tune import FINALISTS, FIRST_ROUNDS, LAST_ROUNDS, MS, Task, WrongError, search
from indexproj.kernels import TARGETS, KernelConfig, choose, reference, target, tuned, workspace
from indexproj.kernels.dispatch import candidates
from indexproj.kernels.matrix import Kind
from indexproj.kernels.tuned import OUTS, Case, Entry, Table
from support import DEEPSEEK, GLM

DENSE, FP8 = Task(GLM, (Kind.BF16, Kind.BF16)), Task(GLM, (Kind.FP8_BLOCK, Kind.BF16))
GPU = "NVIDIA H100 80GB HBM3"


class Clock:
    """Seconds that pass while something is measured."""

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


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("pair", PAIRS)
def test_candidates_begin_with_what_dispatch_reckons(name, shape, pair):
    *ns, k = shape
    everything = set()
    for m in MS:
        found = candidates(m, shape, PAIRS[pair], TARGETS[name])
        assert found[0] == choose(m, shape, PAIRS[pair], TARGETS[name])
        assert len(set(found)) == len(found) <= 40
        for config in found:
            steps = -(-k // (config.split_k * config.block_k * config.slices))
            assert (config.split_k - 1) * steps * config.block_k * config.slices < k  # no split without work
            assert math.prod(config.grid(m, *ns)) <= 4 * max(TARGETS[name].sm_count, m)
        everything |= set(found)
    assert {config.regime for config in everything} == {"gemv", "split_k", "tiled"}
    assert len(everything) <= 80  # all pairs are compiled by 16 cores in less than a minute


def test_candidates_are_those_that_fill_the_gpu_of_each_regime_in_turn():
    target = TARGETS["sm_90"]
    found = candidates(16, DEEPSEEK, FP8.kinds, target)
    assert [config.regime for config in found[:7]] == ["split_k", *["gemv", "split_k"] * 3]
    assert [config.regime for config in candidates(64, DEEPSEEK, FP8.kinds, target)[1:3]] == ["split_k", "tiled"]
    programs = [math.prod(c.grid(m, 128, 64)) for m in MS for c in candidates(m, DEEPSEEK, FP8.kinds, target)]
    assert 132 / 4 <= min(programs) < 132 / 3
    quarter = KernelConfig("split_k", 16, 64, 4, 2, 8, 32, 8)  # 6 * 4 programs, and so a fifth of a wave
    assert quarter not in found


def test_the_fastest_is_found_and_those_that_are_close_are_measured_again():
    clock = Clock()
    # "b" looks fastest at first, and "c" in the long run.
    times = {"a": 9.0, "b": itertools.cycle([1.0] * FIRST_ROUNDS + [5.0] * LAST_ROUNDS), "c": 3.0, "d": 4.0, "e": 8.0}
    found, tried = search(list(times), 1, clock.sampler(times), clock.now + 1e9, clock)
    assert list(found.items()) == [("c", 3.0), ("d", 4.0), ("b", 5.0), ("a", 9.0)]
    assert tried == list("abcde")
    again = clock.sampled[len(times) * FIRST_ROUNDS :]
    assert again == ["a", "b", "c", "d"] * LAST_ROUNDS  # in turn
    assert FINALISTS == 3


def test_one_slow_round_does_not_decide():
    clock = Clock()
    times = {"a": 5.0, "b": itertools.cycle([3.0, 90.0, 3.0, 3.0])}
    assert search("ab", 1, clock.sampler(times), clock.now + 1e9, clock)[0] == {"b": 3.0, "a": 5.0}


def test_the_first_rounds_do_not_count():
    clock = Clock()
    times = {"a": itertools.cycle([1.0] * FIRST_ROUNDS + [4.0] * 4 + [5.0] * 5)}
    assert search("a", 1, clock.sampler(times), clock.now + 1e9, clock)[0] == {"a": 5.0}


def test_after_the_deadline_nothing_new_is_measured():
    clock = Clock()
    times = dict.fromkeys("abcdefgh", 1.0)
    cost = 0.5
    search(list(times), 1, clock.sampler(times, cost), clock.now + 4 * cost * FIRST_ROUNDS - 0.1, clock)
    assert set(clock.sampled) == set("abcd")
    late = Clock()
    assert search(list(times), 1, late.sampler(times), late.now - 1, late) == ({"a": 1.0}, ["a"])


def test_what_cannot_run_is_left_out_and_what_is_wrong_ends_the_search():
    clock = Clock()
    times = {"a": 2.0, "b": RuntimeError("out of resources"), "c": 1.0}
    for always in (1, 3):
        clock.sampled.clear()
        found = search("abc", always, clock.sampler(times), clock.now + 1e9, clock)
        assert found == ({"c": 1.0, "a": 2.0}, ["a", "b", "c"])
        assert clock.sampled.count("b") == 1
    late = itertools.cycle([1.0] * FIRST_ROUNDS + [RuntimeError("out of memory")])
    assert search("ab", 1, clock.sampler({"a": 2.0, "b": late}), clock.now + 1e9, clock)[0] == {"a": 2.0}
    with pytest.raises(RuntimeError, match="b cannot be measured: out of resources"):
        search("bac", 1, clock.sampler(times), clock.now + 1e9, clock)
    broken = itertools.cycle([2.0] * FIRST_ROUNDS + [RuntimeError("illegal memory access")])
    with pytest.raises(RuntimeError, match="a cannot be measured, after c had failed: illegal"):
        search("abc", 1, clock.sampler({"a": broken, "b": 1.0, "c": RuntimeError("d")}), clock.now + 1e9, clock)
    with pytest.raises(WrongError):
        search("abc", 1, clock.sampler(times | {"c": WrongError("c")}), clock.now + 1e9, clock)


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(tune, "target_of", lambda device: TARGETS["sm_90"])


class Speeds(dict):
    """Kernels with four steps of K or more are fast; torch is fastest with a bf16 gate."""

    def __missing__(self, choice):
        if isinstance(choice, str):
            return {"fp32": 7.0, "bf16": 2.0}[choice]
        return 3.0 + abs(choice.split_k - 7) / 100


def tune_both(clock, seconds, compiler, **options):
    def sampler(case, device):
        return clock.sampler(Speeds(), cost=0.01)

    return list(
        tune.tune(
            [DENSE, FP8], torch.device("cuda"), seconds, sampler=sampler, compiler=compiler, clock=clock, **options
        )
    )


@pytest.mark.parametrize("seconds", [110, 5])
def test_all_rows_of_all_tasks_get_an_entry_in_the_time_that_there_is(h100, seconds):
    clock, limits, said = Clock(), [], []

    def compiler(target, kernels, limit):
        limits.append(limit)
        clock.now += limit
        assert len(set(kernels)) == len(kernels)
        return kernels

    entries = tune_both(clock, seconds, compiler, report=lambda *what: said.append(what))
    assert [(entry.case.kinds, entry.case.m) for entry in entries] == [
        (task.kinds, m) for task in (DENSE, FP8) for m in MS
    ]
    # Compiling has half of the time; the last rounds are not cut short.
    assert limits == [seconds / 2]
    assert clock.now - 1000 <= seconds + len(entries) * 0.01 * (FIRST_ROUNDS + LAST_ROUNDS * (3 + FINALISTS))
    assert said[-1] == ("measuring", 30, 30)
    assert said[: -len(entries)] == [("compiling", n, len(said) - 30) for n in range(1, len(said) - 29)]
    for entry in entries:
        known = candidates(entry.case.m, GLM, entry.case.kinds, TARGETS["sm_90"])
        assert entry.default_us == Speeds()[known[0]]
        assert (entry.tried, entry.candidates) == (len(known) if seconds == 110 else entry.tried, len(known))
        if seconds == 110:
            assert entry.us == min(Speeds()[config] for config in known) == Speeds()[entry.pick]
            assert entry.us <= entry.runner_up_us
            assert entry.torch_us == {"fp32": 7.0, "bf16": 2.0}
            assert entry.torch_for == (["bf16"] if entry.case.kinds == DENSE.kinds else [])
    assert min(entry.tried for entry in entries) == (3 if seconds == 110 else 1)
    if seconds == 5:  # a share of the time for each
        assert max(entry.tried for entry in entries) <= 4


def test_what_is_likely_fast_is_compiled_first_and_only_what_is_compiled_is_measured(h100):
    clock, asked = Clock(), []

    def compiler(target, kernels, limit):
        asked.extend(kernels)
        return kernels[:20]

    entries = tune_both(clock, 110, compiler)
    reckoned = {(candidates(e.case.m, GLM, e.case.kinds, TARGETS["sm_90"])[0], GLM, e.case.kinds) for e in entries}
    assert set(asked[: len(reckoned)]) == reckoned
    for entry in entries:
        configs = candidates(entry.case.m, GLM, entry.case.kinds, TARGETS["sm_90"])
        at_hand = [config for config in configs[1:] if (config, GLM, entry.case.kinds) in asked[:20]]
        assert entry.tried == 1 + len(at_hand)


def test_kernels_are_compiled_by_processes_until_the_time_is_over(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config, shape = KernelConfig("gemv", 1, 128, slices=8), (128, 16, 512)
    fine, broken = (config, shape, DENSE.kinds), (config, shape, (99, 99))
    assert list(tune._compile(TARGETS["sm_90"], [fine, broken], 300)) == [fine]
    assert list(tmp_path.rglob("gemv_kernel.cubin"))
    assert list(tune._compile(TARGETS["sm_90"], [fine], 0)) == []
    with pytest.raises(RuntimeError, match="a process that compiled was killed"):
        list(tune._compile(Killer(), [fine], 300))


class Killer:
    """A target that ends the process that gets it."""

    def __reduce__(self):
        return os._exit, (9,)


class Calls:
    """In place of a Replay: runs the calls one by one."""

    def __init__(self, calls):
        self.calls = calls
        for call in calls:
            call()

    def microseconds(self):
        return float(len(self.calls))


@pytest.fixture
def sampled(monkeypatch, mm_to_fp32):
    """A Sampler on the CPU; and the weights that every launch was given."""
    monkeypatch.setattr(tune, "Replay", Calls)
    monkeypatch.setattr(tune, "copies_to_outgrow_l2", lambda nbytes, device: 3)
    seen, error = [], [0.0]
    workspace._reserves.clear()

    def launch(x, operands, outs, problem, config):
        seen.append(operands[0][0].data_ptr())
        for out, exact in zip(outs, reference(x, tune._copies(GLM, problem.kinds, x.device)[0]), strict=True):
            out.copy_(exact * (1 + error[0]))

    monkeypatch.setattr(tune, "launch", launch)
    yield seen, error
    tune._copies.cache_clear()


@pytest.mark.parametrize("task", [DENSE, FP8], ids=["dense", "fp8"])
def test_a_sample_goes_through_all_copies_and_is_checked_first(sampled, task):
    seen, error = sampled
    sample = tune.Sampler(Case(5, GLM, task.kinds), torch.device("cpu"))
    config = choose(5, GLM, task.kinds, TARGETS["sm_90"])
    assert sample(config) == 3.0
    assert len(set(seen)) == 3
    assert len(seen) == 4  # once to be checked, once with each copy
    for outs in OUTS:
        assert sample(outs) == 3.0  # torch, with bf16 weights
    assert sample._x.shape == (5, GLM[2])
    error[0] = 1e-5
    assert sample(config) == 3.0
    with pytest.raises(WrongError, match=r"split_k .* is off by 1.0e-05 of the largest output"):
        sample(replace(config, num_warps=4))


def test_graphs_that_take_turns_share_their_counters(sampled, monkeypatch):
    class Graph(Calls):
        def __init__(self, calls):
            super().__init__(calls)
            workspace._reserved(torch.device("cpu"), 1000)

    monkeypatch.setattr(tune, "Replay", Graph)
    sample = tune.Sampler(Case(5, GLM, DENSE.kinds), torch.device("cpu"))
    for warps in (1, 2, 4):
        sample(KernelConfig("gemv", 4, 128, slices=8, num_warps=warps))
        assert workspace._reserves[torch.device("cpu")].numel() == workspace.RESERVE


def test_torch_is_judged_by_the_weights_that_it_has(sampled):
    """bf16 rounds what FP8 with scales in fp32 stands for."""
    sample = tune.Sampler(Case(5, GLM, (Kind.FP8_BLOCK, Kind.FP8_BLOCK)), torch.device("cpu"))
    assert sample("fp32") == 3.0


@pytest.mark.parametrize("off", [2e-4, 2**-5])
def test_torch_is_left_out_where_it_is_too_far_off(sampled, monkeypatch, off):
    multiply = tune.multiply_by_torch

    def less_precise(x, weights, outs):
        done = multiply(x, weights, outs)
        for out in outs:
            out *= 1 + off
        return done

    monkeypatch.setattr(tune, "multiply_by_torch", less_precise)
    sample = tune.Sampler(Case(5, GLM, DENSE.kinds), torch.device("cpu"))
    with pytest.raises(RuntimeError, match="torch is off by"):
        sample("fp32")
    if off == 2e-4:
        assert sample("bf16") == 3.0
    else:
        with pytest.raises(RuntimeError, match="torch is off by"):
            sample("bf16")


@pytest.mark.parametrize("value", [math.nan, 1.0])
def test_what_writes_nothing_or_something_else_is_wrong(sampled, monkeypatch, value):
    monkeypatch.setattr(tune, "launch", lambda x, operands, outs, problem, config: outs[1].fill_(value))
    sample = tune.Sampler(Case(5, GLM, DENSE.kinds), torch.device("cpu"))
    with pytest.raises(WrongError):
        sample(choose(5, GLM, DENSE.kinds, TARGETS["sm_90"]))


def test_a_replay_is_one_graph_of_many_calls(monkeypatch):
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

    class Event:
        now = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            Event.now += 1.6  # milliseconds
            self.time = Event.now

        def synchronize(self):
            log.append("wait")

        def elapsed_time(self, end):
            return end.time - self.time

    @contextlib.contextmanager
    def capture(graph):
        assert isinstance(graph, Graph)
        log.append("begin")
        yield
        log.append("end")

    for name, value in (("CUDAGraph", Graph), ("graph", capture), ("Event", Event), ("synchronize", lambda: None)):
        monkeypatch.setattr(torch.cuda, name, value)
    replay = timing.Replay([lambda name=name: log.append(name) for name in "abc"])
    assert log == [*"abc", "begin", *"abc" * 22, "end", "replay"]  # 64 calls at least
    assert replay.microseconds() == pytest.approx(1600 / 66)
    assert log[-2:] == ["replay", "wait"]


def test_copies_are_more_than_l2_holds(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 50 * 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for nbytes in (2_752_512, 10**9):
        count = timing.copies_to_outgrow_l2(nbytes, torch.device("cuda"))
        assert (count - 1) * nbytes >= 2 * 50 * 2**20


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU for the command, which measures nothing; yields what it was asked for."""
    for name, value in (("is_available", True), ("current_device", 0), ("get_device_name", GPU)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(target, "target_of", lambda _: TARGETS["sm_90"])
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "MS", (1, 16))
    asked = []

    def measure(tasks, device, seconds, report):
        report("compiling", 1, 2)
        asked.append((tasks, device, seconds))
        for task, m in itertools.product(tasks, tune.MS):
            config = choose(m, task.shape, task.kinds, TARGETS["sm_90"])
            yield Entry(
                Case(m, task.shape, task.kinds), config, float(len(asked)), None, None, 5.0, {"bf16": 0.5}, 1, 9
            )

    monkeypatch.setattr(tune, "tune", measure)
    return asked


def run(*arguments):
    return CliRunner().invoke(app, ["tune", *map(str, arguments)])


def test_the_command_keeps_a_table_and_what_else_is_in_it(gpu, tmp_path):
    path = tmp_path / "indexproj/nvidia-h100-80gb-hbm3.json"
    result = run("--shape", "glm-5", "--pair", "BF16, BF16", "--pair", "FP8 128x128, BF16")
    assert result.exit_code == 0, result.output
    assert f"Kept in {path}." in result.stdout
    assert gpu == [([DENSE, FP8], torch.device("cuda", 0), 110)]
    assert "glm-5: BF16, BF16; us" in result.stdout
    assert "gemv 1x1024, torch for bf16" in result.stdout
    table = Table.read(path, GPU, TARGETS["sm_90"])
    assert [entry.case.m for entry in table.entries] == [1, 16, 1, 16]
    result = run("--shape", "glm-5", "--shape", "deepseek-v3.2", "--pair", "FP8 128x128, BF16", "--seconds", "7")
    assert result.exit_code == 0, result.output
    assert [seconds for _, _, seconds in gpu[1:]] == [7, 7]
    assert [(entry.case.shape, entry.us) for entry in Table.read(path, GPU, TARGETS["sm_90"]).entries] == [
        (GLM, 1.0), (GLM, 1.0), (GLM, 2.0), (GLM, 2.0), (DEEPSEEK, 3.0), (DEEPSEEK, 3.0),
    ]  # fmt: skip


def test_what_was_measured_at_more_length_stays(gpu, monkeypatch, tmp_path):
    measure, path, counts = tune.tune, tmp_path / "table.json", iter((5, 4, 5))

    def tried(tasks, device, seconds, report):
        count = next(counts)
        for entry in measure(tasks, device, seconds, report):
            yield replace(entry, tried=count)

    monkeypatch.setattr(tune, "tune", tried)
    for us in (1.0, 1.0, 3.0):
        run("--shape", "glm-5", "--pair", "BF16, BF16", "--output", path)
        assert {entry.us for entry in Table.read(path, GPU, TARGETS["sm_90"]).entries} == {us}


def test_a_folder_that_cannot_be_is_said_before_anything_is_measured(gpu, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("--output", tmp_path / "file/table.json")
    assert (result.exit_code, gpu) == (2, [])
    assert "tune: " in result.stderr
    monkeypatch.setattr(tuned, "default_path", mock.Mock(side_effect=RuntimeError("no home directory")))
    result = run()
    assert (result.exit_code, gpu) == (2, [])
    assert "tune: no home directory" in result.stderr


def test_a_table_that_does_not_fit_is_replaced_with_a_word(gpu, tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{}")
    result = run("--shape", "glm-5", "--pair", "BF16, BF16", "--output", path)
    assert result.exit_code == 0, result.output
    assert "replaces what is there" in result.stderr
    assert len(Table.read(path, GPU, TARGETS["sm_90"]).entries) == 2


@pytest.mark.parametrize(
    ("error", "code"), [(WrongError("tiled is off"), 1), (RuntimeError("no kernel image is available"), 2)]
)
def test_the_command_says_what_went_wrong(gpu, monkeypatch, tmp_path, error, code):
    measure = tune.tune

    def fail(*arguments, report):
        yield from itertools.islice(measure(*arguments, report), count)
        raise error

    monkeypatch.setattr(tune, "tune", fail)
    for count in (0, 3):
        path = tmp_path / f"{count}.json"
        result = run("--shape", "glm-5", "--output", path)
        assert (result.exit_code, str(error) in result.stderr) == (code, True)
        assert path.exists() == (count > 0)
    assert len(Table.read(path, GPU, TARGETS["sm_90"]).entries) == 3


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run()
    assert result.exit_code == 2
    assert "tune: measures on a GPU, and there is none here" in result.stderr
    assert "--pair is one of" in run("--pair", "FP8").stderr
