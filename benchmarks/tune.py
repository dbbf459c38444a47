"""Measures which kernel is fastest on this GPU, and keeps the table that dispatch reads."""

import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, TimeoutError, as_completed
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from datetime import date
from itertools import chain, product, zip_longest
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import torch
from triton import next_power_of_2
from triton.errors import TritonError

from ..kernels import KernelConfig, Target, choose
from ..kernels.dispatch import MAX_SPLIT_K, OUTS, TABLE_SCHEMA, Case, cdiv, prefill_tiles, versions
from ..kernels.formats import Format
from ..kernels.launch import KERNELS, Signature
from ..kernels.target import target_of
from .compiled import warm_up
from .estimate import estimate
from .gpu import Choice, Sampler, Timer, WrongError, in_turn

MS = tuple(2**power for power in range(15))
FINALISTS, FIRST_ROUNDS, LAST_ROUNDS = 3, 3, 9
TORCH_MARGIN = 0.98  # cuBLAS rounds differently from the kernels, so it has to be faster by more than two percent
PER_REGIME = 7  # candidates

Entry = dict[str, Any]  # of a table, as it stands in the JSON file
Entries = dict[Case, Entry]


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
        most = math.inf if config.regime == "prefill" and config.split_k == 1 else 4 * one_wave
        return has_work and config.split_k <= MAX_SPLIT_K and one_wave / 4 <= programs <= most

    useful = sorted(filter(is_useful, configs), key=lambda config: estimate((m, shape, formats), config, target))
    ranked = [[config for config in useful if config.regime == regime][:PER_REGIME] for regime in KERNELS]
    with_pdl = [replace(default, pdl=True)] if target.is_cuda(90) and default.regime != "prefill" else []
    alternating = chain.from_iterable(zip_longest(*ranked))
    return list(dict.fromkeys([default, *with_pdl, *filter(None, alternating)]))


def tune(
    cases: Sequence[Case], device: torch.device, seconds: float, known: Mapping[Case, KernelConfig]
) -> Iterator[tuple[str, Entry | None]]:
    """Yields what has been done, and one entry per case. If time runs out, later candidates are skipped.

    Up to half of the time goes into compiling all kernels on all cores, likely winners first; the rest into measuring
    those that compiled, with an equal share per case. Known configs are tried first after the default.
    Raises WrongError if a kernel is wrong, and RuntimeError if the default kernel fails or compilation runs out of
    memory.
    """
    target, start = target_of(device), monotonic()
    configs: dict[Case, list[KernelConfig]] = {}
    for case in cases:
        default, *others = candidates(*case, target)
        configs[case] = list(dict.fromkeys([default, known.get(case, default), *others]))
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
        # For other formats torch would need a second, bf16 copy of the weights, and for three outputs a GEMM each.
        by_torch = list(OUTS) if case[2] == (Format.BF16, Format.BF16) else []
        timer = Sampler(*case, device).timer
        us, tried = search(case, [default, *by_torch, *ready], 1 + len(by_torch), timer, deadline)
        counts = {"tried": tried - len(by_torch), "candidates": len(configs[case])}
        yield f"measured {number} of {len(cases)}", entry_of(case, us, default) | counts


def search(
    case: Case, choices: Sequence[Choice], always: int, timer: Callable[[Choice], Timer], deadline: float
) -> tuple[dict[Choice, float], int]:
    """Median microseconds of the fastest choices, fastest first, and how many were tried.

    Prepares choices until the deadline, but at least the first `always`; drops those that the GPU or torch cannot run.
    Times the rest in alternation, then again the finalists: the first `always` and the FINALISTS fastest.
    Raises WrongError if a kernel is wrong, and RuntimeError if the first choice cannot run.
    """
    ready: dict[Choice, Timer] = {}
    for tried, choice in enumerate(choices, 1):
        try:
            ready[choice] = timer(choice)
        except (RuntimeError, TritonError) as error:  # torch raises RuntimeError for what it does not support
            kind = WrongError if isinstance(error, WrongError) and isinstance(choice, KernelConfig) else RuntimeError
            if choice == choices[0] or kind == WrongError:
                raise kind(f"{label(case)}: {choice}: {error}") from error
        if tried >= always and monotonic() >= deadline:
            break
    first = {choice: median(us) for choice, us in in_turn(ready, FIRST_ROUNDS).items()}
    ranked = sorted((choice for choice in ready if choice not in choices[:always]), key=first.__getitem__)
    finalists = {choice: ready[choice] for choice in ready if choice not in ranked[FINALISTS:]}
    last = {choice: round(median(us), 3) for choice, us in in_turn(finalists, LAST_ROUNDS).items()}
    return dict(sorted(last.items(), key=lambda item: item[1])), tried


def entry_of(case: Case, us: dict[Choice, float], default: KernelConfig) -> Entry:
    """us: medians, fastest first."""
    (m, shape, formats), torch_us = case, {outs: us[outs] for outs in OUTS if outs in us}
    fastest = next(choice for choice in us if isinstance(choice, KernelConfig))
    return {
        "m": m, "shape": [*shape], "formats": [str(format) for format in formats], "config": asdict(fastest),
        "torch_for": [outs for outs in torch_us if torch_us[outs] < TORCH_MARGIN * us[fastest]],
        "us": us[fastest], "default_us": us[default], "torch_us": torch_us,
    }  # fmt: skip


def label(case: Case) -> str:
    return f"M = {case[0]}, {case[1]}, {', '.join(map(str, case[2]))}"


def summary(entry: Entry) -> str:
    """One line, in microseconds."""
    us = {str(KernelConfig(**entry["config"])): entry["us"], "default": entry["default_us"]}
    for outs, time in entry["torch_us"].items():
        us[f"torch.mm {outs}{' (chosen)' * (outs in entry['torch_for'])}"] = time
    times = "; ".join(f"{name} {value:.2f}" for name, value in us.items())
    return f"{label(case_of(entry))}, us: {times}; tried {entry['tried']} of {entry['candidates']}"


def compile_all(target: Target, kernels: Sequence[Any], seconds: float) -> Iterator[Any]:
    """Compiles into Triton's cache on all cores until time is up; yields each kernel that compiled.

    kernels: tuples of a KernelConfig and the arguments of `Signature.of`.
    """
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
    warm_up(target, config, Signature.of(*arguments))


def read_tuned(path: Path, gpu: str) -> tuple[Entries, bool]:
    """The entries of a table, and whether they are of these versions; of others, those that this one can read.

    Raises OSError or ValueError for a file that is no table of this GPU.
    """
    if not path.exists():
        return {}, True
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if (found := (table["schema"], table["gpu"])) != (TABLE_SCHEMA, gpu):
            raise ValueError(f"expected schema and GPU {(TABLE_SCHEMA, gpu)}, found {found}")
        is_own, entries = table["versions"] == versions(), {}
        for entry in table["entries"]:
            # Other versions may have fields and formats that are unknown here.
            with nullcontext() if is_own else suppress(ValueError, LookupError, TypeError, AttributeError):
                entries[case_of(entry)] = entry
        return entries, is_own
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be extended; move it away: {error!r}") from error


def case_of(entry: Entry) -> Case:
    KernelConfig(**entry["config"])  # raises if it is none
    return entry["m"], tuple(entry["shape"]), tuple(map(Format, entry["formats"]))


def write_tuned(path: Path, gpu: str, entries: Entries) -> None:
    """Writes a table for `kernels.dispatch`. A failed write leaves the old file."""
    head = {"schema": TABLE_SCHEMA, "gpu": gpu, "versions": versions(), "date": date.today().isoformat()}
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(head | {"entries": list(entries.values())}, indent=1), encoding="utf-8")
    temporary.replace(path)
