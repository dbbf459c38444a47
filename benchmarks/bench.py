"""What `indexproj bench` measures on a GPU: contenders in turn on the same weights, A/B, and ncu's counters.

A result is a dict, and a line of JSON in a results file. Its keys:
    suite: "projection", "A/B", "ceilings", "counters", "host" or "loading".
    shape, pair, m: the case; the "pair" of a shape of three matrices has three formats, in suites that have some.
    contender, how: what was measured, and where: "device", "eager" (launches from Python included) or "cpu".
    us: microseconds per call, one value per round. Contenders of a case take turns.
    bytes: what a call reads and writes at least, if known.
    error: in place of "us". wrong: whether it is a wrong result.
The first and last line of a run name GPU, clocks, versions and date.
"""

import csv
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from itertools import dropwhile
from time import monotonic
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from triton.errors import TritonError

from ..indexer.models import SHAPES
from ..kernels import KernelConfig, project_all
from ..kernels.dispatch import out_dtypes, versions
from ..kernels.formats import parse_pair
from . import gpu
from .estimate import nbytes
from .gpu import TOLERANCES, TORCH_TOLERANCES, Call, Contender, Matrices, Sampler, Timer, Tolerances, WrongError

Result = dict[str, Any]
MS = (1, 16, 64, 8192, 4, 256, 1024, 2, 8, 32, 128, 4096, 16384)  # most telling first
ROUNDS = 15
SERVER = ("-m", "indexproj.benchmarks.bench")
# Bytes through memory and L2, pipes and stalls, of the first launch of ours.
NCU = "ncu --csv --print-units base --kernel-name regex:^(gemv|split_k|prefill)_kernel$ --launch-count 1"
NCU += " --section SpeedOfLight --section ComputeWorkloadAnalysis --section WarpStateStats"
NCU += " --metrics dram__bytes.sum,lts__t_bytes.sum"


class Case(NamedTuple):
    """A key of SHAPES, a pair of PAIRS that fits it, and rows of x."""

    shape: str
    pair: str
    m: int


def ours(x: Tensor, matrices: Matrices) -> Call:
    dtypes = out_dtypes("fp32", len(matrices))
    return lambda: project_all(x, matrices, dtypes=dtypes)


def into_one(x: Tensor, matrices: Matrices) -> Call:
    out = x.new_empty(len(x), sum(matrix.shape[0] for matrix in matrices))
    return lambda: project_all(x, matrices, out=out)


def by_torch(multiply: Callable[..., Tensor], x: Tensor, matrices: Matrices) -> Call:
    """One GEMM of weights that were upcast to bf16 and fused at load, as in vLLM."""
    fused, ns = torch.cat([m.dequantize(torch.bfloat16) for m in matrices]), [m.shape[0] for m in matrices]
    return lambda: torch.split(multiply(x, fused), ns, 1)


def scaled_mm(x: Tensor, matrices: Matrices) -> Call:
    """One GEMM in e4m3 with a scale per row. Quantizing x is not timed."""
    factors = []
    for matrix in (x.float(), torch.cat([matrix.dequantize() for matrix in matrices])):
        scale = matrix.abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
        factors.append(((matrix / scale).to(torch.float8_e4m3fn), scale))
    (a, scale_a), (b, scale_b) = factors
    multiply = partial(torch._scaled_mm, a, b.T, scale_a, scale_b.T, out_dtype=torch.bfloat16)
    return lambda: torch.split(multiply(), [matrix.shape[0] for matrix in matrices], 1)


OURS = TOLERANCES | {torch.float32: TORCH_TOLERANCES[torch.float32]}  # a table may choose torch.mm
# Against fp64 with the values on disk: these round weights at load, and scaled_mm also rounds x.
UPCAST = {torch.float32: 2**-6, torch.bfloat16: 2**-6}
CONTENDERS: dict[str, tuple[Contender, Tolerances]] = {
    "indexproj": (ours, OURS),
    "indexproj, bf16": (into_one, OURS),
    "torch linear": (partial(by_torch, linear), UPCAST),
    "torch mm, fp32": (partial(by_torch, lambda x, fused: torch.mm(x, fused.T, out_dtype=torch.float32)), UPCAST),
    "torch _scaled_mm": (scaled_mm, {torch.bfloat16: 0.1}),
}
sampler_of = lru_cache(maxsize=1)(Sampler)


def timer(contender: str, case: Case, how: str) -> Timer:
    """contender is a key of CONTENDERS or a KernelConfig in JSON. Raises what `Sampler.timer` raises."""
    sampler = sampler_of(case.m, SHAPES[case.shape], parse_pair(case.pair), gpu.current_gpu())
    if contender in CONTENDERS:
        return sampler.timer(*CONTENDERS[contender], how)
    return sampler.timer(sampler.with_config(KernelConfig(**json.loads(contender))), how=how)


class Side:
    """One side of an A/B: a process that measures a KernelConfig, or another Python's `project`.

    Raises OSError, ValueError or RuntimeError if it does not start, and what `timer` raises in it.
    """

    def __init__(self, label: str, text: str) -> None:
        self.name, self._contender, command = f"{label}: {text}", "indexproj", shlex.split(text)
        if text.startswith("{"):
            self._contender, command = text, [sys.executable]
            try:
                KernelConfig(**json.loads(text))
            except (ValueError, TypeError) as error:
                raise ValueError(f"--ab: expected the fields of a KernelConfig, got {text}: {error}") from error
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self.process = subprocess.Popen([*command, *SERVER], **options)  # type: ignore[call-overload]
        self.versions = self._ask(None)

    def timer(self, case: Case, how: str) -> Timer:
        ask = partial(self._ask, [self._contender, case, how])
        ask()  # compiles and checks
        return ask

    def _ask(self, request: Any) -> Any:
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline() or '{"error": "the process ended", "wrong": false}')
        if "error" in answer:
            raise (WrongError if answer["wrong"] else RuntimeError)(f"{self.name}: {answer['error']}")
        return answer["answer"]


def serve() -> None:
    """The process of a Side: answers each line of stdin, null with versions and others with a measurement."""
    cached = lru_cache(maxsize=2)(timer)
    for line in sys.stdin:
        try:
            contender, case, how = json.loads(line) or (None, None, None)
            answer: Result = {"answer": cached(contender, Case(*case), how)() if case else versions()}
        except (WrongError, RuntimeError, TritonError) as error:
            answer = {"error": str(error), "wrong": isinstance(error, WrongError)}
        print(json.dumps(answer), flush=True)


def in_turn(timers: Mapping[str, Timer]) -> dict[str, list[float]]:
    """Microseconds of each round, after one that does not count. A change of clocks affects all timers alike."""
    rounds = [[round(timer(), 4) for timer in timers.values()] for _ in range(ROUNDS + 1)]
    return dict(zip(timers, map(list, zip(*rounds[1:], strict=True)), strict=False))


def measure(suite: str, case: Case, makers: Mapping[str, Callable[[Case, str], Timer]]) -> Iterator[Result]:
    """Times on the GPU and from Python of what can run, and errors of what cannot."""
    (*ns, k), formats = SHAPES[case.shape], parse_pair(case.pair)
    read = sum(nbytes(format, n, k) for format, n in zip(formats, ns, strict=True)) + 2 * case.m * k
    for how in ("device", "eager"):
        ready, head = {}, {"suite": suite, **case._asdict(), "how": how}
        for name, make in makers.items():
            try:
                ready[name] = make(case, how)
            except (WrongError, RuntimeError, TritonError) as error:
                text, wrong = str(error).strip().partition("\n")[0], isinstance(error, WrongError)
                yield head | {"contender": name, "error": text, "wrong": wrong}
        for name, us in in_turn(ready).items():
            dtypes = out_dtypes("bf16" if "bf16" in name else "fp32", len(ns))
            written = case.m * sum(n * dtype.itemsize for n, dtype in zip(ns, dtypes, strict=True))
            yield head | {"contender": name, "us": us} | ({} if name.startswith("torch") else {"bytes": read + written})


def counters(case: Case) -> Result:
    """What ncu counts. Raises RuntimeError if it counts nothing, OSError if it is not installed."""
    command, request = [*NCU.split(), sys.executable, *SERVER], json.dumps(["indexproj", case, "eager"])
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    rows = csv.DictReader(dropwhile(lambda line: not line.startswith('"ID"'), done.stdout.splitlines()))
    named = (row for row in rows if row["Metric Name"])  # the others are advice
    found = {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip() for row in named}
    if not found:
        raise RuntimeError(f"ncu: {(done.stdout + done.stderr).strip().rpartition(chr(10))[2]}")
    return {"suite": "counters", **case._asdict(), "contender": "indexproj", "how": "device", "counters": found}


def machine() -> Result:
    return {"machine": gpu.description(), "versions": versions(), "date": datetime.now().isoformat(" ", "minutes")}


def run(
    cases: Iterable[Case], contenders: Sequence[str], ab: Sequence[str], seconds: float, with_counters: bool
) -> Iterator[Result]:
    """Results of ceilings, then of case after case until time is up. ab: two sides to compare, in place of contenders.

    Raises OSError, ValueError or RuntimeError: the GPU is not supported, or a side or ncu does not run.
    """
    end, device = monotonic() + seconds, gpu.current_gpu()
    sides = list(map(Side, "AB", ab))
    try:
        yield machine() | {f"versions of {side.name}": side.versions for side in sides}
        for name, size, sample in gpu.ceilings(device):
            us = in_turn({name: sample})[name]
            yield {"suite": "ceilings", "contender": name, "how": "device", "us": us, "bytes": size}
        makers: dict[str, Callable[[Case, str], Timer]] = {side.name: side.timer for side in sides}
        makers = makers or {name: partial(timer, name) for name in contenders}
        for case in cases:
            if monotonic() >= end:
                break
            yield from measure("A/B" if sides else "projection", case, makers)
            if with_counters:
                yield counters(case)
        yield machine()
    finally:
        for side in sides:
            side.process.kill()


if __name__ == "__main__":
    serve()
