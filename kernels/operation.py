"""The operation: x -> (k, gate), in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import check_dtype, check_out, resolve, share_storage
from .formats import Activation
from .launch import Signature, launch
from .matrix import Matrix
from .weights import ProjectionWeights


def project(
    x: Tensor,
    weights: ProjectionWeights,
    *,
    k_dtype: torch.dtype | None = None,
    gate_dtype: torch.dtype | None = None,
    gate_scale: float = 1.0,
    activation: Activation | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """k = x @ wk.T and gate = gate_scale * x @ weights_proj.T, accumulated in fp32 from exactly decoded weights.

    Args:
        x: [..., K] bf16 or fp16, last dimension contiguous, any row stride, any number of rows including zero. More
            than two dimensions are flattened, with a copy if their strides do not allow a view.
        weights: the two matrices, on the device of x.
        k_dtype: dtype of k, x.dtype (default) or torch.float32.
        gate_dtype: dtype of gate, torch.float32 (default) or x.dtype.
        gate_scale: multiplies gate in fp32, before rounding; DeepSeek's is H**-0.5 * D**-0.5. Compiled into the kernel.
        activation: None (default) keeps x in bf16/fp16 (W8A16, W4A16). "fp8" rounds it to e4m3 for wk, as DeepSeek's
            inference code does (W8A8): per row and 128 columns of K, with the scale max(amax, 1e-4) / 448;
            "fp8_ue8m0" rounds that scale up to a power of two. wk must be FP8 with 128x128 blocks. The gate always
            takes x unchanged.
        out: [..., D + H], x.dtype or fp32, contiguous, or 2-D with any row stride; must not share storage with x or the
            weights. k and gate are then its two column slices, and k_dtype and gate_dtype must not be given.
        batch_invariant: the bits of a row do not depend on the other rows or its position. Slower for many rows.

    Returns:
        k [..., D] and gate [..., H].

    Raises:
        TypeError: x, out or a requested output has a dtype not listed above, or weights is not ProjectionWeights.
        ValueError: a shape, stride, device or format that does not fit, an unknown activation, or a gate_scale that is
            not finite in fp32.
        RuntimeError: a tensor requires grad (the operation is not differentiable), or there is no GPU and Triton's
            interpreter is off.
    """
    if not isinstance(weights, ProjectionWeights):
        raise TypeError(f"project: weights must be ProjectionWeights, got {type(weights).__name__}")
    dtypes = None
    if out is None:
        dtypes = (k_dtype or x.dtype, gate_dtype or torch.float32)
        for name, dtype in zip(("k_dtype", "gate_dtype"), dtypes, strict=True):
            check_dtype(name, dtype, x.dtype)
    elif k_dtype is not None or gate_dtype is not None:
        raise ValueError("project: k_dtype and gate_dtype must not be given with out=, whose dtype both outputs have")
    k, gate = project_all(
        x,
        (weights.wk, weights.gate),
        dtypes=dtypes,
        factors=None if gate_scale == 1 else (1.0, gate_scale),
        activations=None if activation is None else (activation, None),
        out=out,
        batch_invariant=batch_invariant,
    )
    return k, gate


def project_all(
    x: Tensor,
    matrices: Sequence[Matrix],
    *,
    dtypes: Sequence[torch.dtype] | None = None,
    factors: Sequence[float] | None = None,
    activations: Sequence[Activation | None] | None = None,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, ...]:
    """factor * x @ matrix.T for one or more matrices with the same K, in one launch.

    GLM-5.3-Flash has a third matrix that reads the same x, `index_kpool_compress_gate`.

    Args:
        matrices: [N, K] each, with any N.
        dtypes: per output, x.dtype (default) or torch.float32.
        factors: per output, in fp32; 1 by default. Compiled into the kernel.
        activations: per matrix, None (default) for unchanged x; see `project`.
        x, out, batch_invariant: as for `project`. out has sum(N) columns, and dtypes must not be given with it.

    Returns:
        [..., N] per matrix.

    Raises:
        As `project`.
    """
    operands = [operand for matrix in matrices for operand in matrix.operands if operand is not None]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, out, *operands)):
        raise RuntimeError(
            "project: a tensor requires grad, and the projection is not differentiable; use torch.no_grad() or detach()"
        )
    formats = [matrix.format.value for matrix in matrices]
    options = (
        [] if factors is None else list(map(float, factors)),
        None if activations is None else ["none" if name is None else name for name in activations],
        batch_invariant,
    )
    if out is not None:
        if dtypes is not None:
            raise ValueError("project: dtypes must not be given with out=, whose dtype all outputs have")
        torch.ops.indexproj.project_out.default(x, operands, formats, out, *options)
        return tuple(torch.split(out, [matrix.shape[0] for matrix in matrices], -1))
    dtypes = [x.dtype] * len(formats) if dtypes is None else dtypes
    for dtype in dtypes:
        check_dtype("an output", dtype, x.dtype)
    fp32 = [dtype == torch.float32 for dtype in dtypes]
    return tuple(torch.ops.indexproj.project.default(x, operands, formats, fp32, *options))


# operands: the operands of all matrices in a row, without the None ones. formats: per matrix, as `Format` spells them.
# fp32: per output, False for x.dtype. factors: per output, or none. activations: per matrix, "none" for None, or none.
# "CUDA" is also ROCm's dispatch key. On the CPU the kernels run in Triton's interpreter or not at all.
_INPUTS, _OPTIONS = "Tensor x, Tensor[] operands, str[] formats", "float[] factors=[], str[]? activations=None"
torch.library.define(
    "indexproj::project", f"({_INPUTS}, bool[] fp32, {_OPTIONS}, bool batch_invariant=False) -> Tensor[]"
)
torch.library.define(
    "indexproj::project_out", f"({_INPUTS}, Tensor(a!) out, {_OPTIONS}, bool batch_invariant=False) -> ()"
)

# project_all refuses tensors that require grad; autograd would only cost time here.
_library = torch.library.Library("indexproj", "FRAGMENT")  # type: ignore[no-untyped-call]
for _operation in ("project", "project_out"):
    for _key in ("Autograd", "ADInplaceOrView"):
        _library.impl(_operation, torch.library.fallthrough_kernel, _key)  # type: ignore[no-untyped-call]


@torch.library.impl("indexproj::project", ("CPU", "CUDA"))
def _project(x: Tensor, operands: list[Tensor], formats: list[str], fp32: list[bool], *options: Any) -> list[Tensor]:
    signature, matrices = resolve(x, operands, formats, fp32, *options)
    outs = _allocate(x, signature)
    launch(_rows(x), matrices, tuple([_rows(out) for out in outs]), signature)
    return outs


def _fake_project(
    x: Tensor, operands: list[Tensor], formats: list[str], fp32: list[bool], *options: Any, **named: Any
) -> list[Tensor]:
    signature, _ = resolve(x, operands, formats, fp32, *options, **named, cached=False)
    return _allocate(x, signature)


@torch.library.impl("indexproj::project_out", ("CPU", "CUDA"))
def _project_out(x: Tensor, operands: list[Tensor], formats: list[str], out: Tensor, *options: Any) -> None:
    signature, matrices = resolve(x, operands, formats, [out.dtype == torch.float32] * len(formats), *options)
    check_out(out, x, sum(signature.ns))
    if x.numel() and share_storage(out, [x, *operands]):
        raise ValueError("project: out shares storage with x or the weights; give it memory of its own")
    launch(_rows(x), matrices, torch.split(_rows(out), list(signature.ns), 1), signature)


def _fake_project_out(
    x: Tensor, operands: list[Tensor], formats: list[str], out: Tensor, *options: Any, **named: Any
) -> None:
    fp32 = [out.dtype == torch.float32] * len(formats)
    signature, _ = resolve(x, operands, formats, fp32, *options, **named, cached=False)
    check_out(out, x, sum(signature.ns))


torch.library.register_fake("indexproj::project", _fake_project)
torch.library.register_fake("indexproj::project_out", _fake_project_out)


def _allocate(x: Tensor, signature: Signature) -> list[Tensor]:
    leading = x.shape[:-1]
    return [x.new_empty(*leading, n, dtype=dtype) for n, dtype in zip(signature.ns, signature.dtypes, strict=True)]


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])
