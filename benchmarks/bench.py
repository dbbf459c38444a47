"""What `indexproj bench` measures on a GPU: contenders in turn on the same weights, A/B, and ncu's counters.

A result is a dict, and a line of JSON in a results file. Its keys:
    suite: "projection", "A/B", "ceilings", "counters", "host" or "loading".
    shape, pair, m: the case, in suites that have some. Three matrices have three formats in "pair".
    contender, how: what was measured, and where: "device", "eager" (launches from Python included) or "cpu".
    us: microseconds per call, one value per round. Contenders of a case take turns.
    bytes: what a call reads and writes at least, if known.
    error: in place of "us". wrong: whether it is a wrong result.
The first and last line of a run name GPU, clocks, versions, tuned table and date.
"""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ..kernels.dispatch import TABLE_VARIABLE, out_dtypes, table_of, versions
from ..kernels.formats import Format, parse_pair
from . import gpu
from .estimate import nbytes
from .gpu import TOLERANCES, TORCH_TOLERANCES, Call, Choice, Contender, Matrices, Sampler, Timer, Tolerances, WrongError

Result = dict[str, Any]
Maker = Callable[["Case", str], Timer]
MS = (1, 16, 64, 8192, 4, 256, 1024, 2, 8, 32, 128, 4096, 16384)  # most informative first
SERVER = ("-m", "indexproj.benchmarks.bench")
# Bytes through memory and L2, pipes and stalls, of the first launch of ours.
NCU = "ncu --csv --print-units base --kernel-name regex:^(gemv|split_k|prefill)_kernel$ --launch-count 1"
NCU += " --section SpeedOfLight --section ComputeWorkloadAnalysis --section WarpStateStats"
NCU += " --metrics dram__bytes.sum,lts__t_bytes.sum"


class Case(NamedTuple):
    """A key of SHAPES, a pair of formats that fits it, and rows of x."""

    shape: str
    pair: str
    m: int


def by_torch(multiply: Callable[..., Tensor], x: Tensor, matrices: Matrices) -> Call:
    """One GEMM of weights that were upcast to bf16 and fused at load, as in vLLM."""
    fused, ns = torch.cat([matrix.dequantize(torch.bfloat16) for matrix in matrices]), rows(matrices)
    return lambda: torch.split(multiply(x, fused), ns, 1)


@lru_cache(maxsize=2)  # x, which all copies of the weights share, and one copy
def to_e4m3(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes, and fp32 scales of each row."""
    scales = matrix.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 448
    return (matrix / scales).to(torch.float8_e4m3fn), scales


def scaled_mm(x: Tensor, matrices: Matrices) -> Call:
    """One GEMM in e4m3 with a scale per row. Quantizing x is not timed."""
    (a, s), (b, t) = to_e4m3(x), to_e4m3(torch.cat([matrix.dequantize() for matrix in matrices]))
    multiply, ns = partial(torch._scaled_mm, a, b.T, s, t.T, out_dtype=torch.bfloat16), rows(matrices)
    return lambda: torch.split(multiply(), ns, 1)


def rows(matrices: Matrices) -> list[int]:
    return [matrix.shape[0] for matrix in matrices]


# Against fp64 with the values on disk: these round weights at load, and scaled_mm also rounds x.
UPCAST = {torch.float32: 2**-6, torch.bfloat16: 2**-6}
CONTENDERS: dict[str, tuple[Contender, Tolerances]] = {
    "indexproj": (lambda x, ms: partial(project_all, x, ms, dtypes=out_dtypes("fp32", len(ms))), TOLERANCES),
    "indexproj, bf16": (lambda x, ms: partial(project_all, x, ms, out=x.new_empty(len(x), sum(rows(ms)))), TOLERANCES),
    "torch linear": (partial(by_torch, linear), UPCAST),
    "torch mm, fp32": (partial(by_torch, lambda x, fused: torch.mm(x, fused.T, out_dtype=torch.float32)), UPCAST),
    "torch _scaled_mm": (scaled_mm, {torch.bfloat16: 0.1}),
}
sampler_of = lru_cache(maxsize=1)(Sampler)


def contender_of(name: str) -> tuple[Choice, Tolerances]:
    """name: a key of CONTENDERS, or a KernelConfig in JSON. Raises ValueError or TypeError if it is neither."""
    return CONTENDERS[name] if name in CONTENDERS else (KernelConfig(**json.loads(name)), TOLERANCES)


def timer(contender: str, case: Case, how: str) -> Timer:
    """Raises what `contender_of` and `Sampler.timer` raise."""
    formats, (choice, tolerances) = parse_pair(case.pair), contender_of(contender)
    if formats == (Format.BF16, Format.BF16) and contender.startswith("indexproj"):  # a table may choose torch.mm
        tolerances = tolerances | {torch.float32: TORCH_TOLERANCES[torch.float32]}
    return sampler_of(case.m, SHAPES[case.shape], formats, gpu.current_gpu()).timer(choice, tolerances, how)


class Side:
    """A process that measures a KernelConfig or another Python's `project_all`. Raises OSError or ValueError."""

    def __init__(self, label: str, text: str) -> None:
        self.name, self.is_config = f"{label}: {text}", text.startswith("{")
        self._contender, command = (text, [sys.executable]) if self.is_config else ("indexproj", shlex.split(text))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
        self._process = subprocess.Popen([*command, *SERVER], **pipes)  # type: ignore[call-overload]

    def timer(self, case: Case, how: str) -> Timer:
        """Raises what `ask` raises, and so does the timer."""
        ask = partial(self.ask, case, how)
        ask()  # compiles and checks
        return ask

    def end(self) -> None:
        """Ends the process and those that it has started, and drops what they have said."""
        os.killpg(self._process.pid, signal.SIGKILL)  # nothing waits for it, so the id stays its own
        self._process.stdout.close()

    def ask(self, case: Case | None = None, how: str | None = None) -> Any:
        """Microseconds, or `software`. Raises RuntimeError or WrongError; ends a process that answers anything else."""
        line = ""
        try:
            print(json.dumps([self._contender, case, how]), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
            answer = json.loads(line)
            if "error" not in answer:
                return answer["answer"]
            kind, text = WrongError if answer["wrong"] else RuntimeError, answer["error"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            self.end()
            found = f"output {line.strip()!r}" if line else "that the process ended"
            expected = "a Python that has indexproj and prints nothing else"
            raise RuntimeError(f"{self.name}: expected {expected}, found {found}") from error
        raise kind(f"{self.name}: {text}")


def serve() -> None:
    """The process of a Side: answers each line of stdin with a measurement or, if it names no case, `software`."""
    cached = lru_cache(maxsize=1)(timer)
    for line in sys.stdin:
        contender, case, how = json.loads(line)
        try:
            contender_of(contender)
            answer: Result = {"answer": cached(contender, Case(*case), how)() if case else software()}
        except (RuntimeError, TritonError, ValueError, TypeError, LookupError) as error:
            answer = failure(error)
        print(json.dumps(answer), flush=True)


def failure(error: Exception) -> Result:
    text = repr(error) if isinstance(error, LookupError) else str(error)
    return {"error": text.strip().partition("\n")[0], "wrong": isinstance(error, WrongError)}


def software() -> dict[str, str]:
    """Versions, and the tuned table that launches use."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    tuned = {TABLE_VARIABLE: os.environ.get(TABLE_VARIABLE, "default"), "tuned cases": str(len(table_of(device)))}
    return versions() | tuned


def measure(suite: str, case: Case, makers: Mapping[str, Maker], hows: Iterable[str]) -> Iterator[Result]:
    """Times on the GPU and from Python of what can run, and errors of what cannot."""
    *ns, k = SHAPES[case.shape]
    read = nbytes(SHAPES[case.shape], parse_pair(case.pair)) + 2 * case.m * k
    for how in hows:
        ready, head = {}, {"suite": suite, **case._asdict(), "how": how}
        for name, make in makers.items():
            try:
                ready[name] = make(case, how)
            except (RuntimeError, TritonError) as error:
                yield head | {"contender": name} | failure(error)
        for name, us in gpu.in_turn(ready).items():
            dtypes = out_dtypes("bf16" if name == "indexproj, bf16" else "fp32", len(ns))
            written = case.m * sum(n * dtype.itemsize for n, dtype in zip(ns, dtypes, strict=True))
            yield head | {"contender": name, "us": us} | ({} if name.startswith("torch") else {"bytes": read + written})


def counters(case: Case) -> Result:
    """What ncu counts, or an error if it counts nothing. Raises OSError if ncu is not installed."""
    command, request = [*NCU.split(), sys.executable, *SERVER], json.dumps(["indexproj", case, "eager"])
    done = subprocess.run(command, input=request, capture_output=True, text=True, check=False)
    rows = csv.DictReader(dropwhile(lambda line: not line.startswith('"ID"'), done.stdout.splitlines()))
    named = (row for row in rows if row["Metric Name"])  # the others are advice
    found = {row["Metric Name"]: f"{row['Metric Value']} {row['Metric Unit']}".strip() for row in named}
    error = {"error": f"ncu: {(done.stdout + done.stderr).strip().rpartition(chr(10))[2]}", "wrong": False}
    head = {"suite": "counters", **case._asdict(), "contender": "indexproj", "how": "device"}
    return head | ({"counters": found} if found else error)


def machine() -> Result:
    return {"machine": gpu.description(), "versions": software(), "date": datetime.now().isoformat(" ", "minutes")}


def run(
    cases: Iterable[Case], contenders: Sequence[str], ab: Sequence[str], seconds: float, with_counters: bool
) -> Iterator[Result]:
    """Results of ceilings, then of case after case until time is up. ab: two sides to compare, in place of contenders.

    Raises OSError, ValueError or RuntimeError if the GPU is not supported, or a side does not run, or ncu is missing.
    """
    end, sides = monotonic() + seconds, []
    try:
        for label, text in zip("AB", ab, strict=False):
            sides.append(Side(label, text))
        yield machine() | {f"versions of {side.name}": side.ask() for side in sides}
        for name, size, sample in gpu.ceilings(gpu.current_gpu()):
            us = gpu.in_turn({name: sample})[name]
            yield {"suite": "ceilings", "contender": name, "how": "device", "us": us, "bytes": size}
        makers = {side.name: side.timer for side in sides} or {name: partial(timer, name) for name in contenders}
        # From Python, a config is a bare `launch`, and a command's side is `project_all`.
        hows = ("device",) if any(side.is_config for side in sides) else ("device", "eager")
        for case in cases:
            if monotonic() >= end:
                break
            yield from measure("A/B" if sides else "projection", case, makers, hows)
            if with_counters:
                yield counters(case)
        yield machine()
    finally:
        for side in sides:
            side.end()


if __name__ == "__main__":
    serve()
