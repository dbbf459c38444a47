"""The operation: x -> (k, gate), in one launch."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import ACTIVATIONS, FP4, Activation, Format, Operands, operand_layout
from .launch import Signature, launch
from .matrix import Matrix
from .weights import ProjectionWeights

# Of an operand: its dtype, shape, device and whether it is contiguous.
Found = tuple[torch.dtype, torch.Size, torch.device, bool] | None


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
        x: [..., K] bf16 or fp16, last dimension contiguous, any row stride, 0 to 2**20 rows. More
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
    has_dtypes = out is None or k_dtype is not None or gate_dtype is not None
    k, gate = project_all(
        x,
        (weights.wk, weights.gate),
        dtypes=(k_dtype or x.dtype, gate_dtype or torch.float32) if has_dtypes else None,
        factors=(1.0, gate_scale),
        activations=(activation, None),
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
        [..., N] per matrix. Raises what `project` raises.
    """
    operands = [operand for matrix in matrices for operand in matrix.operands]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, out, *operands)):
        advice = "use torch.no_grad() or detach()"
        raise RuntimeError(f"project: a tensor requires grad, and the projection is not differentiable; {advice}")
    formats, count = [matrix.format.value for matrix in matrices], len(matrices)
    factors = [1.0] * count if factors is None else list(map(float, factors))
    names = ["none" if name is None else name for name in activations or [None] * count]
    if out is not None:
        if dtypes is not None:
            raise ValueError("project: dtypes of outputs must not be given with out=, whose dtype they all have")
        torch.ops.indexproj.project_out.default(x, operands, formats, out, factors, names, batch_invariant)
        return tuple(torch.split(out, [matrix.shape[0] for matrix in matrices], -1))
    dtypes = [x.dtype] * count if dtypes is None else dtypes
    for dtype in dtypes:
        _check_dtype("the dtype of an output", dtype, x.dtype)
    fp32 = [dtype == torch.float32 for dtype in dtypes]
    return tuple(torch.ops.indexproj.project.default(x, operands, formats, fp32, factors, names, batch_invariant))


# operands: three per matrix, see `Matrix.operands`. formats: per matrix, as `Format` spells them. fp32: per output,
# False for x.dtype. factors: per output. activations: per matrix, "none" for None.
# "CUDA" is also ROCm's dispatch key. On the CPU the kernels run in Triton's interpreter or not at all.
_INPUTS = "Tensor x, Tensor?[] operands, str[] formats"
_OPTIONS = "float[] factors, str[] activations, bool batch_invariant"
torch.library.define("indexproj::project", f"({_INPUTS}, bool[] fp32, {_OPTIONS}) -> Tensor[]")
torch.library.define("indexproj::project_out", f"({_INPUTS}, Tensor(a!) out, {_OPTIONS}) -> ()")

# project_all refuses tensors that require grad; autograd would only cost time here.
_library = torch.library.Library("indexproj", "FRAGMENT")  # type: ignore[no-untyped-call]
for _operation in ("project", "project_out"):
    for _key in ("Autograd", "ADInplaceOrView"):
        _library.impl(_operation, torch.library.fallthrough_kernel, _key)  # type: ignore[no-untyped-call]


@torch.library.impl("indexproj::project", ("CPU", "CUDA"))
def _project(
    x: Tensor, operands: list[Tensor | None], formats: list[str], fp32: list[bool], *options: Any
) -> list[Tensor]:
    signature, matrices = _resolve(x, operands, formats, fp32, *options)
    outs = _allocate(x, signature)
    launch(_rows(x), matrices, tuple([_rows(out) for out in outs]), signature)
    return outs


def _fake_project(x: Tensor, *inputs: Any) -> list[Tensor]:
    return _allocate(x, _resolve(x, *inputs, cached=False)[0])


@torch.library.impl("indexproj::project_out", ("CPU", "CUDA"))
def _project_out(x: Tensor, operands: list[Tensor | None], formats: list[str], out: Tensor, *options: Any) -> None:
    signature, matrices = _resolve(x, operands, formats, [out.dtype == torch.float32] * len(formats), *options)
    _check_out(out, x, sum(signature.ns))
    storage = out.untyped_storage().data_ptr()
    if x.numel() and any(t is not None and t.untyped_storage().data_ptr() == storage for t in (x, *operands)):
        raise ValueError("project: out shares storage with x or the weights; give it memory of its own")
    launch(_rows(x), matrices, torch.split(_rows(out), list(signature.ns), 1), signature)


def _fake_project_out(x: Tensor, operands: list[Tensor | None], formats: list[str], out: Tensor, *options: Any) -> None:
    wide = [out.dtype == torch.float32] * len(formats)
    _check_out(out, x, sum(_resolve(x, operands, formats, wide, *options, cached=False)[0].ns))


torch.library.register_fake("indexproj::project", _fake_project)
torch.library.register_fake("indexproj::project_out", _fake_project_out)


def _allocate(x: Tensor, signature: Signature) -> list[Tensor]:
    leading = x.shape[:-1]
    return [x.new_empty(*leading, n, dtype=dtype) for n, dtype in zip(signature.ns, signature.dtypes, strict=True)]


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])


def _resolve(
    x: Tensor,
    operands: list[Tensor | None],
    formats: list[str],
    fp32: list[bool],
    factors: list[float],
    activations: list[str],
    batch_invariant: bool,
    *,
    cached: bool = True,
) -> tuple[Signature, tuple[Operands, ...]]:
    """What to launch, and the operands of each matrix.

    Args:
        cached: False for fake tensors, whose sizes cannot be hashed.
    """
    if not x.shape:
        raise ValueError("project: x must be [..., K] to fit the weights, got []")
    k = x.shape[-1]
    if x.stride(-1) != 1 and k > 1:
        got = f"strides {x.stride()}; call x.contiguous()"
        raise ValueError(f"project: x must be contiguous in its last dimension, got {got}")
    options = tuple(fp32), tuple(factors), tuple(activations), batch_invariant
    found = [None if each is None else (each.dtype, each.shape, each.device, each.is_contiguous()) for each in operands]
    check = _signature if cached else _signature.__wrapped__
    signature = check(x.dtype, k, x.device, tuple(formats), *options, *found)
    return signature, tuple(zip(operands[::3], operands[1::3], operands[2::3], strict=True))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4096)
def _signature(
    x_dtype: torch.dtype,
    k: int,
    device: torch.device,
    labels: tuple[str, ...],
    fp32: tuple[bool, ...],
    factors: tuple[float, ...],
    activations: tuple[str, ...],
    batch_invariant: bool,
    *found: Found,
) -> Signature:
    """Checks everything but addresses; cached, so once per kind of call."""
    if x_dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"project: x must be torch.bfloat16 or torch.float16, got {x_dtype}")
    formats, count = tuple(map(Format, labels)), len(labels)
    if not count:
        raise ValueError("project: expected at least one matrix, got none")
    if len(found) != 3 * count:
        raise ValueError(f"project: expected {3 * count} operands for {count} matrices, got {len(found)}")
    for name, values in {"dtypes": fp32, "factors": factors, "activations": activations}.items():
        if len(values) != count:
            raise ValueError(f"project: expected {count} {name} for {count} matrices, got {len(values)}")
    # -0.0 becomes 0.0: they are equal as keys and would share a compiled kernel.
    factors = tuple([factor + 0.0 for factor in factors])
    takes: tuple[Any, ...] = tuple([None if name == "none" else name for name in activations])
    if not all(abs(factor) <= torch.finfo(torch.float32).max for factor in factors):
        raise ValueError(f"project: expected factors that are finite in fp32, got {list(factors)}")
    for activation, format in zip(takes, formats, strict=True):
        if activation not in ACTIVATIONS:
            raise ValueError(f"project: expected activation None, 'fp8' or 'fp8_ue8m0', got {activation!r}")
        if activation and format != Format.FP8_BLOCK:
            got = f"activation={activation!r} and one in {format}"
            raise ValueError(f"project: an activation needs a matrix in {Format.FP8_BLOCK}, got {got}")
    ns = tuple([_check_operands(format, k, device, found[3 * i : 3 * i + 3]) for i, format in enumerate(formats)])
    dtypes = tuple([torch.float32 if wide else x_dtype for wide in fp32])
    return Signature(device, x_dtype, k, ns, formats, takes, factors, dtypes, batch_invariant)


def _check_operands(format: Format, k: int, device: torch.device, found: Sequence[Found]) -> int:
    """The rows of a matrix, from what was found of its three operands."""
    shape = tuple(found[0][1]) if found[0] else ()
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"project: expected 2-D values or codes of a matrix in {format}, got {list(shape)}")
    n, own_k = shape[0], shape[1] * (2 if format in FP4 else 1)
    if k != own_k:
        raise ValueError(f"project: x must be [..., K={own_k}] to fit the weights, got [..., {k}]")
    if n * own_k >= 2**31:  # the kernels' offsets into a matrix are int32
        raise ValueError(f"project: expected a matrix of fewer than 2**31 values, got one of {n} x {own_k}")
    for operand, layout in zip(found, operand_layout(format, n, k), strict=True):
        if operand and operand[2] != device:
            raise ValueError(f"project: x is on {device}, the weights are on {operand[2]}")
        expected = layout and (*layout, device, True)
        if operand != expected:
            what = f"an operand (dtype, shape, device, is contiguous) of a matrix in {format}"
            raise ValueError(f"project: {what}: expected {expected}, got {operand}")
    return n


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
        raise ValueError(f"project: out must be contiguous, or 2-D with contiguous, separate rows, got {out.stride()}")
