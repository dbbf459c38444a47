"""What a call of the operation must look like: checks that name what was expected and what was found."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import ACTIVATIONS, Format, Operands, operand_layout
from .launch import Signature

LARGEST_FACTOR = torch.finfo(torch.float32).max
# Per matrix, where in the operands its values, group or block scales and row scales are; -1 for none.
Places = list[tuple[int, int, int]]


def resolve(
    x: Tensor,
    operands: list[Tensor],
    formats: list[str],
    fp32: list[bool],
    factors: Sequence[float] = (),
    activations: Sequence[str] | None = None,
    batch_invariant: bool = False,
    *,
    cached: bool = True,
) -> tuple[Signature, tuple[Operands, ...]]:
    """What to launch, and the operands of each matrix.

    Args:
        cached: False for fake tensors, whose sizes cannot be hashed.
    """
    shape = x.shape
    if not shape:
        raise ValueError("project: x must be [..., K] to fit the weights, got []")
    k = shape[-1]
    if x.stride(-1) != 1 and k > 1:
        raise ValueError(
            f"project: x must be contiguous in its last dimension, got strides {x.stride()}; call x.contiguous()"
        )
    signature, places = (_signature if cached else _signature.__wrapped__)(
        x.dtype,
        k,
        x.device,
        tuple(formats),
        tuple(fp32),
        tuple(factors),
        tuple(activations or ()),
        batch_invariant,
        *[(operand.dtype, operand.shape, operand.device, operand.is_contiguous()) for operand in operands],
    )
    padded = [*operands, None]
    return signature, tuple([(padded[a], padded[b], padded[c]) for a, b, c in places])  # type: ignore[misc]


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
    *found: tuple[torch.dtype, torch.Size, torch.device, bool],
) -> tuple[Signature, Places]:
    """Checks everything but addresses; cached, so once per kind of call.

    Args:
        found: per operand its dtype, shape, device and whether it is contiguous.
    """
    if x_dtype not in (torch.bfloat16, torch.float16):
        raise TypeError(f"project: x must be torch.bfloat16 or torch.float16, got {x_dtype}")
    count = len(labels)
    if not count:
        raise ValueError("project: expected at least one matrix, got none")
    known = {format.value: format for format in Format}
    if unknown := [label for label in labels if label not in known]:
        raise ValueError(f"project: expected formats among {', '.join(known)}, got {', '.join(unknown)}")
    formats = tuple([known[label] for label in labels])
    # -0.0 becomes 0.0: they are equal as keys and would share a compiled kernel.
    factors = tuple([factor + 0.0 for factor in factors or (1.0,) * count])
    takes: tuple[Any, ...] = tuple([None if name == "none" else name for name in activations or ("none",) * count])
    for name, values in (("dtypes", fp32), ("factors", factors), ("activations", takes)):
        if len(values) != count:
            raise ValueError(f"project: expected one of {name} per matrix, {count} in all, got {len(values)}")
    if not all(abs(factor) <= LARGEST_FACTOR for factor in factors):
        raise ValueError(f"project: expected factors that are finite in fp32, got {list(factors)}")
    for activation, format in zip(takes, formats, strict=True):
        if activation not in ACTIVATIONS:
            raise ValueError(f"project: expected activation None, 'fp8' or 'fp8_ue8m0', got {activation!r}")
        if activation and format != Format.FP8_BLOCK:
            raise ValueError(
                f"project: activation={activation!r} needs a matrix in {Format.FP8_BLOCK}, got one in {format}; "
                "leave activation out"
            )
    ns, places = _place_operands(formats, k, device, found)
    dtypes = tuple([torch.float32 if wide else x_dtype for wide in fp32])
    return Signature(device, x_dtype, k, ns, formats, takes, factors, dtypes, batch_invariant), places


def _place_operands(
    formats: tuple[Format, ...], k: int, device: torch.device, found: tuple[Any, ...]
) -> tuple[tuple[int, ...], Places]:
    """The rows of each matrix, and the places of its operands."""
    ns, places, place = [], [], 0
    for format in formats:
        shape = tuple(found[place][1]) if place < len(found) else ()
        if len(shape) != 2 or shape[1] == 0:
            raise ValueError(f"project: expected 2-D values or codes of a matrix in {format}, got {list(shape)}")
        n, own_k = shape[0], shape[1] * (2 if format in (Format.NVFP4, Format.MXFP4) else 1)
        if k != own_k:
            raise ValueError(f"project: x must be [..., K={own_k}] to fit the weights, got [..., {k}]")
        own = [-1, -1, -1]
        for role, layout in enumerate(operand_layout(format, n, k)):
            if layout is None:
                continue
            dtype, shape, where, is_contiguous = found[place] if place < len(found) else (None, (), device, True)
            if (dtype, tuple(shape)) != layout or not is_contiguous:
                raise ValueError(
                    f"project: operand {place}, of a matrix in {format}, must be {layout[0]} {list(layout[1])}, "
                    f"contiguous, got {dtype} {list(shape)}"
                )
            if where != device:
                raise ValueError(f"project: x is on {device}, the weights are on {where}")
            own[role] = place
            place += 1
        ns.append(n)
        places.append((own[0], own[1], own[2]))
    if place != len(found):
        raise ValueError(f"project: expected {place} operands for {', '.join(map(str, formats))}, got {len(found)}")
    return tuple(ns), places


def check_dtype(name: str, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    if dtype not in (x_dtype, torch.float32):
        raise TypeError(f"project: {name} must be x's {x_dtype} or torch.float32, got {dtype}")


def check_out(out: Tensor, x: Tensor, columns: int) -> None:
    check_dtype("out's dtype", out.dtype, x.dtype)
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


def share_storage(out: Tensor, others: Sequence[Tensor]) -> bool:
    storage = out.untyped_storage().data_ptr()
    return any(other.untyped_storage().data_ptr() == storage for other in others)
