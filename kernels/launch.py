"""From tensors to one kernel launch: compile-time arguments, compiler options, and the short way to the driver."""

from __future__ import annotations

import functools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import KernelConfig, choose
from .gemv import gemv_kernel
from .matrix import Operands, ProjectionWeights, joined
from .prefill import tiled_kernel
from .split_k import split_k_kernel
from .target import INTERPRETED, Target, target_of
from .tuned import Pick, table_of
from .workspace import workspace

KERNELS = {"gemv": gemv_kernel, "split_k": split_k_kernel, "tiled": tiled_kernel}

_NOTHING: AbstractContextManager[Any] = nullcontext()
# Triton's interpreter keeps the program that it runs in one global.
_TURN: AbstractContextManager[Any] = threading.Lock() if INTERPRETED else _NOTHING


class Problem(NamedTuple):
    """All that a launch depends on, but for M, addresses and strides.

    Attributes:
        ns: rows of each matrix.
        kinds: `Matrix.kind` of each.
        factors: of each output.
        dtypes: of each output.
    """

    device: torch.device
    x_dtype: torch.dtype
    k: int
    ns: tuple[int, ...]
    kinds: tuple[int, ...]
    factors: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    batch_invariant: bool = False


def problem_of(weights: ProjectionWeights, *dtypes: torch.dtype) -> Problem:
    """The projection of bf16 activations, with outputs of these dtypes."""
    *ns, k = weights.shape
    return Problem(weights.device, torch.bfloat16, k, tuple(ns), weights.kinds, (1.0, 1.0), dtypes)


MAX_READY = 4096  # every M is one

# Compiled kernels with their grids, sizes of workspace and compile-time arguments, by all that these depend on.
_ready: dict[Any, tuple[Any, tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {}


def launch(
    x: Tensor,
    matrices: tuple[Operands, ...],
    outs: tuple[Tensor, ...],
    problem: Problem,
    config: Pick | None = None,
) -> None:
    """out [M, N] = factor * x [M, K] @ matrix.T of each matrix: one launch, or none where M is 0. Checks nothing.

    Args:
        matrices: `Matrix.operands` of each.
        config: for tests and tuning; left out, `decide` does.
    """
    m = x.shape[0]
    if m == 0:
        return
    device, ns = problem.device, problem.ns
    stride_xm, strides_om = x.stride(0), tuple([out.stride(0) for out in outs])
    # One compiled kernel serves all launches whose addresses and strides are multiples of 16, and whose tensors reach
    # no further than 2 GB: within these, Triton counts on 32-bit offsets on AMD. For the others Triton's own launcher,
    # which looks at each argument, finds or compiles one.
    bits = stride_xm | x.data_ptr()
    for out, stride_om in zip(outs, strides_om, strict=True):
        bits |= stride_om | out.data_ptr()
    for operands in matrices:
        for operand in operands:
            if operand is not None:
                bits |= operand.data_ptr()
    is_usual = not (bits & 15 or INTERPRETED) and m * max(stride_xm, *strides_om) < 2**29  # times 4 bytes at most
    key = problem, m, config
    ready = _ready.get(key) if is_usual else None
    if ready is not None:
        compiled, grid, needs, constexprs = ready
    else:
        # torch's GEMM is not for who asks for torch's deterministic algorithms: cuBLAS needs a setting for that.
        config = config or decide(m, problem, may_be_torch=not torch.are_deterministic_algorithms_enabled())
        if config == "torch":
            if not multiply_by_torch(x, [weight for weight, _, _ in matrices], outs):
                launch(x, matrices, outs, problem, decide(m, problem, may_be_torch=False))
            return
        target, shape = target_of(device), (*ns, problem.k)
        known = constants(config, shape, problem.kinds, problem.factors, problem.x_dtype, target)
        grid, constexprs = config.grid(m, *ns), tuple(known.values())
        needs = () if config.regime == "gemv" else config.workspace(grid, *ns)
        compile_and_run = functools.partial(KERNELS[config.regime][grid], **options(config, target))
    with _turn(device):
        lent = workspace(device, *needs) if needs else ()
        arguments = x, matrices, outs, *lent, m, stride_xm, strides_om, *constexprs
        if ready is not None:
            _run(compiled, grid, device, arguments)
        else:
            compiled = compile_and_run(*arguments)
            if is_usual:
                if len(_ready) >= MAX_READY:
                    _ready.clear()
                _ready[key] = compiled, grid, needs, constexprs


def _run(compiled: Any, grid: tuple[int, ...], device: torch.device, arguments: tuple[Any, ...]) -> None:
    """What `compiled[grid](*arguments)` does, less what it prepares for hooks that only profilers set."""
    enter, leave = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
        compiled[grid](*arguments)
    else:
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


@functools.lru_cache(maxsize=MAX_READY)
def decide(m: int, problem: Problem, *, may_be_torch: bool = True) -> Pick:
    """What runs: what was fastest on the device, if a table says so, or else what `choose` reckons."""
    shape, kinds, x_dtype = (*problem.ns, problem.k), problem.kinds, problem.x_dtype
    has_table = x_dtype == torch.bfloat16 and not problem.batch_invariant
    table = table_of(problem.device) if has_table else None
    # torch would round twice where there are factors.
    for_torch = problem.dtypes if may_be_torch and set(problem.factors) == {1.0} else None
    pick = table.find(m, shape, kinds, for_torch) if table else None
    if pick is None:
        target = target_of(problem.device)
        return choose(m, shape, kinds, target, x_dtype, batch_invariant=problem.batch_invariant)
    return pick


@torch.no_grad()
def multiply_by_torch(x: Tensor, weights: Sequence[Tensor], outs: Sequence[Tensor]) -> bool:
    """out [M, N] = x [M, K] @ weight [N, K].T of each bf16 weight, by torch's GEMM.

    Outputs of one dtype are one GEMM's, as in vLLM. For that weights and outputs have to be slices of one tensor each:
    where they are not, nothing is done, and the answer is False.
    """
    pairs = list(zip(weights, outs, strict=True))
    if len({out.dtype for out in outs}) == 1:
        weight, out = joined(weights, 0), joined(outs, 1)
        if weight is None or out is None:
            return False
        pairs = [(weight, out)]
    for weight, out in pairs:
        if out.dtype == x.dtype:
            torch.mm(x, weight.T, out=out)
        else:
            torch.mm(x, weight.T, out_dtype=out.dtype, out=out)
    return True


def _turn(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current where it is not, as that is where Triton launches."""
    if device.type != "cuda":
        return _TURN
    return _NOTHING if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def constants(
    config: KernelConfig,
    shape: tuple[int, ...],
    kinds: tuple[int, ...],
    factors: tuple[float, ...],
    x_dtype: torch.dtype,
    target: Target,
) -> dict[str, Any]:
    """The compile-time arguments of a launch, in the order in which the kernel takes them."""
    *ns, k = shape
    known = {
        "NS": tuple(ns),
        "KINDS": tuple(map(int, kinds)),  # Triton keys its cache by how they print, and `Kind` prints otherwise
        "FACTORS": factors,
        "K": k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SLICES": config.slices,
        "SPLIT_K": config.split_k,
        "SERIAL": config.serial,
        "SIZE": config.size(*ns),
        # fp16 has 11 significand bits: exact in tf32, not in bf16. And Triton's interpreter computes bf16 wrongly.
        "DOT": tl.bfloat16 if x_dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
        "AMD": target.backend == "hip",
        "PDL": _has_pdl(config, target),
    }
    return {name: known[name] for name in KERNELS[config.regime].arg_names if name in known}


def options(config: KernelConfig, target: Target) -> dict[str, Any]:
    """The compiler's options. Triton's default for fp_fusion changes between versions, so it is always given."""
    chosen = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if target.backend == "hip":
        # One shape of matrix instruction for all tiles, as rows must not change with the size of the batch.
        return chosen | ({"matrix_instr_nonkdim": 16} if config.regime == "split_k" else {})
    # Left alone, ptxas would rather spill a few registers than run one program less at a time; but `choose` counts on
    # two programs of split_k.
    chosen["maxnreg"] = 128 if config.regime == "split_k" and not config.serial else 255
    return chosen | ({"launch_pdl": True} if _has_pdl(config, target) else {})


def _has_pdl(config: KernelConfig, target: Target) -> bool:
    return config.pdl and target.is_cuda(90)
