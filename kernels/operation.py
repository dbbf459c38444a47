"""The one operation: x -> (k, gate), in one launch."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from .dispatch import KernelConfig, choose
from .matrix import MAX_ROWS, ProjectionWeights, scale_shape
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
    operands = (x, *weights.wk.operands, *weights.gate.operands)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*operands, out)):
        raise RuntimeError(
            "project: a tensor requires grad, and the projection is not differentiable; use torch.no_grad() or detach()"
        )
    if out is None:
        k_dtype = x.dtype if k_dtype is None else k_dtype
        gate_dtype = torch.float32 if gate_dtype is None else gate_dtype
        outputs: tuple[Tensor, Tensor] = torch.ops.indexproj.project(*operands, k_dtype, gate_dtype)
        return outputs
    if k_dtype is not None or gate_dtype is not None:
        raise ValueError("project: k_dtype and gate_dtype do not go with out=, whose dtype they would contradict")
    torch.ops.indexproj.project_out(*operands, out)
    d = weights.shape[0]
    return out[..., :d], out[..., d:]


# The operations take the two tensors of each matrix. "CUDA" is also ROCm's dispatch key; on the CPU the kernels run in
# Triton's interpreter or not at all.
_OPERANDS = "Tensor x, Tensor wk, Tensor? wk_scale, Tensor gate, Tensor? gate_scale"
_OUTPUTS = "ScalarType k_dtype, ScalarType gate_dtype"
torch.library.define("indexproj::project", f"({_OPERANDS}, {_OUTPUTS}) -> (Tensor, Tensor)")
torch.library.define("indexproj::project_out", f"({_OPERANDS}, Tensor(a!) out) -> ()")


def _allocate(
    x: Tensor, wk: Tensor, wk_scale: Tensor | None, gate: Tensor, gate_scale: Tensor | None,
    k_dtype: torch.dtype, gate_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _check_operands(x, wk, wk_scale, gate, gate_scale)
    _check_dtype("k_dtype", k_dtype, x.dtype)
    _check_dtype("gate_dtype", gate_dtype, x.dtype)
    rows = x.shape[:-1]
    return x.new_empty((*rows, wk.shape[0]), dtype=k_dtype), x.new_empty((*rows, gate.shape[0]), dtype=gate_dtype)


@torch.library.impl("indexproj::project", ("CPU", "CUDA"))
def _project(
    x: Tensor, wk: Tensor, wk_scale: Tensor | None, gate: Tensor, gate_scale: Tensor | None,
    k_dtype: torch.dtype, gate_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    k_out, gate_out = _allocate(x, wk, wk_scale, gate, gate_scale, k_dtype, gate_dtype)
    launch(_rows(x), wk, wk_scale, gate, gate_scale, _rows(k_out), _rows(gate_out))
    return k_out, gate_out


def _check_project_out(
    x: Tensor, wk: Tensor, wk_scale: Tensor | None, gate: Tensor, gate_scale: Tensor | None, out: Tensor
) -> None:
    _check_operands(x, wk, wk_scale, gate, gate_scale)
    _check_out(out, x, wk.shape[0] + gate.shape[0])


@torch.library.impl("indexproj::project_out", ("CPU", "CUDA"))
def _project_out(
    x: Tensor, wk: Tensor, wk_scale: Tensor | None, gate: Tensor, gate_scale: Tensor | None, out: Tensor
) -> None:
    _check_project_out(x, wk, wk_scale, gate, gate_scale, out)
    first, end = _extent(out)
    for name, tensor in (("x", x), ("wk", wk), ("its scale", wk_scale), ("gate", gate), ("its scale", gate_scale)):
        if tensor is not None and _extent(tensor)[0] < end and first < _extent(tensor)[1]:
            raise ValueError(f"project: out overlaps {name} in memory, which is read while out is written")
    rows, d = out.view(-1, out.shape[-1]), wk.shape[0]
    launch(_rows(x), wk, wk_scale, gate, gate_scale, rows[:, :d], rows[:, d:])


torch.library.register_fake("indexproj::project", _allocate)
torch.library.register_fake("indexproj::project_out", _check_project_out)


def launch(
    x: Tensor, wk: Tensor, wk_scale: Tensor | None, gate: Tensor, gate_scale: Tensor | None,
    k_out: Tensor, gate_out: Tensor, config: KernelConfig | None = None,
) -> None:  # fmt: skip
    """Writes k_out [M, D] and gate_out [M, H]: one launch, or none where M is 0. Checks nothing.

    config is for tests and tuning; left out, `choose` decides.
    """
    m, shape = x.shape[0], (wk.shape[0], gate.shape[0], x.shape[1])
    if m == 0:
        return
    target = target_of(x.device)
    config = config or choose(m, shape, target, x.dtype)
    with _ONE_AT_A_TIME, torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        KERNELS[config.regime][config.grid(m, *shape[:2])](
            x, wk, wk_scale, gate, gate_scale, k_out, gate_out,
            *workspace(x.device, *config.workspace(m, *shape[:2])),
            m, x.stride(0), k_out.stride(0), gate_out.stride(0),
            **constants(config, shape, x.dtype, target), **options(config, target),
        )  # fmt: skip


# Triton's interpreter keeps the program it is in in one global; launches on a GPU need no lock.
_ONE_AT_A_TIME: AbstractContextManager[Any] = threading.Lock() if INTERPRETED else nullcontext()


def constants(
    config: KernelConfig, shape: tuple[int, int, int], x_dtype: torch.dtype, target: Target
) -> dict[str, Any]:
    """The compile-time arguments of a launch."""
    # fp16 has 11 significand bits: exact in tf32, not in bf16. And Triton's interpreter computes bf16 wrongly.
    dot = tl.bfloat16 if x_dtype == torch.bfloat16 and not INTERPRETED else tl.float32
    amd = target.backend == "hip"
    return dict(zip(("D", "H", "K"), shape, strict=True)) | config.constants | {"DOT": dot, "AMD": amd}


def options(config: KernelConfig, target: Target) -> dict[str, Any]:
    """The compiler's options. Triton's default for fp_fusion changes between versions, so it is always given."""
    chosen = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    # Left alone, ptxas would rather spill a few registers of the tiled kernel than run one program less at a time.
    return chosen | {"maxnreg": 255} if target.backend == "cuda" and config.regime == "tiled" else chosen


def _check_operands(x: Tensor, wk: Tensor, wk_scale: Tensor | None, gate: Tensor, gate_scale: Tensor | None) -> None:
    if x.dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"project: x must be torch.bfloat16 or torch.float16, got {x.dtype}")
    k = wk.shape[-1]
    if x.ndim == 0 or x.shape[-1] != k:
        raise ValueError(f"project: x must be [..., K={k}] to fit the weights, got {list(x.shape)}")
    if x.stride(-1) != 1 and k > 1:
        raise ValueError(
            f"project: x must be contiguous in its last dimension, got strides {x.stride()}; call x.contiguous()"
        )
    for name, weight, scale in (("wk", wk, wk_scale), ("gate", gate, gate_scale)):
        if weight.device != x.device:
            raise ValueError(f"project: x is on {x.device}, the weights are on {weight.device}")
        if weight.shape[0] > MAX_ROWS:
            raise ValueError(f"project: {name} has {weight.shape[0]} rows; the kernels hold at most {MAX_ROWS}")
        # A matrix comes from `operands`, which is right; another caller of the op may be wrong.
        fits = weight.ndim == 2 and weight.shape[1] == k and weight.is_contiguous()
        if scale is None:
            fits &= weight.dtype == torch.bfloat16
        else:
            fits &= weight.dtype == torch.uint8 and scale.dtype == torch.float32 and scale.is_contiguous()
            fits &= tuple(scale.shape) == scale_shape(weight.shape) and scale.device == x.device
        if not fits:
            found = f"{weight.dtype} {list(weight.shape)} with scale {None if scale is None else list(scale.shape)}"
            raise ValueError(f"project: {name} must be the operands of a DenseMatrix or an Fp8Matrix, got {found}")


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


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
