"""Timing on a GPU: calls in a graph or from Python, with weights that are not in L2, after checking their results."""

import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..indexer.cli.synthetic import random_matrix
from ..kernels import DenseMatrix, KernelConfig, Matrix
from ..kernels.dispatch import out_dtypes
from ..kernels.formats import Format, Operands
from ..kernels.launch import launch
from ..kernels.target import INTERPRETED, target_of
from ..kernels.workspace import recycled_counters
from .compiled import signature

Matrices = tuple[Matrix, ...]
Outputs = Sequence[Tensor]
Call = Callable[[], Outputs]
Timer = Callable[[], float]  # measures once, in microseconds
# Takes x [M, K] bf16 and matrices, and returns a call that computes the outputs. Preparing the weights is not timed.
Contender = Callable[[Tensor, Matrices], Call]
Tolerances = dict[torch.dtype, float]
# Calls per measurement, at least: enough to hide the microseconds that starting one takes.
CALLS = 64
# Largest error against fp64 relative to the largest output, by dtype. torch accumulates inside the tensor core, which
# truncates in each of 448 steps over K = 7168, and may reduce parts of K in bf16.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
TORCH_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2**-6}


class WrongError(Exception):
    """A result differs from the reference."""


def current_gpu() -> torch.device:
    """Raises RuntimeError if there is none, or one that the kernels do not support."""
    if INTERPRETED or not torch.cuda.is_available():
        raise RuntimeError(f"needs a GPU, but {'TRITON_INTERPRET=1 is set' if INTERPRETED else 'there is none'}")
    device = torch.device("cuda", torch.cuda.current_device())
    target_of(device)
    return device


@functools.lru_cache(maxsize=2)
def weight_copies(shape: tuple[int, ...], formats: tuple[Format, ...], device: torch.device) -> list[Matrices]:
    """Random weights, and copies of them that take more than twice the L2 cache, for calls that cycle through them.

    If all are BF16, they are slices of one tensor, as in vLLM.
    """
    *ns, k = shape
    torch.manual_seed(0)
    weights = tuple(random_matrix(format, n, k) for format, n in zip(formats, ns, strict=True))
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    count = 1 + -(-2 * l2_bytes // sum(matrix.nbytes for matrix in weights))
    if set(formats) != {Format.BF16}:
        return [tuple(m.map(lambda tensor: tensor.to(device, copy=True)) for m in weights) for _ in range(count)]
    fused = torch.cat([matrix.dequantize(torch.bfloat16) for matrix in weights])
    return [tuple(map(DenseMatrix, torch.split(fused.to(device, copy=True), ns))) for _ in range(count)]


def replay(calls: Sequence[Callable[[], object]]) -> Timer:
    """Times the GPU: replays a CUDA graph of the calls, repeated until there are at least CALLS."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    repeated = [*calls] * -(-CALLS // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in repeated:
            call()

    def microseconds() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * float(start.elapsed_time(end)) / len(repeated)

    return microseconds


def eager(calls: Sequence[Callable[[], object]]) -> Timer:
    """Times the same calls from Python, launches included."""
    repeated = [*calls] * -(-CALLS // len(calls))

    def microseconds() -> float:
        torch.cuda.synchronize()
        start = perf_counter()
        for call in repeated:
            call()
        torch.cuda.synchronize()
        return 1e6 * (perf_counter() - start) / len(repeated)

    return microseconds


class Sampler:
    """Times contenders on m rows of random x. Its graphs share counters, so they must not run side by side."""

    def __init__(self, m: int, shape: tuple[int, ...], formats: tuple[Format, ...], device: torch.device) -> None:
        self._weights = weight_copies(shape, formats, device)
        self._signature = signature(shape, formats, device=device)
        self._x = torch.randn(m, shape[-1], device=device).bfloat16()
        self._exact = [self._x.double() @ matrix.dequantize(torch.float64).T for matrix in self._weights[0]]

    def timer(self, contender: Contender, tolerances: Tolerances = TOLERANCES, how: str = "device") -> Timer:
        """how is "device" or "eager".

        Raises:
            WrongError: the outputs are off by more than the tolerance for their dtype, relative to the largest one.
            RuntimeError: the GPU or torch cannot run the contender.
        """
        calls = [contender(self._x, weights) for weights in self._weights]
        for output, exact in zip(calls[0](), self._exact, strict=True):
            error = ((output.double() - exact).abs().max() / exact.abs().max()).item()
            if not error <= tolerances[output.dtype]:
                raise WrongError(f"off by {error:.1e} of the largest output")
        with recycled_counters(self._x.device):
            return {"device": replay, "eager": eager}[how](calls)

    def into(self, outs: str, run: Callable[[Tensor, Sequence[Operands], Outputs], object]) -> Contender:
        """Runs over outputs of NaN, in one tensor if their dtypes are equal; outs is a key of OUTS."""
        ns, m = self._signature.ns, len(self._x)
        dtypes = out_dtypes(outs, len(ns))
        buffers = [self._x.new_full((m, n), torch.nan, dtype=dtype) for n, dtype in zip(ns, dtypes, strict=True)]
        if len(set(dtypes)) == 1:
            buffers = [*torch.split(torch.cat(buffers, 1), list(ns), 1)]

        def contender(x: Tensor, matrices: Matrices) -> Call:
            operands = tuple(matrix.operands for matrix in matrices)
            return lambda: (run(x, operands, buffers), buffers)[1]

        return contender

    def with_config(self, config: KernelConfig) -> Contender:
        """Launches with a given config."""
        return self.into("fp32", functools.partial(launch, signature=self._signature, config=config))


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
    yield "empty kernel", 0, replay([lambda: empty_kernel[(1,)]()])
    gpu = torch.cuda.get_device_properties(device)
    size = min(1 << 29, torch.cuda.mem_get_info(device)[0] // 4)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    yield "copy", 2 * size, replay([lambda: target.copy_(source)])
    block, repeats, programs = 4096, 64, 4 * gpu.multi_processor_count
    blocks = max(1, gpu.L2_cache_size // 4 // (4 * block))
    x, out = torch.ones(blocks * block, device=device), torch.empty(programs, device=device)
    timer = replay([lambda: read_kernel[(programs,)](x, out, blocks, repeats, block)])
    if not torch.equal(out, torch.full_like(out, repeats * block)):
        raise WrongError("read_kernel did not read all of its blocks")
    yield "L2 read", 4 * programs * repeats * block, timer


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
