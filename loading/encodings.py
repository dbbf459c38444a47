"""Encodings: which tensors a matrix consists of on disk, and how they become a kernel-ready matrix.

To add one, write a class with its tensors and `bind`, and list it in ENCODINGS.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.matrix import MX_GROUP, NVFP4_GROUP, SCALE_BLOCK, DenseMatrix, Fp4Matrix, Fp8Matrix, Matrix, scale_shape
from .headers import Header
from .names import SPELLINGS, UNUSED

FLOAT = ("F32", "BF16", "F16")
E8M0 = ("F8_E8M0", "U8")


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor may be: any of the dtypes, as safetensors spells them, in any of the shapes."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def fits(self, header: Header | None) -> bool:
        return header is not None and header.dtype in self.dtypes and header.shape in self.shapes

    def __str__(self) -> str:
        return f"{'/'.join(self.dtypes)} {'/'.join(str(list(shape)) for shape in self.shapes)}"


class Encoding(ABC):
    """One way to store a matrix [N, K].

    Attributes:
        name: as the audit prints it.
        is_native: True if codes and scales stay as stored, False if the values are rounded to bf16.
        weight_dtypes: dtypes of its "weight", as safetensors spells them.
        per_element: values along K in one element of "weight".
        scale_name: the usual spelling of the role "scale", for messages.
        optional_roles: roles that may be present or not. Only the end of a load tells which.
    """

    name: str
    is_native = True
    weight_dtypes: tuple[str, ...]
    per_element = 1
    scale_name = "weight_scale"
    optional_roles: tuple[str, ...] = ()

    def required(self, n: int, k: int) -> dict[str, TensorSpec]:
        """role -> tensor that must come with a weight [N, K]."""
        return {}

    def optional(self, n: int, k: int, scale: Header) -> dict[str, TensorSpec]:
        """role -> tensor that may come with this weight and scale."""
        return {}

    def misfits(self, headers: Mapping[str, Header]) -> dict[str, TensorSpec | None]:
        """Compares the tensors beside a "weight" of the right dtype with what this encoding needs.

        Returns:
            role -> spec of each tensor that is missing or wrong, None for each tensor that has no role here. Empty if
            the encoding fits.
        """
        weight = headers["weight"]
        n, k = weight.shape[0], weight.shape[1] * self.per_element
        specs = self.required(n, k)
        known = {"weight", *specs, *self.optional_roles, *([UNUSED] if specs else [])}
        wrong: dict[str, TensorSpec | None] = {
            role: spec for role, spec in specs.items() if not spec.fits(headers.get(role))
        }
        if self.optional_roles and not wrong:
            optional = self.optional(n, k, headers["scale"])
            wrong |= {r: spec for r, spec in optional.items() if r in headers and not spec.fits(headers[r])}
        return wrong | {role: None for role in headers if role not in known}

    def spelling(self, role: str) -> str:
        """Last part of the name of a tensor in that role, for messages."""
        return self.scale_name if role == "scale" else SPELLINGS[role]

    def bad_values(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
        """role -> (expected values, found values), for values that `bind` cannot handle."""
        return {}

    @abstractmethod
    def bind(self, tensors: Mapping[str, Tensor]) -> Matrix:
        """The matrix, from role -> contiguous tensor; shares their memory where nothing changes."""


class Bf16(Encoding):
    """bf16, kept as stored.

    Source: GLM-5, NVIDIA's and AMD's FP4 releases, and `weights_proj` in every DeepSeek-V3.2 and GLM-5 release.
    """

    name = "BF16"
    weight_dtypes = ("BF16",)

    def bind(self, tensors: Mapping[str, Tensor]) -> DenseMatrix:
        return DenseMatrix(tensors["weight"].bfloat16())


class F16(Bf16):
    """fp16, rounded to bf16 (8 of 11 significand bits). No release stores this projection in fp16."""

    name = "F16"
    is_native = False
    weight_dtypes = ("F16",)


class F32(Bf16):
    """fp32, rounded to bf16. Exact for weights that were bf16 before, as trainers such as prime-rl send them."""

    name = "F32"
    is_native = False
    weight_dtypes = ("F32",)


class _Fp8(Encoding):
    weight_dtypes = ("F8_E4M3", "F8_E4M3FNUZ")

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp8Matrix:
        codes = tensors["weight"]
        return fp8_matrix(codes, self.kept_scale(tensors["scale"], *codes.shape))

    @abstractmethod
    def kept_scale(self, scale: Tensor, n: int, k: int) -> Tensor:
        """The stored scale in the layout of Fp8Matrix."""


class Fp8Block(_Fp8):
    """e4m3 codes, one scale per 128x128 block (edges rounded up); value = code * scale.

    Source: DeepSeek-V3's `inference/kernel.py` (`weight_dequant`) with fp32 scales, compressed-tensors' FP8_BLOCK with
    bf16 scales, DeepSeek's `scale_fmt` "ue8m0" with E8M0 scales, also as uint8. ModelOpt's FP8_PB_WO stores the scales
    in four dimensions. All convert to fp32 exactly.
    """

    name = "FP8 128x128"
    scale_name = "weight_scale_inv"

    def required(self, n: int, k: int) -> dict[str, TensorSpec]:
        rows, columns = scale_shape((n, k))
        return {"scale": TensorSpec((*FLOAT, *E8M0), ((rows, columns), (rows, 1, columns, 1)))}

    def kept_scale(self, scale: Tensor, n: int, k: int) -> Tensor:
        return (_e8m0(scale) if scale.dtype == torch.uint8 else scale).float().view(scale_shape((n, k)))


class Fp8Row(_Fp8):
    """e4m3 codes, one scale per row; value = code * scale.

    Source: compressed-tensors' strategy "channel" ([N, 1]); Quark and PyTorch write [N].
    """

    name = "FP8 per row"

    def required(self, n: int, k: int) -> dict[str, TensorSpec]:
        return {"scale": TensorSpec(FLOAT, ((n, 1), (n,)))}

    def kept_scale(self, scale: Tensor, n: int, k: int) -> Tensor:
        return scale.float().view(n, 1)


class Fp8Tensor(_Fp8):
    """e4m3 codes, one scale; value = code * scale. The scale is repeated for every row.

    Source: ModelOpt's FP8 (scalar), compressed-tensors' strategy "tensor" ([1]).
    """

    name = "FP8 per tensor"

    def required(self, n: int, k: int) -> dict[str, TensorSpec]:
        return {"scale": TensorSpec(FLOAT, ((), (1,), (1, 1)))}

    def kept_scale(self, scale: Tensor, n: int, k: int) -> Tensor:
        return scale.float().view(1, 1).repeat(n, 1)


class Mxfp8(_Fp8):
    """e4m3 codes, one power of two per 32 values of a row (edges rounded up).

    Source: OCP Microscaling Formats 1.0. HY-V4's FP8 release, compressed-tensors and torchao write the biased exponent
    (bias 127) as uint8 or float8_e8m0fnu.
    """

    name = "MXFP8"

    def required(self, n: int, k: int) -> dict[str, TensorSpec]:
        return {"scale": TensorSpec(E8M0, (scale_shape((n, k), 1, MX_GROUP),))}

    def kept_scale(self, scale: Tensor, n: int, k: int) -> Tensor:
        return _e8m0(scale)


class Fp8Packed(_Fp8):
    """e4m3 codes, one power of two per 128 values of a row, four exponents per int32, the first in its low byte.

    Source: DeepGEMM's layout for Blackwell (`get_mn_major_tma_aligned_packed_ue8m0_tensor`), which trainers send. Its
    tensor is MN-major in memory; the shape is [N, ceil(K/512)]. Kept as MXFP8, with each scale repeated four times.
    """

    name = "FP8 packed UE8M0"

    def required(self, n: int, k: int) -> dict[str, TensorSpec]:
        return {"scale": TensorSpec(("I32",), (scale_shape((n, k), 1, 4 * SCALE_BLOCK),))}

    def kept_scale(self, scale: Tensor, n: int, k: int) -> Tensor:
        exponents = scale.view(torch.uint8).repeat_interleave(SCALE_BLOCK // MX_GROUP, 1)
        return _e8m0(exponents[:, : scale_shape((n, k), 1, MX_GROUP)[1]].contiguous())


class Nvfp4ModelOpt(Encoding):
    """e2m1 codes, one e4m3 scale per 16 values of a row, one global factor; value = code * scale * factor.

    Source: ModelOpt's `NVFP4QTensor`. Two codes per byte, the even column in the low half.
    """

    name = "NVFP4"
    weight_dtypes = ("U8",)
    per_element = 2
    global_role = "scale_2"

    def required(self, n: int, k: int) -> dict[str, TensorSpec]:
        return {
            "scale": TensorSpec(("F8_E4M3",), (scale_shape((n, k), 1, NVFP4_GROUP),)),
            self.global_role: TensorSpec(("F32",), ((), (1,))),
        }

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp4Matrix:
        codes, factor = tensors["weight"], self.factor(tensors[self.global_role])
        return Fp4Matrix(codes, tensors["scale"], factor.view(1, 1).repeat(codes.shape[0], 1))

    def factor(self, stored: Tensor) -> Tensor:
        return stored


class Nvfp4CompressedTensors(Nvfp4ModelOpt):
    """NVFP4 with a global divisor; value = code * scale / divisor. The reciprocal is rounded to fp32 once.

    Source: compressed-tensors' `NVFP4PackedCompressor`.
    """

    name = "NVFP4 (divisor)"
    global_role = "global_scale"

    def bad_values(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
        # The reciprocal of infinity is 0, which is a valid scale.
        divisor = tensors["global_scale"].item()
        return {} if math.isfinite(divisor) and divisor else {"global_scale": ("a finite divisor", f"{divisor}")}

    def factor(self, stored: Tensor) -> Tensor:
        return stored.reciprocal()


class Mxfp4(Encoding):
    """e2m1 codes, one power of two per 32 values of a row.

    Source: OCP Microscaling Formats 1.0; Quark, compressed-tensors and torchao write the same.
    """

    name = "MXFP4"
    weight_dtypes = ("U8",)
    per_element = 2

    def required(self, n: int, k: int) -> dict[str, TensorSpec]:
        return {"scale": TensorSpec(E8M0, (scale_shape((n, k), 1, MX_GROUP),))}

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp4Matrix:
        return Fp4Matrix(tensors["weight"], _e8m0(tensors["scale"]))


class Int4(Encoding):
    """Eight 4-bit integers per int32, the first in its low bits; value = (integer - zero point) * scale.

    Source: compressed-tensors' `PackedQuantizationCompressor` with 4 bits. Integers are stored with an offset of 8, and
    so are zero points, packed along N; a missing zero point is 0. A scale covers K, 32, 64, 128 or 256 consecutive
    columns, or the columns with its number in `weight_g_idx`. Rounded to bf16, as in compressed-tensors itself: no
    release quantizes this projection to INT4 on purpose, but recipes that target every Linear do.
    """

    name = "INT4"
    is_native = False
    weight_dtypes = ("I32",)
    per_element = 8
    optional_roles = ("zero_point", "g_idx")

    def required(self, n: int, k: int) -> dict[str, TensorSpec]:
        sizes = (k, *(size for size in (32, 64, 128, 256) if k % size == 0))
        return {
            "scale": TensorSpec(FLOAT, tuple((n, k // size) for size in sizes)),
            "shape": TensorSpec(("I64", "I32"), ((2,),)),
        }

    def optional(self, n: int, k: int, scale: Header) -> dict[str, TensorSpec]:
        zero_points = (-(-n // 8), scale.shape[1])
        return {"zero_point": TensorSpec(("I32",), (zero_points,)), "g_idx": TensorSpec(("I32", "I64"), ((k,),))}

    def bad_values(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
        n, words = tensors["weight"].shape
        groups = tensors["scale"].shape[1]
        bad = {}
        if not (tensors["scale"].float().abs() <= 2.0**96).all():  # times 15, the largest difference of two integers
            bad["scale"] = "magnitudes up to 2**96", "larger ones or NaN"
        if (shape := tensors["shape"].tolist()) != [n, 8 * words]:
            bad["shape"] = f"{[n, 8 * words]}, for 4-bit integers", f"{shape}"
        index = tensors.get("g_idx")
        if index is not None and not ((index >= 0) & (index < groups)).all():
            bad["g_idx"] = f"group numbers from 0 to {groups - 1}", "others"
        return bad

    def bind(self, tensors: Mapping[str, Tensor]) -> DenseMatrix:
        values = _nibbles(tensors["weight"]).float()
        scale = tensors["scale"].float()
        n, k = values.shape
        zero = torch.zeros_like(scale)
        if "zero_point" in tensors:
            zero = _nibbles(tensors["zero_point"].T.contiguous()).T[:n].float()
        if "g_idx" in tensors:
            index = tensors["g_idx"].long()
        else:
            index = torch.arange(k, device=scale.device) // (k // scale.shape[1])
        return DenseMatrix(((values - zero[:, index]) * scale[:, index]).bfloat16())


ENCODINGS: tuple[Encoding, ...] = (
    Bf16(), F16(), F32(),
    Fp8Block(), Fp8Row(), Fp8Tensor(), Mxfp8(), Fp8Packed(),
    Nvfp4ModelOpt(), Nvfp4CompressedTensors(), Mxfp4(),
    Int4(),
)  # fmt: skip


def fp8_matrix(codes: Tensor, scale: Tensor) -> Fp8Matrix:
    if codes.dtype == torch.float8_e4m3fnuz:
        return from_e4m3fnuz(codes, scale)
    return Fp8Matrix(codes, scale)


def from_e4m3fnuz(codes: Tensor, scale: Tensor) -> Fp8Matrix:  # stand-in until kernels/ has it
    """The bits of an e4m3fnuz code mean half as much as in e4m3fn."""
    if scale.dtype == torch.float32:
        half = scale / 2
    else:
        bits = scale.view(torch.uint8)
        half = torch.where((bits == 0) | (bits == 255), bits, bits - 1).view(scale.dtype)
    return Fp8Matrix(codes.view(torch.float8_e4m3fn), half)


def _e8m0(scale: Tensor) -> Tensor:
    return scale.view(torch.float8_e8m0fnu)


def _nibbles(words: Tensor) -> Tensor:
    """int32 [R, C] -> int32 [R, 8 * C] with values from -8 to 7."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts & 0xF) - 8).flatten(1)
