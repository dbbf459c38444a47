"""The one operation: x -> (k, gate), in one launch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .dispatch import columns_together
from .launch import Problem, launch
from .matrix import MAX_ROWS, MAX_ROWS_TOGETHER, Kind, Matrix, Operands, ProjectionWeights, operand_specs

ACTIVATION_DTYPES = (torch.bfloat16, torch.float16)
LARGEST_FACTOR = torch.finfo(torch.float32).max
Activation = Literal["fp8", "fp8_ue8m0"]
# Of each activation the kinds that take it, and what they are called then.
QUANTIZING = {
    "fp8": {Kind.FP8_BLOCK: Kind.W8A8, Kind.FP8_BLOCK_FNUZ: Kind.W8A8_FNUZ},
    "fp8_ue8m0": {Kind.FP8_BLOCK: Kind.W8A8_UE8M0, Kind.FP8_BLOCK_FNUZ: Kind.W8A8_UE8M0_FNUZ},
}


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
        x: [..., K] bf16 or fp16, last dimension contiguous, any row stride, any number of rows, also none. More
            dimensions than two are flattened, by a copy where their strides do not allow a view.
        weights: the two matrices, on the device of x.
        k_dtype: dtype of k, x.dtype (default) or torch.float32.
        gate_dtype: dtype of gate, torch.float32 (default) or x.dtype.
        gate_scale: multiplies the fp32 sums of gate, before they are rounded; DeepSeek's is H**-0.5 * D**-0.5. It is
            compiled into the kernel.
        activation: "fp8" rounds x to e4m3 for wk, as DeepSeek's own inference does (W8A8): each row in groups of 128
            along K, by scales of max(amax, 1e-4) / 448, and with "fp8_ue8m0" by the next power of two. wk has to be FP8
            with 128x128 blocks. The gate always takes x as it is, and so does k by default.
        out: [..., D + H], x.dtype or fp32, to write into; contiguous, or 2-D with any row stride, and apart from x and
            the weights in memory. k and gate are then its two column slices, both in its dtype, and k_dtype and
            gate_dtype must not be given.
        batch_invariant: each row of k and gate has the same bits whatever the other rows are, how many there are, and
            where it stands among them. Slower for many rows.

    Returns:
        k [..., D] and gate [..., H].

    Raises:
        TypeError: x, out or a requested output has a dtype that is not listed above, or weights are none.
        ValueError: a shape, stride or device that does not fit the weights, a gate_scale that is not finite in fp32, or
            an activation that does not exist or that wk's encoding does not take.
        RuntimeError: a tensor requires grad (the operation is not differentiable), or there is no GPU and Triton's
            interpreter is off.
    """
    if not isinstance(weights, ProjectionWeights):
        raise TypeError(f"project: weights must be ProjectionWeights, got {type(weights).__name__}")
    dtypes = None
    if out is None:
        # Named by argument here; project_all only knows outputs by number.
        for name, dtype in (("k_dtype", k_dtype), ("gate_dtype", gate_dtype)):
            _check_dtype(name, dtype or torch.float32, x.dtype)
        dtypes = (k_dtype or x.dtype, gate_dtype or torch.float32)
    elif k_dtype is not None or gate_dtype is not None:
        raise ValueError("project: k_dtype and gate_dtype do not go with out=, whose dtype they would contradict")
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
    """factor * x @ matrix.T of one or more matrices with the same K, in one launch.

    GLM-5.3-Flash has a third one, `index_kpool_compress_gate`, that reads the same x.

    Args:
        matrices: [N, K] each, N up to 256, and up to 384 together, each rounded up to a power of two.
        dtypes: of each output, x.dtype (default) or torch.float32.
        factors: of each output, in fp32; 1 by default. Compiled into the kernel.
        activations: in which each matrix takes x; None (default) is as it is. See `project`.
        x, out, batch_invariant: as for `project`; out has the sum of N as its columns, and dtypes must not be given.

    Returns:
        [..., N] of each matrix.

    Raises:
        As `project`.
    """
    operands = [operand for matrix in matrices for operand in matrix.operands if operand is not None]
    options = (None if factors is None else list(map(float, factors))), batch_invariant
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, out, *operands)):
        raise RuntimeError(
            "project: a tensor requires grad, and the projection is not differentiable; use torch.no_grad() or detach()"
        )
    kinds = [matrix.kind.name for matrix in matrices]
    if activations is not None:
        if len(activations) != len(kinds):
            raise ValueError(f"project: {len(kinds)} matrices, but {len(activations)} activations")
        kinds = [_quantizing(matrix.kind, name).name for matrix, name in zip(matrices, activations, strict=True)]
    if out is None:
        dtypes = dtypes or [x.dtype] * len(kinds)
        if len(dtypes) != len(kinds):
            raise ValueError(f"project: {len(kinds)} matrices, but dtypes of {len(dtypes)} outputs")
        for place, dtype in enumerate(dtypes):
            _check_dtype("an output", dtype, x.dtype)
            kinds[place] += ":fp32" if dtype == torch.float32 else ""
        return tuple(torch.ops.indexproj.project.default(x, operands, " ".join(kinds), *options))
    if dtypes is not None:
        raise ValueError("project: dtypes do not go with out=, whose dtype they would contradict")
    torch.ops.indexproj.project_out.default(x, operands, " ".join(kinds), out, *options)
    return tuple(torch.split(out, [matrix.shape[0] for matrix in matrices], -1))


# The operations take the tensors of all matrices, and a form that says how to read them: of each matrix its kind, and
# ":fp32" where its output is fp32, as in "FP8_BLOCK BF16:fp32". One string costs the dispatcher less than lists would.
# "CUDA" is also ROCm's dispatch key; on the CPU the kernels run in Triton's interpreter or not at all.
_INPUTS = "Tensor x, Tensor[] operands, str form"
_OPTIONS = "float[]? factors=None, bool batch_invariant=False"
torch.library.define("indexproj::project", f"({_INPUTS}, {_OPTIONS}) -> Tensor[]")
torch.library.define("indexproj::project_out", f"({_INPUTS}, Tensor(a!) out, {_OPTIONS}) -> ()")


# Python refuses what requires grad; here autograd would only cost time.
_library = torch.library.Library("indexproj", "FRAGMENT")  # type: ignore[no-untyped-call]
for _operation in ("project", "project_out"):
    for _key in ("Autograd", "ADInplaceOrView"):
        _library.impl(_operation, torch.library.fallthrough_kernel, _key)  # type: ignore[no-untyped-call]


@torch.library.impl("indexproj::project", ("CPU", "CUDA"))
def _project(
    x: Tensor,
    operands: list[Tensor],
    form: str,
    factors: list[float] | None = None,
    batch_invariant: bool = False,
) -> list[Tensor]:
    problem, matrices = _check_inputs(x, operands, form, x.dtype, factors, batch_invariant)
    outs = _allocate(x, problem)
    launch(_rows(x), matrices, tuple([_rows(out) for out in outs]), problem)
    return outs


def _fake_project(
    x: Tensor,
    operands: list[Tensor],
    form: str,
    factors: list[float] | None = None,
    batch_invariant: bool = False,
) -> list[Tensor]:
    problem, _ = _check_inputs(x, operands, form, x.dtype, factors, batch_invariant, _check_metadata.__wrapped__)
    return _allocate(x, problem)


@torch.library.impl("indexproj::project_out", ("CPU", "CUDA"))
def _project_out(
    x: Tensor,
    operands: list[Tensor],
    form: str,
    out: Tensor,
    factors: list[float] | None = None,
    batch_invariant: bool = False,
) -> None:
    problem, matrices = _check_inputs(x, operands, form, out.dtype, factors, batch_invariant)
    _check_out(out, x, sum(problem.ns))
    for name, tensor in (("x", x), *[("the weights", operand) for operand in operands]):
        if _overlap(out, tensor):
            raise ValueError(f"project: out overlaps {name} in memory, which is read while out is written")
    launch(_rows(x), matrices, torch.split(_rows(out), list(problem.ns), 1), problem)


def _fake_project_out(
    x: Tensor,
    operands: list[Tensor],
    form: str,
    out: Tensor,
    factors: list[float] | None = None,
    batch_invariant: bool = False,
) -> None:
    problem, _ = _check_inputs(x, operands, form, out.dtype, factors, batch_invariant, _check_metadata.__wrapped__)
    _check_out(out, x, sum(problem.ns))


torch.library.register_fake("indexproj::project", _fake_project)
torch.library.register_fake("indexproj::project_out", _fake_project_out)


def _allocate(x: Tensor, problem: Problem) -> list[Tensor]:
    *leading, _ = x.shape
    return [x.new_empty(*leading, n, dtype=dtype) for n, dtype in zip(problem.ns, problem.dtypes, strict=True)]


@functools.lru_cache(maxsize=4096)
def _check_metadata(
    x_dtype: torch.dtype,
    k: int,
    device: torch.device,
    form: str,
    out_dtype: torch.dtype,
    factors: tuple[float, ...] | None,
    batch_invariant: bool,
    *found: Any,
) -> tuple[Problem, list[tuple[int, int, int]]]:
    """What to launch, and which of the tensors are the three operands of each matrix, -1 for none.

    Depends on metadata alone, so that it is done once and not in every step of a model.
    """
    if x_dtype not in ACTIVATION_DTYPES:
        raise TypeError(f"project: x must be torch.bfloat16 or torch.float16, got {x_dtype}")
    parts = [part.partition(":")[::2] for part in form.split()]
    if not parts:
        raise ValueError("project: expected at least one matrix, got none")
    names, outputs = zip(*parts, strict=True)
    if not set(names) <= set(Kind.__members__) or not set(outputs) <= {"", "fp32"}:
        raise ValueError(
            f'project: a form is made up of {", ".join(Kind.__members__)}, each with ":fp32" or without, got "{form}"'
        )
    kinds = tuple([int(Kind[name]) for name in names])
    # -0.0 equals 0.0, and would be given its compiled kernel: the sum has no sign.
    factors = (1.0,) * len(kinds) if factors is None else tuple([factor + 0.0 for factor in factors])
    if len(factors) != len(kinds) or not all(abs(factor) <= LARGEST_FACTOR for factor in factors):
        raise ValueError(f"project: expected {len(kinds)} finite factors, in fp32, one per matrix, got {list(factors)}")
    ns, slots, place = [], [], 0
    for name, kind in zip(names, kinds, strict=True):
        # A matrix comes from `Matrix.operands`, which is right; another caller of the operation may be wrong.
        shape: tuple[int, ...] = tuple(found[place][1]) if place < len(found) else ()
        if len(shape) != 2:
            raise ValueError(f"project: a matrix of kind {name} begins with two-dimensional codes, got {list(shape)}")
        n, own_k = shape[0], shape[1] * (2 if kind in (Kind.NVFP4, Kind.MXFP4) else 1)
        if k != own_k:
            raise ValueError(f"project: x must be [..., K={own_k}] to fit the weights, got [..., {k}]")
        if n > MAX_ROWS:
            raise ValueError(f"project: a matrix has {n} rows; the kernels hold at most {MAX_ROWS}")
        ns.append(n)
        places = [-1, -1, -1]
        for role, spec in enumerate(operand_specs(kind, n, k)):
            if spec is None:
                continue
            dtype, shape, where, is_contiguous = found[place] if place < len(found) else (None, (), device, True)
            if (dtype, tuple(shape)) != spec or not is_contiguous:
                raise ValueError(
                    f"project: operand {place}, of a matrix of kind {name}, must be {spec[0]} {list(spec[1])}, "
                    f"contiguous, got {dtype} {list(shape)}"
                )
            if where != device:
                raise ValueError(f"project: x is on {device}, the weights are on {where}")
            places[role] = place
            place += 1
        slots.append((places[0], places[1], places[2]))
    is_known = all(isinstance(n, int) for n in ns)
    if is_known and columns_together(*ns) > MAX_ROWS_TOGETHER:
        raise ValueError(
            f"project: the matrices have {ns} rows; rounded up to powers of two, the kernels hold at most "
            f"{MAX_ROWS_TOGETHER} of them together"
        )
    if place != len(found):
        raise ValueError(f"project: {place} operands expected for {form}, got {len(found)}")
    dtypes = tuple([torch.float32 if output else out_dtype for output in outputs])
    return Problem(device, x_dtype, k, tuple(ns), kinds, factors, dtypes, batch_invariant), slots


def _check_inputs(
    x: Tensor,
    operands: list[Tensor],
    form: str,
    out_dtype: torch.dtype,
    factors: list[float] | None,
    batch_invariant: bool,
    check: Callable[..., tuple[Problem, list[tuple[int, int, int]]]] = _check_metadata,
) -> tuple[Problem, tuple[Operands, ...]]:
    """What to launch, and the operands of each matrix, all of them being what x and the form ask for.

    Args:
        out_dtype: of the outputs that the form does not call fp32.
        check: `_check_metadata`, for fake tensors without its cache, as their sizes cannot be hashed.
    """
    shape = x.shape
    if not shape:
        raise ValueError("project: x must be [..., K] to fit the weights, got []")
    k = shape[-1]
    if x.stride(-1) != 1 and k > 1:
        raise ValueError(
            f"project: x must be contiguous in its last dimension, got strides {x.stride()}; call x.contiguous()"
        )
    found = [(operand.dtype, operand.shape, operand.device, operand.is_contiguous()) for operand in operands]
    given = None if factors is None else tuple(factors)
    problem, slots = check(x.dtype, k, x.device, form, out_dtype, given, batch_invariant, *found)
    padded = [*operands, None]
    return problem, tuple([(padded[codes], padded[scale], padded[rows]) for codes, scale, rows in slots])  # type: ignore[misc]


def _quantizing(kind: Kind, activation: Activation | None) -> Kind:
    """The kind of a matrix that takes x in that activation."""
    if activation is None:
        return kind
    if activation not in tuple(QUANTIZING):
        raise ValueError(f"project: activation must be None, {' or '.join(map(repr, QUANTIZING))}, got {activation!r}")
    if kind not in QUANTIZING[activation]:
        raise ValueError(
            f"project: activation={activation!r} takes an FP8 matrix with 128x128 blocks, got one of kind {kind.name}; "
            "leave activation out"
        )
    return QUANTIZING[activation][kind]


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


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors with contiguous last dimensions, the first one not empty, may share memory."""
    (first, end), (start, stop) = _extent(a), _extent(b)
    if first >= stop or start >= end:
        return False
    rows = {tensor.stride(0) * tensor.itemsize if tensor.ndim == 2 else 0 for tensor in (a, b)}
    if len(rows) > 1 or 0 in rows:
        return True
    # Column slices of one buffer: between the rows of each, there is room for those of the other or not.
    (row,) = rows
    return not a.shape[1] * a.itemsize <= (start - first) % row <= row - b.shape[1] * b.itemsize


def _extent(tensor: Tensor) -> tuple[int, int]:
    """First and last address of a tensor's elements, the last one exclusive; (0, 0) where it has none."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(-1, tensor.shape[-1])
