"""From tensors to one kernel launch: compile-time arguments, compiler options, and the short way to the driver."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .dispatch import KernelConfig, choose, next_power_of_2
from .gemv import gemv_kernel
from .matrix import Operands, joined
from .split_k import split_k_kernel
from .target import INTERPRETED, Target, target_of
from .tiled import tiled_kernel
from .tuned import Pick, table_of
from .workspace import workspace

KERNELS = {"gemv": gemv_kernel, "split_k": split_k_kernel, "tiled": tiled_kernel}

_NOTHING: AbstractContextManager[Any] = nullcontext()
# Triton's interpreter keeps the program that it runs in one global.
_TURN: AbstractContextManager[Any] = threading.Lock() if INTERPRETED else _NOTHING

# Compiled kernels with their configs and compile-time arguments, by all that these depend on.
_ready: dict[Any, tuple[Any, KernelConfig, tuple[Any, ...]]] = {}


def launch(
    x: Tensor,
    matrices: tuple[Operands, ...],
    kinds: tuple[int, ...],
    outs: tuple[Tensor, ...],
    factors: tuple[float, ...],
    *,
    batch_invariant: bool = False,
    config: Pick | None = None,
) -> None:
    """out [M, N] = factor * x [M, K] @ matrix.T of each matrix: one launch, or none where M is 0. Checks nothing.

    Args:
        matrices: `Matrix.operands` of each.
        kinds: `Matrix.kind` of each.
        config: for tests and tuning; left out, `decide` does.
    """
    m, k = x.shape
    if m == 0:
        return
    ns = tuple([out.shape[1] for out in outs])
    dtypes = tuple([out.dtype for out in outs])
    stride_xm, strides_om = x.stride(0), tuple([out.stride(0) for out in outs])
    key = x.device, next_power_of_2(m), k, ns, kinds, factors, x.dtype, dtypes, batch_invariant, config
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
    ready = _ready.get(key) if is_usual else None
    if ready is None:
        config = config or decide(m, (*ns, k), kinds, dtypes, x.device, x.dtype, factors, batch_invariant)
        if config == "torch":
            multiply_by_torch(x, [weight for weight, _, _ in matrices], outs)
            return
        target = target_of(x.device)
        constexprs = tuple(constants(config, (*ns, k), kinds, factors, x.dtype, target).values())
        kernel, chosen = KERNELS[config.regime], options(config, target)
    else:
        (kernel, config, constexprs), chosen = ready, {}
    grid = config.grid(m, *ns)
    with _turn(x.device):
        lent = () if config.regime == "gemv" else workspace(x.device, *config.workspace(grid, *ns))
        compiled = kernel[grid](x, matrices, outs, *lent, m, stride_xm, strides_om, *constexprs, **chosen)
    if is_usual and ready is None:
        _ready[key] = compiled, config, constexprs


def decide(
    m: int,
    shape: tuple[int, ...],
    kinds: tuple[int, ...],
    outs: tuple[torch.dtype, ...],
    device: torch.device,
    x_dtype: torch.dtype = torch.bfloat16,
    factors: tuple[float, ...] = (),
    batch_invariant: bool = False,
) -> Pick:
    """What runs on a device: what was fastest there, if a table says so, or else what `choose` reckons."""
    table = None if batch_invariant or x_dtype != torch.bfloat16 else table_of(device)
    pick = table.find(m, shape, kinds, outs) if table else None
    if pick is None or (pick == "torch" and any(factor != 1 for factor in factors)):  # torch would round twice
        return choose(m, shape, kinds, target_of(device), x_dtype, batch_invariant=batch_invariant)
    return pick


def multiply_by_torch(x: Tensor, weights: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """out [M, N] = x [M, K] @ weight [N, K].T of each bf16 weight, by torch's GEMM.

    One for all where weights and outputs are slices of one tensor each, as in vLLM.
    """
    weight, out = joined(weights, 0), joined(outs, 1)
    pairs = zip(weights, outs, strict=True) if weight is None or out is None else [(weight, out)]
    for weight, out in pairs:
        if out.dtype == x.dtype:
            torch.mm(x, weight.T, out=out)
        else:
            torch.mm(x, weight.T, out_dtype=out.dtype, out=out)


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
