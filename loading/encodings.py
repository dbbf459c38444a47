"""How a matrix looks on disk, and how it becomes a kernel-ready one.

An encoding is recognised by the dtypes and shapes that the checkpoint holds; config files have no say in it. A new one
is a class with the tensors it consists of and a `bind`; ENCODINGS lists them all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.formats import MX_GROUP, NVFP4_GROUP, SCALE_BLOCK, scale_shape
from ..kernels.matrix import DenseMatrix, Fp4Matrix, Fp8Matrix, Matrix
from .headers import Header
from .names import ROLES, SPELLINGS, UNUSED
from .problems import Problem

FP8 = ("F8_E4M3", "F8_E4M3FNUZ")
FLOAT = ("F32", "BF16", "F16")
E8M0 = ("F8_E8M0", "U8")


@dataclass(frozen=True)
class Spec:
    """What one tensor of an encoding may be: any of the dtypes, as safetensors calls them, in any of the shapes."""

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
        is_native: True if codes and values are kept as stored; False if they are decoded to bf16.
        weight_dtypes: of its "weight", as safetensors calls them.
        per_element: values along K in one element of it.
        scale_name: how most checkpoints of it spell the role "scale"; for messages.
        is_open: True if optional tensors may come beside the required ones: only the end of a load completes it.
    """

    name: str
    is_native = True
    weight_dtypes: tuple[str, ...]
    per_element = 1
    scale_name = "weight_scale"
    is_open = False

    def scales(self, n: int, k: int) -> dict[str, Spec]:
        """role -> what has to come beside a weight [N, K]."""
        return {}

    def options(self, n: int, k: int, scale: Header) -> dict[str, Spec]:
        """role -> what may come beside it and that scale, and is used then."""
        return {}

    def faults(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
        """role -> (which values are expected, what is there), for tensors that cannot be bound because of theirs."""
        return {}

    @abstractmethod
    def bind(self, tensors: Mapping[str, Tensor]) -> Matrix:
        """The matrix, from role -> contiguous tensor; in their memory where nothing has to change."""


class Bf16(Encoding):
    """Plain bf16, kept: it is what the kernels multiply.

    Source: GLM-5, NVIDIA's and AMD's FP4 releases, and `weights_proj` in every DeepSeek-V3.2 and GLM-5 release.
    """

    name = "BF16"
    weight_dtypes = ("BF16",)

    def bind(self, tensors: Mapping[str, Tensor]) -> DenseMatrix:
        return DenseMatrix(tensors["weight"].bfloat16())


class F16(Bf16):
    """fp16, rounded to bf16 (8 of 11 significand bits): no release has it, so no kernel reads it."""

    name = "F16"
    is_native = False
    weight_dtypes = ("F16",)


class F32(Bf16):
    """fp32, rounded to bf16, without loss where it was bf16 before, as weights that trainers send are (prime-rl)."""

    name = "F32"
    is_native = False
    weight_dtypes = ("F32",)


class Fp8Block(Encoding):
    """e4m3 codes and one scale per 128x128 block, counting ragged ones; value = code * scale. Codes are kept.

    Source: DeepSeek-V3's `inference/kernel.py` (`weight_dequant`) for fp32 scales, compressed-tensors' FP8_BLOCK for
    bf16 ones, DeepSeek's `scale_fmt` "ue8m0" for E8M0 ones, also as uint8; ModelOpt's FP8_PB_WO has the grid in four
    dimensions. All are kept in fp32, which is exact.
    """

    name = "FP8 128x128"
    weight_dtypes = FP8
    scale_name = "weight_scale_inv"

    def scales(self, n: int, k: int) -> dict[str, Spec]:
        rows, columns = scale_shape((n, k))
        return {"scale": Spec((*FLOAT, *E8M0), ((rows, columns), (rows, 1, columns, 1)))}

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp8Matrix:
        codes = tensors["weight"]
        return _fp8(codes, _fp32(tensors["scale"]).view(scale_shape(tuple(codes.shape))))


class Fp8Row(Encoding):
    """e4m3 codes and one scale per row; value = code * scale. Codes are kept.

    Source: compressed-tensors' strategy "channel" ([N, 1]); Quark and PyTorch write [N].
    """

    name = "FP8 per row"
    weight_dtypes = FP8

    def scales(self, n: int, k: int) -> dict[str, Spec]:
        return {"scale": Spec(FLOAT, ((n, 1), (n,)))}

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp8Matrix:
        return _fp8(tensors["weight"], _fp32(tensors["scale"]).view(-1, 1))


class Fp8Tensor(Encoding):
    """e4m3 codes and one scale; value = code * scale. Codes are kept, the scale is repeated for every row.

    Source: ModelOpt's FP8 (scalar), compressed-tensors' strategy "tensor" ([1]).
    """

    name = "FP8 per tensor"
    weight_dtypes = FP8

    def scales(self, n: int, k: int) -> dict[str, Spec]:
        return {"scale": Spec(FLOAT, ((), (1,), (1, 1)))}

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp8Matrix:
        rows = tensors["weight"].shape[0]
        return _fp8(tensors["weight"], _fp32(tensors["scale"]).view(1, 1).repeat(rows, 1))


class Mxfp8(Encoding):
    """e4m3 codes and one power of two per 32 values of a row, counting ragged ones. Kept.

    Source: OCP Microscaling Formats 1.0; HY-V4's FP8 release, compressed-tensors and torchao write the scale's
    exponent, biased by 127, as uint8 or float8_e8m0fnu.
    """

    name = "MXFP8"
    weight_dtypes = FP8

    def scales(self, n: int, k: int) -> dict[str, Spec]:
        return {"scale": Spec(E8M0, (scale_shape((n, k), 1, MX_GROUP),))}

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp8Matrix:
        return _fp8(tensors["weight"], _e8m0(tensors["scale"]))


class Fp8Packed(Encoding):
    """e4m3 codes and one power of two per 128 values of a row, four exponents to an int32, the first in its low byte.

    Source: DeepGEMM's layout for Blackwell (`get_mn_major_tma_aligned_packed_ue8m0_tensor`), which trainers have been
    seen to send. Codes are kept, and the scales become MXFP8's: each one four times. In memory DeepGEMM's tensor is
    MN-major; by index it is [N, ceil(K/512)] all the same.
    """

    name = "FP8 packed UE8M0"
    weight_dtypes = FP8

    def scales(self, n: int, k: int) -> dict[str, Spec]:
        return {"scale": Spec(("I32",), (scale_shape((n, k), 1, 4 * SCALE_BLOCK),))}

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp8Matrix:
        codes = tensors["weight"]
        exponents = tensors["scale"].view(torch.uint8).repeat_interleave(SCALE_BLOCK // MX_GROUP, 1)
        groups = scale_shape(tuple(codes.shape), 1, MX_GROUP)[1]
        return _fp8(codes, _e8m0(exponents[:, :groups].contiguous()))


class _Nvfp4(Encoding):
    weight_dtypes = ("U8",)
    per_element = 2
    global_role: str

    def scales(self, n: int, k: int) -> dict[str, Spec]:
        return {
            "scale": Spec(("F8_E4M3",), (scale_shape((n, k), 1, NVFP4_GROUP),)),
            self.global_role: Spec(("F32",), ((), (1,))),
        }

    @staticmethod
    def with_factor(tensors: Mapping[str, Tensor], factor: Tensor) -> Fp4Matrix:
        codes = tensors["weight"]
        return Fp4Matrix(codes, tensors["scale"], factor.view(1, 1).repeat(codes.shape[0], 1))


class Nvfp4ModelOpt(_Nvfp4):
    """e2m1 codes, one e4m3 scale per 16 values of a row, one factor for all; value = code * scale * factor. Kept.

    Source: ModelOpt's `NVFP4QTensor`. Two codes to a byte, that of the even column in the low half.
    """

    name = "NVFP4"
    global_role = "scale_2"

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp4Matrix:
        return self.with_factor(tensors, tensors["scale_2"])


class Nvfp4CompressedTensors(_Nvfp4):
    """The same with a divisor for all; value = code * scale / divisor. Kept; the reciprocal is rounded to fp32 once.

    Source: compressed-tensors' `NVFP4PackedCompressor`.
    """

    name = "NVFP4 (divisor)"
    global_role = "global_scale"

    def faults(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
        # The reciprocal of infinity is 0, which would do as a scale.
        divisor = tensors["global_scale"].item()
        return {} if math.isfinite(divisor) and divisor else {"global_scale": ("a finite divisor", f"{divisor}")}

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp4Matrix:
        return self.with_factor(tensors, tensors["global_scale"].reciprocal())


class Mxfp4(Encoding):
    """e2m1 codes and one power of two per 32 values of a row. Kept.

    Source: OCP Microscaling Formats 1.0; Quark, compressed-tensors and torchao write it alike.
    """

    name = "MXFP4"
    weight_dtypes = ("U8",)
    per_element = 2

    def scales(self, n: int, k: int) -> dict[str, Spec]:
        return {"scale": Spec(E8M0, (scale_shape((n, k), 1, MX_GROUP),))}

    def bind(self, tensors: Mapping[str, Tensor]) -> Fp4Matrix:
        return Fp4Matrix(tensors["weight"], _e8m0(tensors["scale"]))


class Int4(Encoding):
    """Eight 4-bit integers to an int32, the first in its low bits; value = (integer - zero point) * scale.

    Source: compressed-tensors' `PackedQuantizationCompressor` with 4 bits. Integers are stored plus 8; so are zero
    points, packed along N. Without one it is 0. Scales are shared by K, 32, 64, 128 or 256 columns in turn, or, with
    `weight_g_idx`, by the columns that it gives the same number. Decoded and rounded to bf16, as compressed-tensors
    itself does: no release quantizes this projection so on purpose, it happens to recipes that name every Linear.
    """

    name = "INT4"
    is_native = False
    weight_dtypes = ("I32",)
    per_element = 8
    is_open = True

    def scales(self, n: int, k: int) -> dict[str, Spec]:
        sizes = (k, *(size for size in (32, 64, 128, 256) if k % size == 0))
        return {
            "scale": Spec(FLOAT, tuple((n, k // size) for size in sizes)),
            "shape": Spec(("I64", "I32"), ((2,),)),
        }

    def options(self, n: int, k: int, scale: Header) -> dict[str, Spec]:
        groups = scale.shape[1]
        return {"zero_point": Spec(("I32",), ((-(-n // 8), groups),)), "g_idx": Spec(("I32", "I64"), ((k,),))}

    def faults(self, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, str]]:
        n, words = tensors["weight"].shape
        groups = tensors["scale"].shape[1]
        found = {}
        if not (tensors["scale"].float().abs() <= 2.0**96).all():  # times 15, the largest difference of integers
            found["scale"] = "scales of a size up to 2**96", "others"
        if (shape := tensors["shape"].tolist()) != [n, 8 * words]:
            found["shape"] = f"{[n, 8 * words]}, for 4-bit integers", f"{shape}"
        index = tensors.get("g_idx")
        if index is not None and not ((index >= 0) & (index < groups)).all():
            found["g_idx"] = f"numbers of the {groups} groups", "others"
        return found

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


@dataclass(frozen=True)
class _Attempt:
    """An encoding held against what there is: specs of all its tensors but the weight, and which of them do not fit."""

    encoding: Encoding
    specs: Mapping[str, Spec]
    misfits: tuple[str, ...]

    @classmethod
    def of(cls, encoding: Encoding, weight: Header, headers: Mapping[str, Header]) -> _Attempt:
        n, k = weight.shape[0], weight.shape[1] * encoding.per_element
        specs = encoding.scales(n, k)
        misfits = [role for role, spec in specs.items() if not spec.fits(headers.get(role))]
        if not misfits and specs:
            options = encoding.options(n, k, headers["scale"])
            misfits = [role for role, spec in options.items() if role in headers and not spec.fits(headers[role])]
            specs |= options
        return cls(encoding, specs, tuple(misfits))

    @property
    def distance(self) -> int:
        """From what there is; the scale counts twice, as it tells encodings apart."""
        return len(self.misfits) + ("scale" in self.misfits)

    @property
    def known(self) -> set[str]:
        return {"weight", *self.specs, UNUSED} if self.specs else {"weight"}

    def spelling(self, role: str) -> str:
        return self.encoding.scale_name if role == "scale" else SPELLINGS[role]

    def describe(self, role: str) -> str:
        return f"{self.spelling(role)} {self.specs[role]} ({self.encoding.name})"


def recognise(matrix: str, headers: Mapping[str, Header]) -> tuple[Encoding | None, list[Problem]]:
    """The encoding of a matrix, or every reason why it has none.

    Args:
        matrix: name up to the role, "model.layers.0.self_attn.indexer.wk"; for messages.
        headers: role -> header of what there is of it.
    """
    weight = headers.get("weight")
    candidates = [encoding for encoding in ENCODINGS if weight and weight.dtype in encoding.weight_dtypes]
    if weight is None:
        known = [header for role, header in headers.items() if role in ROLES.values()]
        file = next(iter(headers.values())).file if headers else ""
        found = f"only {_listing(known)}" if known else "no tensor of it"
        problem = Problem(f"{matrix}.weight", file, "a weight", found)
    elif not candidates:
        dtypes = dict.fromkeys(dtype for encoding in ENCODINGS for dtype in encoding.weight_dtypes)
        problem = Problem(weight.name, weight.file, f"a weight in {' or '.join(dtypes)}", str(weight))
    elif len(weight.shape) != 2 or 0 in weight.shape:
        problem = Problem(weight.name, weight.file, "a matrix [N, K]", str(weight))
    else:
        return _closest(matrix, weight, headers, candidates)
    return None, [problem, *_strangers(headers, ROLES.values())]


def _closest(
    matrix: str, weight: Header, headers: Mapping[str, Header], candidates: list[Encoding]
) -> tuple[Encoding | None, list[Problem]]:
    attempts = [_Attempt.of(encoding, weight, headers) for encoding in candidates]
    best = min(attempts, key=lambda attempt: attempt.distance)
    if not best.misfits and headers.keys() <= best.known:
        return best.encoding, []
    problems = []
    for role in best.misfits:
        # What would have been right: any scale, or whatever completes an encoding that is as close.
        rivals = [rival for rival in attempts if role == "scale" or rival.distance == best.distance]
        options = ", ".join(rival.describe(role if role == "scale" else rival.misfits[0]) for rival in rivals)
        expected = f"beside the {weight} weight {'one of ' if len(rivals) > 1 else ''}{options}"
        header = headers.get(role)
        if header is None:
            name = f"{matrix}.{best.spelling(role)}"
            problems.append(Problem(name, weight.file, expected, "no such tensor", _NO_SCALE))
        else:
            problems.append(Problem(header.name, header.file, expected, str(header)))
    problems += _strangers(headers, best.known)
    return (None, problems) if problems else (best.encoding, [])


_NO_SCALE = "without it the codes have no value: fetch the shard that holds it, or export the checkpoint again"


def _strangers(headers: Mapping[str, Header], known: Collection[str]) -> list[Problem]:
    problems = []
    for role, header in headers.items():
        if role not in ROLES.values():
            expected = f"no tensor but {', '.join(ROLES)}"
        elif role not in known:
            expected = f"nothing beside {_listing(headers[other] for other in headers if other in known)}"
        else:
            continue
        problems.append(Problem(header.name, header.file, expected, str(header)))
    return problems


def _listing(headers: Iterable[Header]) -> str:
    return ", ".join(f"{header.name.rpartition('.')[2]} ({header})" for header in headers)


def _fp8(codes: Tensor, scale: Tensor) -> Fp8Matrix:
    make = Fp8Matrix.from_e4m3fnuz if codes.dtype == torch.float8_e4m3fnuz else Fp8Matrix
    return make(codes, scale)


def _fp32(scale: Tensor) -> Tensor:
    return (_e8m0(scale) if scale.dtype == torch.uint8 else scale).float()


def _e8m0(scale: Tensor) -> Tensor:
    return scale.view(torch.float8_e8m0fnu)


def _nibbles(words: Tensor) -> Tensor:
    """[R, 8 * C] int32 from -8 to 7, of int32 [R, C]."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts & 0xF) - 8).flatten(1)
