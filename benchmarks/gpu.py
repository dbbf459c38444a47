"""Timing on a GPU: calls in a graph or from Python, with weights that are not in L2, after checking their results."""

import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indexer.cli.synthetic import random_matrix
from ..kernels import KernelConfig, Matrix
from ..kernels.dispatch import out_dtypes
from ..kernels.formats import Format, Operands
from ..kernels.launch import Signature, launch, torch_mm
from ..kernels.target import INTERPRETED, target_of
from ..kernels.workspace import recycled_counters

Matrices = tuple[Matrix, ...]
Call = Callable[[], Sequence[Tensor]]
Timer = Callable[[], float]  # measures once, in microseconds
# Takes x [M, K] bf16 and matrices, and returns a call that computes the outputs. Preparing the weights is not timed.
Contender = Callable[[Tensor, Matrices], Call]
# A contender, a kernel with an fp32 gate, or torch.mm with the output dtypes of that key of OUTS.
Choice = Contender | KernelConfig | str
Tolerances = dict[torch.dtype, float]  # largest error relative to the largest output
# Calls per measurement, at least: enough to hide the microseconds that starting one takes.
CALLS, ROUNDS = 64, 15
# Against fp64. torch accumulates inside the tensor core, which truncates in each of 448 steps over K = 7168, and may
# reduce parts of K in bf16.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
TORCH_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-6}


class WrongError(RuntimeError):
    """A result differs from the reference."""


def current_gpu() -> torch.device:
    """Raises RuntimeError if there is none, or one that the kernels do not support."""
    if INTERPRETED or not torch.cuda.is_available():
        raise RuntimeError(f"needs a GPU, but {'TRITON_INTERPRET=1 is set' if INTERPRETED else 'there is none'}")
    device = torch.device("cuda", torch.cuda.current_device())
    target_of(device)
    return device


@lru_cache(maxsize=2)
def weight_copies(shape: tuple[int, ...], formats: tuple[Format, ...], device: torch.device) -> list[Matrices]:
    """Random weights and copies that no cache holds; if all are BF16, slices of one tensor each.

    They take more than twice the L2 cache, on AMD more than 512 MB: MI300 also caches 256 MB of memory, which torch
    does not report.
    """
    *ns, k = shape
    torch.manual_seed(0)
    weights = tuple(random_matrix(format, n, k) for format, n in zip(formats, ns, strict=True))
    cached = 2**28 if torch.version.hip else torch.cuda.get_device_properties(device).L2_cache_size
    count = 1 + -(-2 * cached // sum(matrix.nbytes for matrix in weights))
    if set(formats) != {Format.BF16}:
        return [tuple(m.map(lambda tensor: tensor.to(device, copy=True)) for m in weights) for _ in range(count)]
    fused = torch.cat([matrix.dequantize(torch.bfloat16) for matrix in weights])
    copies = (torch.split(fused.to(device, copy=True), ns) for _ in range(count))
    return [tuple(Matrix(Format.BF16, weight) for weight in copy) for copy in copies]


def timer(calls: Sequence[Callable[[], object]], how: str = "device") -> Timer:
    """Times the calls, repeated until there are at least CALLS: in a CUDA graph, or from Python if how is "eager"."""
    repeated = [*calls] * -(-CALLS // len(calls))

    def run() -> None:
        for call in repeated:
            call()

    run()
    graph = None if how == "eager" else torch.cuda.CUDAGraph()
    if graph is not None:
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            run()

    def microseconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        run() if graph is None else graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / len(repeated)

    return microseconds


def in_turn(timers: Mapping[Any, Timer], rounds: int = ROUNDS) -> dict[Any, list[float]]:
    """Microseconds of each round, after one that does not count. A change of clocks affects all timers alike."""
    found = [[round(timer(), 4) for timer in timers.values()] for _ in range(rounds + 1)]
    return dict(zip(timers, map(list, zip(*found[1:], strict=True)), strict=False))


class Sampler:
    """Times contenders on m rows of random x. Its graphs share counters, so they must not run side by side."""

    def __init__(self, m: int, shape: tuple[int, ...], formats: tuple[Format, ...], device: torch.device) -> None:
        self._weights = weight_copies(shape, formats, device)
        self._signature = Signature.of(shape, formats, device=device)
        self._x = torch.randn(m, shape[-1], device=device).bfloat16()
        self._exact = [self._x.double() @ matrix.dequantize(torch.float64).T for matrix in self._weights[0]]

    def timer(self, choice: Choice, tolerances: Tolerances = TOLERANCES, how: str = "device") -> Timer:
        """Raises WrongError if outputs are off by more than the tolerance for their dtype.

        And RuntimeError if the GPU or torch cannot run the choice.
        """
        if isinstance(choice, KernelConfig):
            choice = _into(self._outs("fp32"), partial(launch, signature=self._signature, config=choice))
        elif isinstance(choice, str):
            choice, tolerances = _into(self._outs(choice), torch_mm), TORCH_TOLERANCES
        calls = [choice(self._x, weights) for weights in self._weights]
        for output, exact in zip(calls[0](), self._exact, strict=True):
            error = ((output.double() - exact).abs().max() / exact.abs().max()).item()
            if not error <= tolerances[output.dtype]:
                raise WrongError(f"off by {error:.1e} of the largest output")
        with recycled_counters(self._x.device):
            return timer(calls, how)

    def _outs(self, outs: str) -> list[Tensor]:
        """Outputs of NaN, in one tensor if their dtypes are equal; outs is a key of OUTS."""
        ns, m = list(self._signature.ns), len(self._x)
        dtypes = out_dtypes(outs, len(ns))
        found = [self._x.new_full((m, n), torch.nan, dtype=dtype) for n, dtype in zip(ns, dtypes, strict=True)]
        return found if len(set(dtypes)) > 1 else [*torch.split(torch.cat(found, 1), ns, 1)]


def _into(outs: list[Tensor], run: Callable[[Tensor, Sequence[Operands], Sequence[Tensor]], object]) -> Contender:
    def call(x: Tensor, operands: Sequence[Operands]) -> Sequence[Tensor]:
        run(x, operands, outs)
        return outs

    return lambda x, matrices: partial(call, x, tuple(matrix.operands for matrix in matrices))


@triton.jit
def empty_kernel():  # type: ignore[no-untyped-def]
    pass


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(x_ptr, out_ptr, BLOCKS, REPEATS, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each program sums REPEATS blocks of x [BLOCKS * BLOCK] fp32, past L1."""
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in range(REPEATS):
        block = (tl.program_id(0) + i * tl.num_programs(0)) % BLOCKS
        acc += tl.load(x_ptr + block * BLOCK + tl.arange(0, BLOCK), cache_modifier=".cg")
    tl.store(out_ptr + tl.program_id(0), tl.sum(acc))


def ceilings(device: torch.device) -> Iterator[tuple[str, int, Timer]]:
    """(name, bytes per call, timer) of what no kernel on this GPU can beat: an empty launch, memory, L2."""
    yield "empty kernel", 0, timer([lambda: empty_kernel[(1,)]()])
    gpu = torch.cuda.get_device_properties(device)
    size = min(1 << 29, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    yield "copy", 2 * size, timer([lambda: target.copy_(source)])
    block, repeats, programs = 4096, 64, 4 * gpu.multi_processor_count
    blocks = max(1, gpu.L2_cache_size // 4 // (4 * block))
    x, out = torch.ones(blocks * block, device=device), torch.empty(programs, device=device)
    reading = timer([lambda: read_kernel[(programs,)](x, out, blocks, repeats, block)])
    if not torch.equal(out, torch.full_like(out, repeats * block)):
        raise WrongError("read_kernel did not read all of its blocks")
    yield "L2 read", 4 * programs * repeats * block, reading


def description() -> dict[str, str]:
    """Name, runtime, driver and clocks of the current GPU, or nothing without one."""
    if not torch.cuda.is_available():
        return {}
    found = {"GPU": torch.cuda.get_device_name(), "runtime": torch.version.hip or torch.version.cuda or "?"}
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    if tool := shutil.which("nvidia-smi"):
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        query = [tool, f"--query-gpu={fields}", "--format=csv,noheader", f"--id=GPU-{uuid}"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False).stdout
        found |= dict(zip(fields.split(","), map(str.strip, answer.split(",")), strict=False))
    return found
