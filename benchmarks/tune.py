"""Measures which kernel is fastest on the GPU at hand; the table of it is what dispatch goes by from then on."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, TimeoutError, as_completed
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.errors import TritonError

from ..indexer.cli.synthetic import random_matrix
from ..kernels import KernelConfig, ProjectionWeights, Target, reference
from ..kernels.dispatch import candidates
from ..kernels.launch import launch, multiply_by_torch, problem_of
from ..kernels.matrix import Kind
from ..kernels.target import target_of
from ..kernels.tuned import OUTS, Case, Entry
from ..kernels.workspace import counters_returned
from .compiled import warm_up
from .timing import Replay, copies_to_outgrow_l2

MS = tuple(2**power for power in range(15))
# Largest error against fp64, relative to the largest output, by dtype. torch adds inside the tensor core, which
# truncates in each of 448 steps over a K of 7168, and may add up parts of K in bf16.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
TORCH_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-6}
FINALISTS, FIRST_ROUNDS, LAST_ROUNDS = 3, 3, 9

# A kernel, or a key of OUTS for torch's GEMM with such outputs. Kernels are measured with a gate in fp32.
Choice = KernelConfig | str
# Config, rows of each matrix and K, kinds.
Kernel = tuple[KernelConfig, tuple[int, ...], tuple[int, ...]]


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


def search(
    choices: Sequence[Choice],
    always: int,
    sample: Callable[[Choice], float],
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[dict[Choice, float], list[Choice]]:
    """Median microseconds of the fastest choices, fastest first; and all that were tried.

    Every choice is sampled a few times, until the deadline; the fastest ones then again, in turn, so that a change of
    clocks meets all of them. What the GPU or torch cannot do is left out.

    Args:
        choices: the first one is sampled even after the deadline.
        always: how many of the choices, from the first, are sampled to the end if they can be.
        sample: microseconds of one measurement.
        deadline: by the clock.

    Raises:
        WrongError: sampling found one.
        RuntimeError: the first choice cannot be done.
    """
    samples: dict[Choice, list[float]] = {}
    failed: list[Choice] = []

    def measure(choice: Choice) -> None:
        try:
            if choice not in failed:
                samples.setdefault(choice, []).append(sample(choice))
        except (RuntimeError, TritonError) as error:  # also how torch says that it lacks something
            if choice == choices[0]:
                after = f", after {failed[-1]} had failed" if failed else ""  # which may be what broke the GPU
                raise RuntimeError(f"{choice} cannot be measured{after}: {error}") from error
            failed.append(choice)

    for choice in choices:
        if samples and clock() >= deadline:
            break
        for _ in range(FIRST_ROUNDS):
            measure(choice)
    left = [choice for choice in samples if choice not in failed]
    others = [choice for choice in left if choice not in choices[:always]]
    others.sort(key=lambda choice: statistics.median(samples[choice]))
    last = [choice for choice in left if choice not in others[FINALISTS:]]
    for _ in range(LAST_ROUNDS):
        for choice in last:
            measure(choice)
    medians = {choice: statistics.median(samples[choice][FIRST_ROUNDS:]) for choice in last if choice not in failed}
    return dict(sorted(medians.items(), key=lambda item: item[1])), list(samples)


def tune(
    tasks: Sequence[Task],
    device: torch.device,
    seconds: float,
    *,
    ms: Sequence[int] = MS,
    report: Callable[[str, int, int], None] = lambda *_: None,
    sampler: Callable[[Case, torch.device], Callable[[Choice], float]] | None = None,
    compiler: Callable[[Target, Sequence[Kernel], float], Iterable[Kernel]] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Entry]:
    """Yields an entry for every task and M. Where the time runs out, less is tried, but something for each entry.

    All kernels are compiled first, those that are likely to be fast before the others, on all cores and in up to half
    of the time; then those that are compiled are measured.

    Args:
        seconds: shared out evenly.
        ms: rows of x, powers of two.
        report: told what is being done, and how much of how much is.
        sampler, compiler, clock: for tests; left out, the GPU, all cores and the real one.

    Raises:
        WrongError: a kernel is wrong.
        RuntimeError: there is no GPU, it cannot do what `choose` reckons, or compiling takes more memory than there is.
    """
    target, start = target_of(device), clock()
    cases = [Case(m, task.shape, task.kinds) for task in tasks for m in ms]
    configs = {case: candidates(case.m, case.shape, case.kinds, target) for case in cases}
    by_rank = itertools.zip_longest(*([(case, config) for config in configs[case]] for case in cases))
    ranked = (pair for rank in by_rank for pair in rank if pair is not None)
    kernels = list(dict.fromkeys((config, case.shape, case.kinds) for case, config in ranked))
    compiled = set()
    for kernel in (compiler or _compile)(target, kernels, seconds / 2):
        compiled.add(kernel)
        report("compiling", len(compiled), len(kernels))
    begin = clock()
    for number, case in enumerate(cases, 1):
        default, *others = configs[case]
        ready = [config for config in others if (config, case.shape, case.kinds) in compiled]
        deadline = begin + (start + seconds - begin) * number / len(cases)
        sample = (sampler or Sampler)(case, device)
        ranking, tried = search([default, *OUTS, *ready], 1 + len(OUTS), sample, deadline, clock)
        report("measuring", number, len(cases))
        yield _entry(case, configs[case], ranking, len(set(tried) - OUTS.keys()))


def _entry(case: Case, configs: list[KernelConfig], ranking: dict[Choice, float], tried: int) -> Entry:
    times = {choice: round(us, 3) for choice, us in ranking.items()}
    fastest, *others = (choice for choice in times if isinstance(choice, KernelConfig))
    runner_up = others[0] if others else None
    return Entry(
        case,
        pick=fastest,
        us=times[fastest],
        runner_up=runner_up,
        runner_up_us=times[runner_up] if runner_up else None,
        default_us=times[configs[0]],
        torch_us={outs: times[outs] for outs in OUTS if outs in times},
        tried=tried,
        candidates=len(configs),
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
            copies, exact = (self._copies, self._exact) if isinstance(choice, KernelConfig) else self._for_torch
            self._run(choice, copies[0], outs)
            self._check(choice, outs, exact)
            # Graphs that are replayed one after the other can share their counters, and would use up the reserve.
            with counters_returned(self._x.device):
                calls = [functools.partial(self._run, choice, weights, outs) for weights in copies]
                self._replays[choice] = Replay(calls)
        return self._replays[choice].microseconds()

    @functools.cached_property
    def _for_torch(self) -> tuple[list[ProjectionWeights], tuple[Tensor, Tensor]]:
        """The weights in bf16, and what is exact for these."""
        copies = [weights.to_bf16() for weights in self._copies]
        return copies, reference(self._x, copies[0])

    def _outputs(self, choice: Choice) -> tuple[Tensor, ...]:
        if choice == "bf16":
            return torch.split(self._x.new_full((len(self._x), sum(self._ns)), torch.nan), self._ns, 1)
        pairs = zip(self._ns, OUTS["fp32"], strict=True)
        return tuple(self._x.new_full((len(self._x), n), torch.nan, dtype=dtype) for n, dtype in pairs)

    def _run(self, choice: Choice, weights: ProjectionWeights, outs: tuple[Tensor, ...]) -> None:
        operands = weights.wk.operands, weights.gate.operands
        if isinstance(choice, KernelConfig):
            launch(self._x, operands, outs, problem_of(weights, *OUTS["fp32"]), choice)
        elif not multiply_by_torch(self._x, [weight for weight, _, _ in operands], outs):
            raise RuntimeError("torch would take two GEMMs: weights or outputs are not one tensor's")

    def _check(self, choice: Choice, outs: tuple[Tensor, ...], exact: tuple[Tensor, Tensor]) -> None:
        is_ours = isinstance(choice, KernelConfig)
        for out, truth in zip(outs, exact, strict=True):
            error = ((out.double() - truth).abs().max() / truth.abs().max()).item()
            if not error <= (TOLERANCES if is_ours else TORCH_TOLERANCES)[out.dtype]:
                what = f"{choice if is_ours else 'torch'} is off by {error:.1e} of the largest output, for {self._case}"
                raise WrongError(what) if is_ours else RuntimeError(what)


@functools.lru_cache(maxsize=1)
def _copies(shape: tuple[int, ...], kinds: tuple[Kind, ...], device: torch.device) -> list[ProjectionWeights]:
    *ns, k = shape
    torch.manual_seed(0)
    weights = ProjectionWeights.pack(*(random_matrix(kind, n, k) for kind, n in zip(kinds, ns, strict=True)))
    count = copies_to_outgrow_l2(weights.nbytes, device)
    return [weights.map(lambda tensor: tensor.to(device, copy=True)) for _ in range(count)]


def _compile(target: Target, kernels: Sequence[Kernel], seconds: float) -> Iterator[Kernel]:
    """Puts kernels into Triton's cache, on all cores, as far as there is time; yields those that are in it."""
    # Not by fork: that would copy a process that holds a GPU.
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn"))
    futures = {pool.submit(_compile_one, target, *kernel): kernel for kernel in kernels}
    try:
        for future in as_completed(futures, timeout=seconds):
            error = future.exception()
            if isinstance(error, BrokenExecutor):
                raise RuntimeError("a process that compiled was killed, for memory? Try `taskset -c 0-3`") from error
            if error is None:
                yield futures[future]
    except TimeoutError:
        pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _compile_one(*what: Any) -> None:
    warm_up(*what)
