"""Measures which kernel is fastest on the GPU at hand; the table of it is what dispatch goes by from then on."""

from __future__ import annotations

import functools
import itertools
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from ..kernels import KernelConfig, ProjectionWeights, Target, choose, reference
from ..kernels.compiled import warm_up
from ..kernels.dispatch import MAX_SPLIT_K, cdiv, next_power_of_2
from ..kernels.launch import launch, multiply_by_torch, problem_of
from ..kernels.matrix import Kind
from ..kernels.target import target_of
from ..kernels.tuned import OUTS, Case, Entry
from ..kernels.workspace import counters_returned
from .synthetic import random_matrix
from .timing import Replay, copies_to_outgrow_l2

MS = tuple(2**power for power in range(15))
# Largest error against fp64, relative to the largest output, by dtype. What torch adds inside the tensor core shows.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
TORCH_TOLERANCE = 2**-6
FINALISTS, FIRST_ROUNDS, LAST_ROUNDS = 3, 3, 9

# A kernel, or a key of OUTS for torch's GEMM with such outputs. Kernels are measured with a gate in fp32.
Choice = KernelConfig | str


@dataclass(frozen=True)
class Task:
    """The weights of one kind of model.

    Attributes:
        shape: (D, H, K).
        kinds: of wk and of the gate.
    """

    shape: tuple[int, int, int]
    kinds: tuple[Kind, Kind]


class WrongError(Exception):
    """A kernel computes something else than the reference."""


def candidates(m: int, shape: tuple[int, ...], kinds: tuple[int, ...], target: Target) -> list[KernelConfig]:
    """What is worth measuring for m rows: first what `choose` reckons, then what is near to it and fills the GPU."""
    m, (*ns, k) = next_power_of_2(m), shape
    near = []
    if m <= 16:
        for block_m, num_warps in itertools.product((min(m, 4), min(m, 8)), (2, 4, 8)):
            near.append(KernelConfig("gemv", block_m, block_k=128, num_warps=num_warps, slices=8))
    if 2 <= m <= 1024:
        lowest = 8 if target.is_cuda() else 16
        rows = [rows for rows in (8, 16, 32) if lowest <= rows < 2 * max(m, lowest)]
        for block_m, block_n, slices, steps in itertools.product(rows, (16, 32), (4, 8), (1, 2, 4)):
            split_k = cdiv(k, slices * 64 * steps)
            if split_k <= MAX_SPLIT_K:
                near.append(
                    KernelConfig(
                        "split_k", block_m, 64, split_k, num_stages=2, num_warps=slices, block_n=block_n, slices=slices
                    )
                )
    if m >= 32:
        for block_m, split_k in itertools.product((16, 32, 64, 128), (1, 2, 4, 8, 16)):
            if block_m <= m:
                for num_stages in (3,) if split_k > 1 else (3, 2, 4):
                    near.append(
                        KernelConfig("tiled", block_m, 64, split_k, num_stages, num_warps=4 if block_m < 64 else 8)
                    )

    def fills(config: KernelConfig) -> bool:
        programs, one_wave = math.prod(config.grid(m, *ns)), target.sm_count
        may_queue = config.regime == "tiled" and config.split_k == 1
        return one_wave / 4 <= programs and (programs <= 4 * one_wave or may_queue)

    return list(dict.fromkeys([choose(m, shape, kinds, target), *filter(fills, near)]))


def search(
    choices: Sequence[Choice],
    always: int,
    sample: Callable[[Choice], float],
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Choice, float]:
    """Median microseconds of the fastest choices, and of those that are always among the last; fastest first.

    Every choice is sampled a few times, until the deadline; the fastest ones then again, in turn, so that a change of
    clocks meets all of them.

    Args:
        choices: the first one is sampled even after the deadline. One that the GPU or torch cannot do is left out.
        always: how many of the choices, from the first, are sampled to the end if they can be.
        sample: microseconds of one measurement.
        deadline: by the clock.

    Raises:
        WrongError: sampling found one.
        RuntimeError: the first choice cannot be done.
    """
    samples: dict[Choice, list[float]] = {}
    for choice in choices:
        if samples and clock() >= deadline:
            break
        try:
            samples[choice] = [sample(choice) for _ in range(FIRST_ROUNDS)]
        except (RuntimeError, TritonError) as error:  # also how torch says that it lacks something
            if choice == choices[0]:
                raise RuntimeError(f"{choice} cannot be measured: {error}") from error
    others = sorted(samples.keys() - set(choices[:always]), key=lambda choice: statistics.median(samples[choice]))
    last = [choice for choice in choices[:always] if choice in samples] + others[:FINALISTS]
    again: dict[Choice, list[float]] = {choice: [] for choice in last}
    for _ in range(LAST_ROUNDS):
        for choice in last:
            again[choice].append(sample(choice))
    medians = {choice: statistics.median(times) for choice, times in again.items()}
    return dict(sorted(medians.items(), key=lambda item: item[1]))


def tune(
    tasks: Sequence[Task],
    device: torch.device,
    seconds: float,
    *,
    ms: Sequence[int] = MS,
    sampler: Callable[[Case, torch.device], Callable[[Choice], float]] | None = None,
    compile_ahead: Callable[[Task, Target, Sequence[int], float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Entry]:
    """Yields an entry for every task and M. Where the time runs out, less is tried, but something for each entry.

    Args:
        seconds: shared out evenly.
        ms: rows of x, powers of two.
        sampler, compile_ahead, clock: for tests; left out, the GPU, all cores and the real one.

    Raises:
        WrongError: a kernel is wrong.
        RuntimeError: there is no GPU, or it cannot do what `choose` reckons.
    """
    target, start = target_of(device), clock()
    for number, task in enumerate(tasks, 1):
        end = start + seconds * number / len(tasks)
        # Compilation on all cores gets half of what is left of the task's time.
        (compile_ahead or _compile_ahead)(task, target, ms, (end - clock()) / 2)
        begin = clock()
        for place, m in enumerate(ms, 1):
            default, *others = candidates(m, task.shape, task.kinds, target)
            case, deadline = Case(m, task.shape, task.kinds), begin + (end - begin) * place / len(ms)
            with counters_returned(device):
                sample = (sampler or Sampler)(case, device)
                ranking = search([default, *OUTS, *others], 1 + len(OUTS), sample, deadline, clock)
                del sample  # and with it the graphs
            yield _entry(case, default, ranking)


def _entry(case: Case, default: KernelConfig, ranking: dict[Choice, float]) -> Entry:
    times = {choice: round(us, 3) for choice, us in ranking.items()}
    configs = [choice for choice in times if isinstance(choice, KernelConfig)]
    runner_up = configs[1] if len(configs) > 1 else None
    torch_us = {outs: times[outs] for outs in OUTS if outs in times}
    return Entry(
        case,
        pick=configs[0],
        us=times[configs[0]],
        runner_up=runner_up,
        runner_up_us=times[runner_up] if runner_up else None,
        default_us=times[default],
        torch_us=torch_us,
    )


class Sampler:
    """Microseconds of a choice on a GPU, with weights that are not in L2; the results are checked first."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self._case = case
        self._copies = _copies(case.shape, case.kinds, device)
        *self._ns, k = case.shape
        self._x = torch.randn(case.m, k, device=device).bfloat16()
        self._exact = reference(self._x, self._copies[0])
        self._replays: dict[Choice, Replay] = {}

    def __call__(self, choice: Choice) -> float:
        if choice not in self._replays:
            outs = self._outputs(choice)
            copies = (
                self._copies if isinstance(choice, KernelConfig) else [weights.to_bf16() for weights in self._copies]
            )
            self._run(choice, copies[0], outs)
            self._check(choice, outs)
            self._replays[choice] = Replay([functools.partial(self._run, choice, weights, outs) for weights in copies])
        return self._replays[choice].microseconds()

    def _outputs(self, choice: Choice) -> tuple[Tensor, ...]:
        if choice == "bf16":
            return torch.split(self._x.new_full((len(self._x), sum(self._ns)), torch.nan), self._ns, 1)
        pairs = zip(self._ns, OUTS["fp32"], strict=True)
        return tuple(self._x.new_full((len(self._x), n), torch.nan, dtype=dtype) for n, dtype in pairs)

    def _run(self, choice: Choice, weights: ProjectionWeights, outs: tuple[Tensor, ...]) -> None:
        operands = weights.wk.operands, weights.gate.operands
        if isinstance(choice, KernelConfig):
            launch(self._x, operands, outs, problem_of(weights, *OUTS["fp32"]), choice)
        else:
            multiply_by_torch(self._x, [weight for weight, _, _ in operands], outs)

    def _check(self, choice: Choice, outs: tuple[Tensor, ...]) -> None:
        for out, exact in zip(outs, self._exact, strict=True):
            error = ((out.double() - exact).abs().max() / exact.abs().max()).item()
            if not error <= (TOLERANCES[out.dtype] if isinstance(choice, KernelConfig) else TORCH_TOLERANCE):
                raise WrongError(f"{choice} is off by {error:.1e} of the largest output, for {self._case}")


@functools.lru_cache(maxsize=1)
def _copies(shape: tuple[int, ...], kinds: tuple[Kind, ...], device: torch.device) -> list[ProjectionWeights]:
    *ns, k = shape
    torch.manual_seed(0)
    weights = ProjectionWeights.pack(*(random_matrix(kind, n, k) for kind, n in zip(kinds, ns, strict=True)))
    count = copies_to_outgrow_l2(weights.nbytes, device)
    return [weights.map(lambda tensor: tensor.to(device, copy=True)) for _ in range(count)]


def _compile_ahead(task: Task, target: Target, ms: Sequence[int], seconds: float) -> None:
    """Puts the kernels of all candidates into Triton's cache, on all cores, as far as there is time."""
    configs = dict.fromkeys(itertools.chain(*(candidates(m, task.shape, task.kinds, target) for m in ms)))
    # Not by fork: that would copy a process that holds a GPU.
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"))
    compiled = [pool.submit(_compile, target, config, task.shape, task.kinds) for config in configs]
    wait(compiled, timeout=max(0, seconds))  # an error will come back when the kernel is launched
    pool.shutdown(wait=False, cancel_futures=True)


def _compile(*what: Any) -> None:
    warm_up(*what)
