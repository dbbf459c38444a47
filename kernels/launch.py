"""From tensors to one kernel launch: compile-time arguments, compiler options, and a short path to the driver."""

import functools
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import KernelConfig, choose, out_dtypes, table_of
from .formats import ACTIVATIONS, Activation, Format, Operands
from .gemv import gemv_kernel
from .prefill import prefill_kernel
from .split_k import split_k_kernel
from .target import INTERPRETED, Target, target_of
from .weights import joined
from .workspace import workspace

KERNELS = {"gemv": gemv_kernel, "split_k": split_k_kernel, "prefill": prefill_kernel}

# Triton's interpreter keeps the program that it runs in a global.
_GUARD: AbstractContextManager[Any] = threading.Lock() if INTERPRETED else nullcontext()


@dataclass(frozen=True, eq=False)
class Signature:
    """Everything a launch depends on except M, addresses and strides. Tuples have one element per matrix.

    Two are equal only if they are the same object, which makes them fast keys; `project` makes one per kind of call.

    Attributes:
        ns: rows.
        factors: multiply the outputs.
        dtypes: of the outputs.
    """

    device: torch.device
    x_dtype: torch.dtype
    k: int
    ns: tuple[int, ...]
    formats: tuple[Format, ...]
    activations: tuple[Activation | None, ...]
    factors: tuple[float, ...]
    dtypes: tuple[torch.dtype, ...]
    batch_invariant: bool = False

    @classmethod
    @functools.cache
    def of(
        cls,
        shape: tuple[int, ...],
        formats: tuple[Format, ...],
        activation: Activation | None = None,
        dtypes: tuple[torch.dtype, ...] | None = None,
        batch_invariant: bool = False,
        device: torch.device = torch.device("cpu"),  # noqa: B008
    ) -> "Signature":
        """A projection of bf16 x; the same arguments give the same object. shape: rows of each matrix, then K.

        Only the first matrix takes the activation. By default, the dtypes are those of `project` (fp32 gate).
        """
        *ns, k = shape
        activations, factors = (activation, *[None] * (len(ns) - 1)), (1.0,) * len(ns)
        dtypes = dtypes or out_dtypes("fp32", len(ns))
        return cls(device, torch.bfloat16, k, (*ns,), formats, activations, factors, dtypes, batch_invariant)

    @property
    def shape(self) -> tuple[int, ...]:
        """(D, H, K), or more rows before K."""
        return *self.ns, self.k


def launch(
    x: Tensor,
    matrices: tuple[Operands, ...],
    outs: tuple[Tensor, ...],
    signature: Signature,
    config: KernelConfig | None = None,
) -> None:
    """out [M, N] = factor * x [M, K] @ matrix.T for each matrix, in one launch; none if M is 0. Checks nothing.

    Args:
        matrices: `Matrix.operands` of each.
        config: for tests and tuning; by default the tuned table or `choose` decides.
    """
    m = x.shape[0]
    if m == 0:
        return
    plan = plan_of(signature, 1 << (m - 1).bit_length(), config)  # next_power_of_2, without the call
    # cuBLAS is deterministic only with a setting that torch checks for in this mode.
    if plan.prefers_torch and not torch.are_deterministic_algorithms_enabled() and torch_mm(x, matrices, outs):
        return
    plan.run(m, x, matrices, outs)


class LaunchPlan:
    """How to launch one signature for M up to a power of two.

    Attributes:
        config: the kernel and its block sizes.
        prefers_torch: `indexproj tune` has found torch.mm faster.
    """

    def __init__(self, signature: Signature, bucket: int, config: KernelConfig, prefers_torch: bool) -> None:
        target = target_of(signature.device)
        self.config = config
        self.prefers_torch = prefers_torch
        self._device = signature.device
        *self._tiles_n_and_splits, _ = config.grid(1, *signature.ns)
        self._kernel = KERNELS[config.regime]
        self._constants = tuple(constants(config, signature, target).values())
        self._options = options(config, target)
        self._takes_workspace = config.regime != "gemv"
        self._workspace_size = config.workspace_size(bucket, *signature.ns)
        self._compiled: Any = None

    def run(self, m: int, x: Tensor, matrices: tuple[Operands, ...], outs: tuple[Tensor, ...]) -> None:
        """Launches for the m rows of x. The first launch compiles, or finds the kernel in Triton's cache."""
        stride_xm, strides_om = x.stride(0), tuple([out.stride(0) for out in outs])
        grid = *self._tiles_n_and_splits, -(-m // self.config.block_m)
        with _device_guard(self._device):
            buffers = workspace(self._device, *self._workspace_size) if self._takes_workspace else ()
            arguments = x, matrices, outs, *buffers, m, stride_xm, strides_om, *self._constants
            if not _is_aligned(m, x, matrices, outs, (stride_xm, *strides_om)):
                self._kernel[grid](*arguments, **self._options)
            elif self._compiled is None:
                self._compiled = self._kernel[grid](*arguments, **self._options)
            else:
                self._run_compiled(grid, arguments)

    def _run_compiled(self, grid: tuple[int, ...], arguments: tuple[Any, ...]) -> None:
        """What `compiled[grid](*arguments)` does, without preparing for launch hooks, which only profilers set."""
        knobs = triton.knobs.runtime
        enter, leave = knobs.launch_enter_hook, knobs.launch_exit_hook
        compiled = self._compiled
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            compiled[grid](*arguments)
        else:
            stream = triton.runtime.driver.active.get_current_stream(self._device.index)
            compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)


@functools.lru_cache(maxsize=4096)
def plan_of(signature: Signature, bucket: int, config: KernelConfig | None = None) -> LaunchPlan:
    """The plan for up to bucket rows of x, a power of two."""
    case = bucket, signature.shape, signature.formats
    is_tuned = signature.x_dtype == torch.bfloat16 and not (signature.batch_invariant or any(signature.activations))
    tuned, torch_for = table_of(signature.device).get(case, (None, ())) if is_tuned and config is None else (None, ())
    # torch would round before it multiplies by a factor.
    prefers_torch = signature.dtypes in torch_for and set(signature.factors) == {1.0}
    config = config or tuned or choose(
        bucket, *case[1:], target_of(signature.device), signature.x_dtype,
        quantize_x=any(signature.activations), batch_invariant=signature.batch_invariant,
    )  # fmt: skip
    return LaunchPlan(signature, bucket, config, prefers_torch)


def _is_aligned(
    m: int, x: Tensor, matrices: Sequence[Operands], outs: Sequence[Tensor], strides: Sequence[int]
) -> bool:
    """Whether the one compiled kernel of a plan may run: Triton specializes on what this tests.

    Addresses and strides are multiples of 16, and tensors are smaller than 2 GB, within which Triton uses 32-bit
    offsets on AMD. Otherwise Triton's own launcher, which looks at each argument, finds or compiles a kernel.
    """
    bits = x.data_ptr()
    for stride in strides:
        bits |= stride
    for out in outs:
        bits |= out.data_ptr()
    for operands in matrices:
        for operand in operands:
            if operand is not None:
                bits |= operand.data_ptr()
    # 4 bytes per element at most.
    return not (bits & 15 or INTERPRETED) and m * max(strides) < 2**29


@torch.no_grad()
def torch_mm(x: Tensor, matrices: Sequence[Operands], outs: Sequence[Tensor]) -> bool:
    """out [M, N] = x [M, K] @ weight [N, K].T for each bf16 matrix, by torch.mm.

    Outputs of one dtype take one GEMM, as in vLLM. If weights or outputs are then not slices of one tensor, does
    nothing and returns False.
    """
    pairs = [(weight, out) for (weight, _, _), out in zip(matrices, outs, strict=True)]
    if len({out.dtype for out in outs}) == 1:
        weight, out = joined([weight for weight, _ in pairs], 0), joined(outs, 1)
        if weight is None or out is None:
            return False
        pairs = [(weight, out)]
    for weight, out in pairs:
        wider = {} if out.dtype == x.dtype else {"out_dtype": out.dtype}
        torch.mm(x, weight.T, out=out, **wider)
    return True


def _device_guard(device: torch.device) -> AbstractContextManager[Any]:
    """Makes the device current, as Triton launches there."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _GUARD
    return torch.cuda.device(device)


def constants(config: KernelConfig, signature: Signature, target: Target) -> dict[str, Any]:
    """The compile-time arguments, in the order of the kernel's parameters."""
    known = {
        "NS": signature.ns,
        "FORMATS": tuple([list(Format).index(format) for format in signature.formats]),
        "ACTIVATIONS": tuple([ACTIVATIONS.index(activation) for activation in signature.activations]),
        "FACTORS": signature.factors,
        "K": signature.k,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_NS": config.block_ns(*signature.ns),
        "BLOCK_K": config.block_k,
        "SLICES": config.slices,
        "SPLIT_K": config.split_k,
        "LOOP_SPLITS": config.loop_splits,
        "ACC_SIZE": config.acc_size(*signature.ns),
        # fp16 has 11 significand bits: exact in tf32, not in bf16. Triton's interpreter computes bf16 wrongly.
        "DOT": tl.bfloat16 if signature.x_dtype == torch.bfloat16 and not INTERPRETED else tl.float32,
        # In PTX, which Triton's interpreter does not run.
        "PACKED": target.backend == "cuda" and signature.x_dtype == torch.bfloat16 and not INTERPRETED,
        "AMD": target.backend == "hip",
        "PDL": "launch_pdl" in options(config, target),
    }
    return {name: known[name] for name in KERNELS[config.regime].arg_names if name in known}


def options(config: KernelConfig, target: Target) -> dict[str, Any]:
    """The compiler's options. Triton's default for fp_fusion differs between versions."""
    chosen = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    if target.backend == "hip":
        if config.regime == "gemv":
            return chosen | {"waves_per_eu": 1}
        # One matrix instruction for all tiles, as the bits of a row must not depend on the batch.
        return chosen | ({"matrix_instr_nonkdim": 16} if config.regime == "split_k" else {})
    # By default ptxas spills a few registers to fit one more program. `choose` counts on two programs of split_k.
    chosen["maxnreg"] = 128 if config.regime == "split_k" and not config.loop_splits else 255
    return chosen | ({"launch_pdl": True} if config.pdl and target.is_cuda(90) else {})
