"""How a matrix looks on disk, and how it becomes a kernel-ready one.

An encoding is recognised by the dtypes and shapes that the checkpoint holds; config files have no say in it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ..kernels.matrix import MAX_ROWS, SCALE_BLOCK, DenseMatrix, Fp8Matrix, Matrix, scale_shape
from .checkpoint import Header
from .problems import Problem


class Encoding(ABC):
    """One way to store a matrix [N, K].

    Attributes:
        name: as the audit prints it.
        weight_dtype: safetensors dtype of its "weight", by which it is recognised.
    """

    name: str
    weight_dtype: str

    @abstractmethod
    def scales(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """role -> (dtype, shape) of what comes beside a weight [N, K]."""

    @abstractmethod
    def bind(self, tensors: Mapping[str, Tensor]) -> Matrix:
        """The matrix, in the memory of the tensors given (role -> tensor)."""

    @abstractmethod
    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the bound matrix."""

    @abstractmethod
    def unusable(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """role -> which values are expected, for every role that holds others."""


class Bf16(Encoding):
    """Plain bf16, kept as it is. Source: GLM-5, and `weights_proj` in every DeepSeek-V3.2 and GLM-5 release."""

    name = "BF16"
    weight_dtype = "BF16"

    def scales(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {}

    def bind(self, tensors: Mapping[str, Tensor]) -> DenseMatrix:
        return DenseMatrix(tensors["weight"])

    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        return 2 * math.prod(shape)

    def unusable(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        # Larger ones overflow fp32 sums. Comparisons with NaN are false.
        return {} if (tensors["weight"].abs() <= 2.0**100).all() else {"weight": "values of a size up to 2**100"}


class Fp8Block(Encoding):
    """e4m3fn codes with an fp32 scale per 128x128 block, kept as they are; value = code * scale.

    Source: DeepSeek-V3's `inference/kernel.py` (`weight_dequant`). `weight_scale_inv` is, its name notwithstanding,
    the factor that restores the value.
    """

    name = f"FP8 {SCALE_BLOCK}x{SCALE_BLOCK}"
    weight_dtype = "F8_E4M3"

    def scales(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {"weight_scale_inv": ("F32", scale_shape(shape))}

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp8Matrix:
        return Fp8Matrix(tensors["weight"], tensors["weight_scale_inv"])

    def kept_bytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) + 4 * math.prod(scale_shape(shape))

    def unusable(self, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        found = {}
        if (tensors["weight"].view(torch.uint8) & 0x7F == 0x7F).any():  # NaN; e4m3fn has no infinity
            found["weight"] = "finite values"
        size = tensors["weight_scale_inv"].abs()
        # Beyond this, code * scale leaves fp32's normal numbers. Comparisons with NaN are false.
        if not ((size == 0) | (size >= 2.0**-100) & (size <= 2.0**100)).all():
            found["weight_scale_inv"] = "scales that are 0 or of a size from 2**-100 to 2**100"
        return found


ENCODINGS: dict[str, Encoding] = {encoding.weight_dtype: encoding for encoding in (Bf16(), Fp8Block())}
ROLES = frozenset({"weight", "weight_scale_inv"})


def recognise(matrix: str, headers: Mapping[str, Header]) -> tuple[Encoding | None, list[Problem]]:
    """The encoding of a matrix, or every reason why it has none.

    Args:
        matrix: name up to the role, "model.layers.0.self_attn.indexer.wk"; for messages.
        headers: role -> header of what there is of it.
    """
    weight = headers.get("weight")
    encoding = ENCODINGS.get(weight.dtype) if weight else None
    has_shape = weight is not None and len(weight.shape) == 2 and 0 not in weight.shape
    scales = encoding.scales(weight.shape) if weight and encoding and has_shape else {}
    # Without an encoding nobody knows which scales belong: any known role may.
    known = {"weight", *scales} if encoding and has_shape else ROLES
    strangers = {role: header for role, header in headers.items() if role not in known}
    problems = []
    if weight is None:
        others = {role: header for role, header in headers.items() if role in known}
        file = next(iter(headers.values())).file if headers else ""
        found = f"only {_listing(others)}" if others else "no tensor of it"
        problems.append(Problem(f"{matrix}.weight", file, "a weight", found))
    elif encoding is None:
        expected, advice = f"a weight in {' or '.join(ENCODINGS)}", "other encodings are not supported yet"
        problems.append(Problem(f"{matrix}.weight", weight.file, expected, str(weight), advice))
    elif has_shape and weight.shape[0] > MAX_ROWS:
        problems.append(Problem(f"{matrix}.weight", weight.file, f"at most {MAX_ROWS} rows", str(weight)))
    elif not has_shape:
        problems.append(Problem(f"{matrix}.weight", weight.file, "a matrix [N, K]", str(weight)))
    for role, (dtype, shape) in scales.items():
        header = headers.get(role)
        expected = f"{dtype} {list(shape)} to go with the {weight} weight"
        if header is None:
            found = f"no such tensor, but {_listing(strangers)}" if strangers else "no such tensor"
            problems.append(Problem(f"{matrix}.{role}", weight.file if weight else "", expected, found, _NO_SCALE))
            strangers = {}
        elif (header.dtype, header.shape) != (dtype, shape):
            problems.append(Problem(f"{matrix}.{role}", header.file, expected, str(header)))
    for role, header in strangers.items():
        expected = f"nothing beside {' and '.join(sorted(known))}"
        problems.append(Problem(f"{matrix}.{role}", header.file, expected, str(header)))
    return (None, problems) if problems else (encoding, [])


_NO_SCALE = "without it the codes have no value: fetch the shard that holds it, or export the checkpoint again"


def _listing(headers: Mapping[str, Header]) -> str:
    return ", ".join(f"{role} ({header})" for role, header in headers.items())
