"""The one operation: x -> (k, gate), in one launch."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .dispatch import KernelConfig, choose
from .matrix import MAX_ROWS, Kind, ProjectionWeights, operand_specs
from .split_k import split_k_kernel
from .target import INTERPRETED, Target, target_of
from .tiled import tiled_kernel
from .workspace import workspace

KERNELS = {"split_k": split_k_kernel, "tiled": tiled_kernel}
ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)


def project(
    x: Tensor,
    weights: ProjectionWeights,
    *,
    k_dtype: torch.dtype | None = None,
    gate_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """k = x @ wk.T and gate = x @ weights_proj.T, accumulated in fp32 from exactly decoded weights.

    Args:
        x: [..., K] bf16 or fp16, last dimension contiguous, any row stride, any number of rows, also none. More
            dimensions than two are flattened, by a copy where their strides do not allow a view.
        weights: the two matrices, on the device of x.
        k_dtype: dtype of k, x.dtype (default) or torch.float32.
        gate_dtype: dtype of gate, torch.float32 (default) or x.dtype.
        out: [..., D + H], x.dtype or fp32, to write into; contiguous, or 2-D with any row stride, and apart from x and
            the weights in memory. k and gate are then its two column slices, both in its dtype, and k_dtype and
            gate_dtype must not be given.

    Returns:
        k [..., D] and gate [..., H].

    Raises:
        TypeError: x, out or a requested output has a dtype that is not listed above, or weights are none.
        ValueError: a shape, stride or device that does not fit the weights.
        RuntimeError: a tensor requires grad (the operation is not differentiable), or there is no GPU and Triton's
            interpreter is off.
    """
    if not isinstance(weights, ProjectionWeights):
        raise TypeError(f"project: weights must be ProjectionWeights, got {type(weights).__name__}")
    operands, kinds = weights.operands, weights.kinds
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, out, *operands)):
        raise RuntimeError(
            "project: a tensor requires grad, and the projection is not differentiable; use torch.no_grad() or detach()"
        )
    if out is None:
        dtypes = [x.dtype if k_dtype is None else k_dtype, torch.float32 if gate_dtype is None else gate_dtype]
        for name, dtype in zip(("k_dtype", "gate_dtype"), dtypes, strict=True):
            _check_dtype(name, dtype, x.dtype)
        k, gate = torch.ops.indexproj.project(x, operands, kinds, [dtype == torch.float32 for dtype in dtypes])
        return k, gate
    if k_dtype is not None or gate_dtype is not None:
        raise ValueError("project: k_dtype and gate_dtype do not go with out=, whose dtype they would contradict")
    torch.ops.indexproj.project_out(x, operands, kinds, out)
    d = weights.shape[0]
    return out[..., :d], out[..., d:]


# The operations take any number of matrices, as their kinds and the tensors that each kind has, and write x.dtype
# or, where fp32 says so, fp32. "CUDA" is also ROCm's
# dispatch key; on the CPU the kernels run in Triton's interpreter or not at all.
_OPERANDS = "Tensor x, Tensor[] operands, int[] kinds"
torch.library.define("indexproj::project", f"({_OPERANDS}, bool[] fp32) -> Tensor[]")
torch.library.define("indexproj::project_out", f"({_OPERANDS}, Tensor(a!) out) -> ()")


def _allocate(x: Tensor, operands: list[Tensor], kinds: list[int], fp32: list[bool]) -> list[Tensor]:
    ns = _check_operands(x, operands, kinds)
    if len(fp32) != len(ns):
        raise ValueError(f"project: {len(ns)} matrices, but dtypes of {len(fp32)} outputs")
    dtypes = [torch.float32 if wide else x.dtype for wide in fp32]
    return [x.new_empty((*x.shape[:-1], n), dtype=dtype) for n, dtype in zip(ns, dtypes, strict=True)]


@torch.library.impl("indexproj::project", ("CPU", "CUDA"))
def _project(x: Tensor, operands: list[Tensor], kinds: list[int], fp32: list[bool]) -> list[Tensor]:
    outs = _allocate(x, operands, kinds, fp32)
    launch(_rows(x), operands, kinds, [_rows(out) for out in outs])
    return outs


def _check_project_out(x: Tensor, operands: list[Tensor], kinds: list[int], out: Tensor) -> list[int]:
    ns = _check_operands(x, operands, kinds)
    _check_out(out, x, sum(ns))
    return ns


@torch.library.impl("indexproj::project_out", ("CPU", "CUDA"))
def _project_out(x: Tensor, operands: list[Tensor], kinds: list[int], out: Tensor) -> None:
    ns = _check_project_out(x, operands, kinds, out)
    first, end = _extent(out)
    for name, tensor in (("x", x), *(("the weights", operand) for operand in operands)):
        if _extent(tensor)[0] < end and first < _extent(tensor)[1]:
            raise ValueError(f"project: out overlaps {name} in memory, which is read while out is written")
    launch(_rows(x), operands, kinds, list(torch.split(out.view(-1, out.shape[-1]), ns, 1)))


def _fake_project_out(x: Tensor, operands: list[Tensor], kinds: list[int], out: Tensor) -> None:
    _check_project_out(x, operands, kinds, out)


torch.library.register_fake("indexproj::project", _allocate)
torch.library.register_fake("indexproj::project_out", _fake_project_out)


def launch(
    x: Tensor, operands: list[Tensor], kinds: list[int], outs: list[Tensor], config: KernelConfig | None = None
) -> None:
    """Writes out [M, N] of each matrix: one launch, or none where M is 0. Checks nothing.

    config is for tests and tuning; left out, `choose` decides.
    """
    m, shape = x.shape[0], (*(out.shape[1] for out in outs), x.shape[1])
    if m == 0:
        return
    target = target_of(x.device)
    config = config or choose(m, shape, target, x.dtype)
    with _ONE_AT_A_TIME, torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        KERNELS[config.regime][config.grid(m, *shape[:-1])](
            x, matrices_of(operands, kinds), tuple(outs),
            *workspace(x.device, *config.workspace(m, *shape[:-1])),
            m, x.stride(0), tuple(out.stride(0) for out in outs),
            **constants(config, shape, kinds, x.dtype, target), **options(config, target),
        )  # fmt: skip


# Triton's interpreter keeps the program it is in in one global; launches on a GPU need no lock.
_ONE_AT_A_TIME: AbstractContextManager[Any] = threading.Lock() if INTERPRETED else nullcontext()


def constants(
    config: KernelConfig, shape: tuple[int, ...], kinds: list[int], x_dtype: torch.dtype, target: Target
) -> dict[str, Any]:
    """The compile-time arguments of a launch."""
    # fp16 has 11 significand bits: exact in tf32, not in bf16. And Triton's interpreter computes bf16 wrongly.
    dot = tl.bfloat16 if x_dtype == torch.bfloat16 and not INTERPRETED else tl.float32
    *ns, k = shape
    matrices = {"NS": tuple(ns), "KINDS": tuple(map(int, kinds)), "K": k}
    return matrices | config.constants(*ns) | {"DOT": dot, "AMD": target.backend == "hip"}


def options(config: KernelConfig, target: Target) -> dict[str, Any]:
    """The compiler's options. Triton's default for fp_fusion changes between versions, so it is always given."""
    chosen = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    # Left alone, ptxas would rather spill a few registers of the tiled kernel than run one program less at a time.
    return chosen | {"maxnreg": 255} if target.backend == "cuda" and config.regime == "tiled" else chosen


def _check_operands(x: Tensor, operands: list[Tensor], kinds: list[int]) -> list[int]:
    """The number of rows of each matrix, all of them being what x and their kinds ask for."""
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"project: x must be torch.bfloat16 or torch.float16, got {x.dtype}")
    if x.ndim and x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(
            f"project: x must be contiguous in its last dimension, got strides {x.stride()}; call x.contiguous()"
        )
    ns = []
    for kind, tensors in zip(kinds, matrices_of(operands, kinds), strict=True):
        codes = tensors[0]
        # A matrix comes from `operands`, which is right; another caller of the operation may be wrong.
        if codes is None or codes.ndim != 2:
            raise ValueError(f"project: a matrix of kind {kind} begins with two-dimensional codes")
        n, k = codes.shape[0], codes.shape[1] * (2 if kind in (Kind.NVFP4, Kind.MXFP4) else 1)
        if x.ndim == 0 or x.shape[-1] != k:
            raise ValueError(f"project: x must be [..., K={k}] to fit the weights, got {list(x.shape)}")
        if n > MAX_ROWS:
            raise ValueError(f"project: a matrix has {n} rows; the kernels hold at most {MAX_ROWS}")
        for tensor, expected in zip(tensors, operand_specs(kind, n, k), strict=True):
            if tensor is None or expected is None:
                continue
            found = (tensor.dtype, tuple(tensor.shape))
            if found != expected or not tensor.is_contiguous():
                raise ValueError(f"project: a matrix of kind {kind} must have {expected}, contiguous, got {found}")
            if tensor.device != x.device:
                raise ValueError(f"project: x is on {x.device}, the weights are on {tensor.device}")
        ns.append(n)
    return ns


def _check_dtype(name: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    if dtype not in (x_dtype, torch.float32):
        raise TypeError(f"project: {name} must be x's {x_dtype} or torch.float32, got {dtype}")


def _check_out(out: Tensor, x: Tensor, columns: int) -> None:
    _check_dtype("out's dtype", out.dtype, x.dtype)
    expected = (*x.shape[:-1], columns)
    if tuple(out.shape) != expected:
        raise ValueError(f"project: out must be [..., D + H] = {list(expected)}, got {list(out.shape)}")
    if out.device != x.device:
        raise ValueError(f"project: out is on {out.device}, x is on {x.device}")
    separate_rows = out.ndim == 2 and out.stride(1) == 1 and (out.shape[0] < 2 or out.stride(0) >= columns)
    if not (separate_rows or out.is_contiguous()):
        raise ValueError(
            "project: out must be contiguous, or 2-D with contiguous rows that do not overlap, got strides "
            f"{out.stride()}"
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last address of a tensor's elements, the last one exclusive; (0, 0) where it has none."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def matrices_of(operands: list[Tensor], kinds: list[int]) -> tuple[tuple[Tensor | None, ...], ...]:
    """The three operands of each matrix, None where its kind has none.

    Raises:
        ValueError: there are more of them or less, or a kind that does not exist.
    """
    if not set(kinds) <= set(Kind):
        raise ValueError(f"project: kinds are {list(map(int, Kind))}, got {kinds}")
    present = [[spec is not None for spec in operand_specs(kind, 1, 1)] for kind in kinds]
    if len(operands) != sum(map(sum, present)):
        raise ValueError(f"project: {sum(map(sum, present))} operands expected for kinds {kinds}, got {len(operands)}")
    rest = iter(operands)
    return tuple(tuple(next(rest) if has else None for has in slots) for slots in present)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
