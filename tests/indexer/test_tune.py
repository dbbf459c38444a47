"""The search for the fastest kernel, with a clock and a GPU that are made up."""

import contextlib
import itertools
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from indexproj.indexer import timing, tune
from indexproj.indexer.cli import app
from indexproj.indexer.tune import FINALISTS, FIRST_ROUNDS, LAST_ROUNDS, MS, Task, WrongError, candidates, search
from indexproj.kernels import TARGETS, choose, reference
from indexproj.kernels.gates import PAIRS, SHAPES
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
            if isinstance(found, Exception):
                raise found
            return next(found) if isinstance(found, itertools.cycle) else found

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
    assert len(everything) <= 120  # compiled by 16 cores in a quarter of a minute


def test_the_fastest_is_found_and_those_that_are_close_are_measured_again():
    clock = Clock()
    # "b" looks fastest at first, and "c" in the long run.
    times = {"a": 9.0, "b": itertools.cycle([1.0] * FIRST_ROUNDS + [5.0] * LAST_ROUNDS), "c": 3.0, "d": 4.0, "e": 8.0}
    found = search(list(times), 1, clock.sampler(times), clock.now + 1e9, clock)
    assert list(found.items()) == [("c", 3.0), ("d", 4.0), ("b", 5.0), ("a", 9.0)]
    again = clock.sampled[len(times) * FIRST_ROUNDS :]
    assert again == ["a", "b", "c", "d"] * LAST_ROUNDS  # in turn
    assert FINALISTS == 3


def test_one_slow_round_does_not_decide():
    clock = Clock()
    times = {"a": 5.0, "b": itertools.cycle([3.0, 90.0, 3.0, 3.0])}
    assert search("ab", 1, clock.sampler(times), clock.now + 1e9, clock) == {"b": 3.0, "a": 5.0}


def test_after_the_deadline_nothing_new_is_measured():
    clock = Clock()
    times = dict.fromkeys("abcdefgh", 1.0)
    cost = 0.5
    search(list(times), 1, clock.sampler(times, cost), clock.now + 4 * cost * FIRST_ROUNDS - 0.1, clock)
    assert set(clock.sampled) == set("abcd")
    late = Clock()
    assert search(list(times), 1, late.sampler(times), late.now - 1, late) == {"a": 1.0}


def test_what_cannot_run_is_left_out_and_what_is_wrong_ends_the_search():
    clock = Clock()
    times = {"a": 2.0, "b": RuntimeError("out of resources"), "c": 1.0}
    assert search("abc", 3, clock.sampler(times), clock.now + 1e9, clock) == {"c": 1.0, "a": 2.0}
    with pytest.raises(RuntimeError, match="b cannot be measured: out of resources"):
        search("bac", 1, clock.sampler(times), clock.now + 1e9, clock)
    with pytest.raises(WrongError):
        search("abc", 1, clock.sampler(times | {"c": WrongError("c")}), clock.now + 1e9, clock)


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(tune, "target_of", lambda device: TARGETS["sm_90"])
    monkeypatch.setattr(tune, "counters_returned", lambda device: contextlib.nullcontext())


class Speeds(dict):
    """Kernels with four steps of K or more are fast; torch is fastest with a bf16 gate."""

    def __missing__(self, choice):
        if isinstance(choice, str):
            return {"fp32": 7.0, "bf16": 2.0}[choice]
        return 3.0 + abs(choice.split_k - 7) / 100


@pytest.mark.parametrize("seconds", [110, 5])
def test_all_rows_of_all_tasks_get_an_entry_in_the_time_that_there_is(h100, seconds):
    clock, compiled = Clock(), []

    def compile_ahead(task, target, ms, limit):
        compiled.append((task, limit))
        clock.now += limit

    entries = list(
        tune.tune(
            [DENSE, FP8], torch.device("cuda"), seconds,
            sampler=lambda case, device: clock.sampler(Speeds(), cost=0.01), compile_ahead=compile_ahead, clock=clock,
        )
    )  # fmt: skip
    assert [(entry.case.kinds, entry.case.m) for entry in entries] == [
        (task.kinds, m) for task in (DENSE, FP8) for m in MS
    ]
    # Compiling has half of a task's time; the last rounds are not cut short.
    assert compiled[0] == (DENSE, seconds / 4)
    assert clock.now - 1000 <= seconds + len(entries) * 0.01 * (FIRST_ROUNDS + LAST_ROUNDS * (3 + FINALISTS))
    for entry in entries:
        known = candidates(entry.case.m, GLM, entry.case.kinds, TARGETS["sm_90"])
        assert entry.default_us == Speeds()[known[0]]
        if seconds == 110:
            assert entry.us == min(Speeds()[config] for config in known) == Speeds()[entry.pick]
            assert entry.us <= entry.runner_up_us
            assert entry.torch_us == {"fp32": 7.0, "bf16": 2.0}
            assert entry.torch_for == (["bf16"] if entry.case.kinds == DENSE.kinds else [])


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
    error[0] = 1e-5
    assert sample(config) == 3.0
    with pytest.raises(WrongError, match=r"split_k .* is off by 1.0e-05 of the largest output"):
        sample(replace(config, num_warps=4))


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
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(tune, "MS", (1, 16))
    asked = []

    def measure(tasks, device, seconds):
        asked.append((tasks, device, seconds))
        for task, m in itertools.product(tasks, tune.MS):
            config = choose(m, task.shape, task.kinds, TARGETS["sm_90"])
            yield Entry(Case(m, task.shape, task.kinds), config, float(len(asked)), None, None, 5.0, {"bf16": 0.5})

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
    table = Table.read(path, GPU)
    assert [entry.case.m for entry in table.entries] == [1, 16, 1, 16]
    result = run("--shape", "glm-5", "--shape", "deepseek-v3.2", "--pair", "FP8 128x128, BF16", "--seconds", "7")
    assert result.exit_code == 0, result.output
    assert [seconds for _, _, seconds in gpu[1:]] == [7, 7]
    assert [(entry.case.shape, entry.us) for entry in Table.read(path, GPU).entries] == [
        (GLM, 1.0), (GLM, 1.0), (GLM, 2.0), (GLM, 2.0), (DEEPSEEK, 3.0), (DEEPSEEK, 3.0),
    ]  # fmt: skip


def test_a_table_that_does_not_fit_is_replaced_with_a_word(gpu, tmp_path):
    path = tmp_path / "table.json"
    path.write_text("{}")
    result = run("--shape", "glm-5", "--pair", "BF16, BF16", "--output", path)
    assert result.exit_code == 0, result.output
    assert "replaces what is there" in result.stderr
    assert len(Table.read(path, GPU).entries) == 2


@pytest.mark.parametrize(
    ("error", "code"), [(WrongError("tiled is off"), 1), (RuntimeError("no kernel image is available"), 2)]
)
def test_the_command_says_what_went_wrong(gpu, monkeypatch, tmp_path, error, code):
    measure = tune.tune

    def fail(*arguments):
        yield from itertools.islice(measure(*arguments), count)
        raise error

    monkeypatch.setattr(tune, "tune", fail)
    for count in (0, 3):
        path = tmp_path / f"{count}.json"
        result = run("--shape", "glm-5", "--output", path)
        assert (result.exit_code, str(error) in result.stderr) == (code, True)
        assert path.exists() == (count > 0)
    assert len(Table.read(path, GPU).entries) == 3


def test_without_a_gpu_the_command_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = run()
    assert result.exit_code == 2
    assert "tune: measures on a GPU, and there is none here" in result.stderr
    assert "--pair is one of" in run("--pair", "FP8").stderr
