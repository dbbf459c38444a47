"""Measures which kernel is fastest on this GPU, and keeps the table that dispatch reads."""

import json
import math
import multiprocessing
import os
import signal
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, TimeoutError, as_completed
from dataclasses import fields, replace
from datetime import date
from functools import cache
from itertools import chain, product, zip_longest
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

from ..kernels import KernelConfig, Target, choose
from ..kernels.dispatch import MAX_SPLIT_K, OUTS, TABLE_SCHEMA, cdiv, next_power_of_2, prefill_tiles, versions
from ..kernels.formats import Format
from ..kernels.launch import KERNELS, torch_mm
from ..kernels.target import target_of
from .compiled import signature, warm_up
from .estimate import estimate
from .gpu import TORCH_TOLERANCES, Sampler, WrongError

MS = tuple(2**power for power in range(15))
FINALISTS, FIRST_ROUNDS, LAST_ROUNDS = 3, 3, 9
# cuBLAS rounds differently from the kernels, so it has to be faster by more than two percent.
TORCH_MARGIN = 0.98

PER_REGIME = 7  # candidates

# A kernel, or torch's GEMM with the output dtypes of that key of OUTS. Kernels are measured with an fp32 gate.
Choice = KernelConfig | str
Kernel = tuple[Any, ...]  # a KernelConfig, and the arguments of `signature`: shape, formats ...
Entry = dict[str, Any]  # of a table, as it stands in the JSON file


class Case(NamedTuple):
    """What one entry is for."""

    m: int  # a power of two, for all M that round up to it
    shape: tuple[int, ...]  # rows of each matrix, then K
    formats: tuple[Format, ...]  # of the matrices


def candidates(m: int, shape: tuple[int, ...], formats: tuple[Format, ...], target: Target) -> list[KernelConfig]:
    """Configs worth measuring: the default, that with PDL, then of each regime those with the lowest estimates.

    Regimes take turns, so that a search that runs out of time has tried all of them.
    """
    m, (*ns, k) = next_power_of_2(m), shape
    default, configs = choose(m, shape, formats, target), []
    if m <= 16:
        for block_m, num_warps, slices in product((min(m, 4), min(m, 8)), (2, 4, 8), (8, 16)):
            configs.append(KernelConfig("gemv", block_m, block_k=128, num_warps=num_warps, slices=slices))
    if 2 <= m <= 1024:
        for block_m, block_n, slices, steps in product((8, 16, 32), (16, 32), (4, 8), (1, 2, 4)):
            split_k = cdiv(k, slices * 64 * steps)
            if (8 if target.is_cuda() else 16) <= block_m < 2 * max(m, 16):
                configs.append(KernelConfig("split_k", block_m, 64, split_k, 2, slices, block_n, slices))
    if m >= 32 or default.regime == "prefill":
        tiles = prefill_tiles(ns, target, is_fp16=False, quantize_x=False)
        depths = product(((64, 3), (128, 2), (64, 4)), (1, 2, 3, 4, 5, 6, 8, 11, 14))
        for (block_m, block_n), ((block_k, num_stages), split_k), num_warps in product(tiles, depths, (4, 8)):
            if block_m <= max(m, 32) and (num_warps == 8 or (block_m <= 64 and block_n)):
                configs.append(KernelConfig("prefill", block_m, block_k, split_k, num_stages, num_warps, block_n))

    def is_useful(config: KernelConfig) -> bool:
        programs, one_wave = math.prod(config.grid(m, *ns)), target.sm_count
        depth = config.block_k * config.slices
        has_work = (config.split_k - 1) * cdiv(k, config.split_k * depth) * depth < k  # in every split
        may_queue = config.regime == "prefill" and config.split_k == 1
        is_split = has_work and config.split_k <= MAX_SPLIT_K
        return is_split and one_wave / 4 <= programs and (programs <= 4 * one_wave or may_queue)

    useful = sorted(filter(is_useful, configs), key=lambda config: estimate(m, shape, formats, config, target))
    ranked = [[config for config in useful if config.regime == regime][:PER_REGIME] for regime in KERNELS]
    with_pdl = [replace(default, pdl=True)] if target.is_cuda(90) and default.regime != "prefill" else []
    in_turn = chain.from_iterable(zip_longest(*ranked))
    return list(dict.fromkeys([default, *with_pdl, *filter(None, in_turn)]))


def tune(
    cases: Sequence[Case], device: torch.device, seconds: float, known: Mapping[Case, KernelConfig] | None = None
) -> Iterator[tuple[str, Entry | None]]:
    """Yields what has been done, and one entry per case. If time runs out, later candidates are skipped.

    Up to half of the time goes into compiling all kernels on all cores, likely winners first; the rest into measuring
    those that compiled, with an equal share per case. Known configs are tried first after the default.

    Raises:
        WrongError: a kernel is wrong.
        RuntimeError: there is no GPU, the default kernel fails on it, or compilation runs out of memory.
    """
    target, start = target_of(device), monotonic()
    configs: dict[Case, list[KernelConfig]] = {}
    for case in cases:
        default, *others = candidates(*case, target)
        configs[case] = list(dict.fromkeys([default, (known or {}).get(case, default), *others]))
    by_rank = zip_longest(*[[(config, *case[1:]) for config in configs[case]] for case in cases])
    kernels = list(dict.fromkeys(filter(None, chain.from_iterable(by_rank))))
    compiled = set()
    for kernel in compile_all(target, kernels, seconds / 2):
        compiled.add(kernel)
        yield f"compiled {len(compiled)} of {len(kernels)}", None
    begin = monotonic()
    for number, case in enumerate(cases, 1):
        default, *others = configs[case]
        ready = [config for config in others if (config, *case[1:]) in compiled]
        deadline = begin + (start + seconds - begin) * number / len(cases)
        # For other formats torch would need a second, bf16 copy of the weights.
        by_torch = list(OUTS) if set(case.formats) == {Format.BF16} else []
        choices: list[Choice] = [default, *by_torch, *ready]
        medians, tried = search(choices, 1 + len(by_torch), _measurer(case, device), deadline)
        counts = {"tried": len(set(tried) & set(configs[case])), "candidates": len(configs[case])}
        yield f"measured {number} of {len(cases)}", _entry(case, medians, default) | counts


def _measurer(case: Case, device: torch.device) -> Callable[[Choice], float]:
    """A function that measures a choice once, in microseconds."""
    sampler = Sampler(*case, device)

    @cache
    def timer(choice: Choice) -> Callable[[], float]:
        try:
            if isinstance(choice, KernelConfig):
                return sampler.timer(sampler.with_config(choice))
            return sampler.timer(sampler.into(choice, torch_mm), TORCH_TOLERANCES)
        except WrongError as error:
            message = f"{case}: {choice if isinstance(choice, KernelConfig) else 'torch'} is {error}"
            raise (WrongError if isinstance(choice, KernelConfig) else RuntimeError)(message) from error

    return lambda choice: timer(choice)()


def _entry(case: Case, medians: dict[Choice, float], default: KernelConfig) -> Entry:
    times = {choice: round(us, 3) for choice, us in medians.items()}
    fastest = next(choice for choice in times if isinstance(choice, KernelConfig))
    torch_us = {outs: times[outs] for outs in OUTS if outs in times}
    config = {each.name: getattr(fastest, each.name) for each in fields(fastest)}
    config = {each.name: config[each.name] for each in fields(fastest) if config[each.name] != each.default}
    return {
        "m": case.m,
        "shape": [*case.shape],
        "formats": [str(format) for format in case.formats],
        "config": config,
        "torch_for": [outs for outs, us in torch_us.items() if us < TORCH_MARGIN * times[fastest]],
        "kernel": str(fastest),
        "us": times[fastest],
        "default_us": times[default],
        "torch_us": torch_us,
    }


def search(
    choices: Sequence[Choice], always: int, sample: Callable[[Choice], float], deadline: float
) -> tuple[dict[Choice, float], list[Choice]]:
    """Median microseconds of the fastest choices, fastest first, and all choices tried.

    Samples each choice FIRST_ROUNDS times until the deadline, then the finalists LAST_ROUNDS times in turn, so that a
    change of clocks affects all of them. Drops choices that the GPU or torch cannot run. The first choice is sampled
    even after the deadline. The first `always` choices are finalists if they run.

    Raises:
        WrongError: from `sample`.
        RuntimeError: the first choice cannot run.
    """
    samples: dict[Choice, list[float]] = {}
    failed: list[Choice] = []

    def measure(choice: Choice, rounds: int) -> None:
        try:
            if choice not in failed:
                samples.setdefault(choice, []).extend(sample(choice) for _ in range(rounds))
        except (RuntimeError, TritonError) as error:  # torch raises RuntimeError for what it does not support
            if choice == choices[0]:
                after = f", after {failed[-1]} failed" if failed else ""  # which may have broken the GPU's context
                raise RuntimeError(f"{choice} cannot be measured{after}: {error}") from error
            failed.append(choice)

    def median(choice: Choice) -> float:
        return statistics.median(samples[choice][-LAST_ROUNDS:])

    for choice in choices:
        if samples and monotonic() >= deadline:
            break
        measure(choice, FIRST_ROUNDS)
    left = [choice for choice in samples if choice not in failed]
    ranked = sorted((choice for choice in left if choice not in choices[:always]), key=median)
    finalists = [choice for choice in left if choice not in ranked[FINALISTS:]]
    for _ in range(LAST_ROUNDS):
        for choice in finalists:
            measure(choice, 1)
    medians = {choice: median(choice) for choice in finalists if choice not in failed}
    return dict(sorted(medians.items(), key=lambda item: item[1])), list(samples)


def compile_all(target: Target, kernels: Sequence[Kernel], seconds: float) -> Iterator[Kernel]:
    """Compiles into Triton's cache on all cores until time is up; yields each kernel that compiled."""
    # Not fork, which would copy a process that has a CUDA context.
    context, quiet = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), context, signal.signal, quiet)
    futures = {pool.submit(_compile_one, target, *kernel): kernel for kernel in kernels}
    try:
        for future in as_completed(futures, timeout=seconds):
            error = future.exception()
            if isinstance(error, BrokenExecutor):
                raise RuntimeError("a compiling process was killed, out of memory? Try `taskset -c 0-3`") from error
            if error is None:
                yield futures[future]
    except TimeoutError:
        pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _compile_one(target: Target, config: KernelConfig, *arguments: Any) -> None:
    warm_up(target, config, signature(*arguments))


def read_entries(path: Path, gpu: str) -> tuple[list[Entry], dict[Case, KernelConfig]]:
    """The entries of a table of this GPU and these versions, or the configs of one of this GPU and other versions.

    Nothing if there is no file.

    Raises:
        ValueError: the file is something else.
        OSError: it cannot be read.
    """
    if not path.exists():
        return [], {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if (found := (table["schema"], table["gpu"])) != (TABLE_SCHEMA, gpu):
            raise ValueError(f"expected schema and GPU {(TABLE_SCHEMA, gpu)}, found {found}")
        entries = merged([], table["entries"])
        if table["versions"] == versions():
            return entries, {}
        return [], {_case_of(entry): KernelConfig(**entry["config"]) for entry in entries}
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be extended: {error!r}") from error


def _case_of(entry: Entry) -> Case:
    return Case(entry["m"], tuple(entry["shape"]), tuple(map(Format, entry["formats"])))


def merged(old: Iterable[Entry], new: Iterable[Entry]) -> list[Entry]:
    """One entry per case: the new one, unless more kernels were tried for the old one."""
    result: dict[Case, Entry] = {}
    for entry in (*old, *new):
        case = _case_of(entry)
        result[case] = max(entry, result.get(case, entry), key=lambda each: int(each["tried"]))
    return list(result.values())


def write_table(path: Path, gpu: str, entries: Iterable[Entry]) -> None:
    """Writes a table for `kernels.dispatch`, one entry per line. A failed write leaves the old file."""
    head = {"schema": TABLE_SCHEMA, "gpu": gpu, "versions": versions(), "date": date.today().isoformat()}
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(f'{json.dumps(head)[:-1]}, "entries": [\n{lines}\n]}}\n', encoding="utf-8")
    temporary.replace(path)
