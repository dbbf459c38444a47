"""Encodings: which tensors a matrix consists of on disk, and how they become a kernel-ready matrix.

To add one, write its `bind` function and list it in ENCODINGS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.formats import MX_GROUP, NVFP4_GROUP, SCALE_BLOCK, Format, scale_shape
from ..kernels.matrix import Matrix
from .headers import SPELLINGS, Header
from .problems import ranges
from .values import Faults, judge_scale

FP8 = ("F8_E4M3", "F8_E4M3FNUZ")
FLOAT = ("F32", "BF16", "F16")
E8M0 = ("F8_E8M0", "U8")
PACKED = {"U8": 2, "I32": 8}  # dtype of a weight -> values along K in one element; 1 in all others

Tensors = Mapping[str, Tensor]  # role -> contiguous tensor


@dataclass(frozen=True)
class TensorSpec:
    """What a tensor may be: any of the dtypes, as safetensors spells them, in any of the shapes."""

    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def fits(self, header: Header | None) -> bool:
        return header is not None and header.dtype in self.dtypes and header.shape in self.shapes

    def __str__(self) -> str:
        return f"{'/'.join(self.dtypes)} {'/'.join(str(list(shape)) for shape in self.shapes)}"


@dataclass(frozen=True, eq=False)
class Encoding:
    """One way to store a matrix [N, K]; dtypes are spelled as in safetensors."""

    name: str  # as the audit prints it
    weight_dtypes: tuple[str, ...]
    bind: Callable[[Tensors], Matrix]  # shares memory with the tensors where nothing changes
    # Of N and K: role -> each tensor beside the weight, the scale first.
    beside: Callable[[int, int], dict[str, TensorSpec]] = lambda n, k: {}
    # Of N, K and groups per row: role -> tensors that may be missing. Only the end of a load tells if they are.
    optional: Callable[[int, int, int], dict[str, TensorSpec]] | None = None
    # Faults that `bind` cannot handle or hides, and oddities, as `judge` returns them.
    check: Callable[[Tensors], tuple[Faults, list[str]]] = lambda tensors: ({}, [])
    exact: Callable[[Tensors], Tensor] | None = None  # the values [N, K] in fp64, if `bind` rounds them to bf16

    def misfits(self, headers: Mapping[str, Header]) -> dict[str, TensorSpec | None]:
        """Compares the tensors beside a "weight" of the right dtype with those of this encoding.

        Returns role -> spec of each tensor that is missing or wrong, None for each that has no role here.
        """
        weight = headers["weight"]
        n, k = weight.shape[0], weight.shape[1] * PACKED.get(weight.dtype, 1)
        specs = self.beside(n, k)
        wrong: dict[str, TensorSpec | None] = {r: spec for r, spec in specs.items() if not spec.fits(headers.get(r))}
        optional = self.optional(n, k, 0 if wrong else headers["scale"].shape[1]) if self.optional else {}
        if not wrong:
            wrong |= {r: spec for r, spec in optional.items() if r in headers and not spec.fits(headers[r])}
        return wrong | {role: None for role in headers if role not in {"weight", *specs, *optional}}

    def spelling(self, role: str) -> str:
        """Last part of the name of a tensor in that role, for messages."""
        return "weight_scale" if role == "scale" and self.bind is not _fp8_block else SPELLINGS[role]


def _bf16(tensors: Tensors) -> Matrix:
    """Rounds to bf16; no release stores this projection in fp16, and trainers such as prime-rl send bf16 as fp32.

    Source: GLM-5, NVIDIA's and AMD's FP4 releases, and `weights_proj` in every DeepSeek-V3.2 and GLM-5 release.
    """
    return Matrix(Format.BF16, tensors["weight"].bfloat16())


def _fp8_block(tensors: Tensors) -> Matrix:
    """One scale per 128x128 block (edges rounded up); value = code * scale.

    Source: DeepSeek-V3's `inference/kernel.py` (`weight_dequant`) with fp32 scales, compressed-tensors' FP8_BLOCK with
    bf16 scales, DeepSeek's `scale_fmt` "ue8m0" with E8M0 scales, also as uint8. ModelOpt's FP8_PB_WO stores the scales
    in four dimensions. All convert to fp32 exactly.
    """
    scale = tensors["scale"]
    scale = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
    return _fp8(Format.FP8_BLOCK, tensors, scale.view(scale_shape(tensors["weight"].shape)))


def _fp8_row(tensors: Tensors) -> Matrix:
    """One scale per row, or one for all, which is repeated for every row; value = code * scale.

    Source: compressed-tensors' strategy "channel" ([N, 1]), Quark and PyTorch ([N]); ModelOpt's FP8 (scalar) and
    compressed-tensors' strategy "tensor" ([1]). Under names of its own, torchao's `flatten_tensor_state_dict` of a
    `Float8Tensor`, as `Float8WeightOnlyConfig` makes it.
    """
    scale = tensors["scale"] if "scale" in tensors else tensors["row_scale"]
    return _fp8(Format.FP8_ROW, tensors, None, scale.float().view(-1, 1).expand(len(tensors["weight"]), 1).contiguous())


def _mxfp8(tensors: Tensors) -> Matrix:
    """One power of two per 32 values of a row (edges rounded up).

    Source: OCP Microscaling Formats 1.0. HY-V4's FP8 release, compressed-tensors and torchao write the biased exponent
    (bias 127) as uint8 or float8_e8m0fnu.
    """
    return _fp8(Format.MXFP8, tensors, tensors["scale"].view(torch.float8_e8m0fnu))


def _fp8_packed(tensors: Tensors) -> Matrix:
    """One power of two per 128 values of a row, four exponents per int32, the first in its low byte.

    Source: DeepGEMM's layout for Blackwell (`get_mn_major_tma_aligned_packed_ue8m0_tensor`), which trainers send. Its
    tensor is MN-major in memory; the shape is [N, ceil(K/512)]. Kept as MXFP8, with each scale repeated four times.
    """
    exponents = tensors["scale"].view(torch.uint8).repeat_interleave(SCALE_BLOCK // MX_GROUP, 1)
    groups = scale_shape(tensors["weight"].shape, 1, MX_GROUP)[1]
    return _fp8(Format.MXFP8, tensors, exponents[:, :groups].contiguous().view(torch.float8_e8m0fnu))


def _fp8(format: Format, tensors: Tensors, *scales: Tensor | None) -> Matrix:
    """Keeps e4m3fnuz codes, which mean half as much as in e4m3fn with 0x7F as 480, and halves the scales, exactly."""
    codes = tensors["weight"]
    if codes.dtype == torch.float8_e4m3fnuz:
        scales = tuple(None if scale is None else _halved(scale) for scale in scales)
    return Matrix(format, codes.view(torch.float8_e4m3fn), *scales)


def _halved(scale: Tensor) -> Tensor:
    if scale.dtype == torch.float8_e8m0fnu:
        return (scale.view(torch.uint8).clamp(min=1) - 1).view(scale.dtype)  # 2**-127 stays
    return scale / 2


def _nvfp4(tensors: Tensors) -> Matrix:
    """One e4m3 scale per 16 values of a row, one global factor; value = code * scale * factor.

    Two codes per byte, the even column in the low half. A divisor's reciprocal is rounded to fp32 once.

    Source: ModelOpt's `NVFP4QTensor`; compressed-tensors' `NVFP4PackedCompressor`, which has a divisor for the factor.
    """
    factor = tensors["scale_2"] if "scale_2" in tensors else tensors["global_scale"].reciprocal()
    factors = factor.view(1, 1).repeat(len(tensors["weight"]), 1)
    return Matrix(Format.NVFP4, tensors["weight"], tensors["scale"], factors)


def _mxfp4(tensors: Tensors) -> Matrix:
    """One power of two per 32 values of a row.

    Source: OCP Microscaling Formats 1.0; Quark, compressed-tensors and torchao write the same.
    """
    return Matrix(Format.MXFP4, tensors["weight"], tensors["scale"].view(torch.float8_e8m0fnu))


def _int4(tensors: Tensors) -> Matrix:
    """Eight 4-bit integers per int32, the first in its low bits; value = (integer - zero point) * scale.

    Integers are stored with an offset of 8, and so are zero points, packed along N; a missing zero point is 0. A scale
    covers K, 32, 64, 128 or 256 consecutive columns, or the columns with its number in `weight_g_idx`. Rounded to bf16:
    no release quantizes this projection to INT4 on purpose, but recipes that target every Linear do.

    Source: compressed-tensors' `PackedQuantizationCompressor` with 4 bits, which also decodes to bf16.
    """
    return Matrix(Format.BF16, _int4_values(tensors).bfloat16())


def _int4_values(tensors: Tensors) -> Tensor:
    numbers, scale, index = _int4_parts(tensors)
    return numbers * scale[:, index]


def _int4_parts(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Integers less their zero points [N, K] fp64, scales [N, groups] fp64, and the group of each column [K]."""
    numbers, scale = _nibbles(tensors["weight"]).double(), tensors["scale"].double()
    n, k = numbers.shape
    index = torch.arange(k, device=scale.device) // (k // scale.shape[1])
    if "g_idx" in tensors:
        index = tensors["g_idx"].long()
    if "zero_point" in tensors:
        numbers -= _nibbles(tensors["zero_point"].T.contiguous()).T[:n][:, index]
    return numbers, scale, index


def _int4_beside(n: int, k: int) -> dict[str, TensorSpec]:
    shapes = [(n, 1), *((n, k // size) for size in (32, 64, 128, 256) if k % size == 0)]
    return _scale(FLOAT, *shapes, shape=TensorSpec(("I64", "I32"), ((2,),)))


def _int4_optional(n: int, k: int, groups: int) -> dict[str, TensorSpec]:
    return {"zero_point": TensorSpec(("I32",), ((-(-n // 8), groups),)), "g_idx": TensorSpec(("I32", "I64"), ((k,),))}


def _int4_check(tensors: Tensors) -> tuple[Faults, list[str]]:
    n, words = tensors["weight"].shape
    groups = tensors["scale"].shape[1]
    faults: Faults = {}
    oddities: list[str] = []
    if (shape := tensors["shape"].tolist()) != [n, 8 * words]:
        faults["shape"] = f"{[n, 8 * words]}, for 4-bit integers", f"{shape}"
    empty = ~tensors["weight"].any(1)  # eight times -8 per word: nobody has written them
    if empty.all():
        faults["weight"] = "packed integers", "nothing but 0"
    elif empty.any():
        oddities.append(f"words of 0 in rows {ranges(empty.nonzero().flatten().tolist())}")
    index = tensors.get("g_idx")
    if index is not None and not ((index >= 0) & (index < groups)).all():
        faults["g_idx"] = f"group numbers from 0 to {groups - 1}", "others"
    if not faults:
        numbers, scale, index = _int4_parts(tensors)
        sizes = torch.zeros_like(scale).scatter_reduce_(1, index.expand(n, -1), numbers.abs(), "amax")
        judge_scale("scale", scale.float(), sizes.float(), 1, faults, oddities)
    return faults, oddities


def _nibbles(words: Tensor) -> Tensor:
    """int32 [R, C] -> int32 [R, 8 * C] with values from -8 to 7."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    return ((words[..., None] >> shifts & 0xF) - 8).flatten(1)


def _scale(dtypes: tuple[str, ...], *shapes: tuple[int, ...], **others: TensorSpec) -> dict[str, TensorSpec]:
    return {"scale": TensorSpec(dtypes, shapes), **others}


_GLOBAL = TensorSpec(("F32",), ((), (1,)))

ENCODINGS = (
    Encoding("BF16", ("BF16",), _bf16),
    *(Encoding(name, (name,), _bf16, exact=lambda tensors: tensors["weight"].double()) for name in ("F16", "F32")),
    Encoding(
        "FP8 128x128", FP8, _fp8_block,
        lambda n, k: _scale((*FLOAT, *E8M0), grid := scale_shape((n, k)), (grid[0], 1, grid[1], 1)),
    ),
    Encoding("FP8 per row", FP8, _fp8_row, lambda n, k: _scale(FLOAT, (n, 1), (n,))),
    Encoding(
        "FP8 per row (torchao)", ("F8_E4M3",), _fp8_row,
        lambda n, k: {"row_scale": TensorSpec(("F32", "BF16"), ((n, 1),))},
    ),
    Encoding("FP8 per tensor", FP8, _fp8_row, lambda n, k: _scale(FLOAT, (), (1,), (1, 1))),
    Encoding("MXFP8", FP8, _mxfp8, lambda n, k: _scale(E8M0, scale_shape((n, k), 1, MX_GROUP))),
    Encoding("FP8 packed UE8M0", FP8, _fp8_packed, lambda n, k: _scale(("I32",), (n, -(-k // 512)))),
    Encoding(
        "NVFP4", ("U8",), _nvfp4,
        lambda n, k: _scale(("F8_E4M3",), scale_shape((n, k), 1, NVFP4_GROUP), scale_2=_GLOBAL),
    ),
    Encoding(
        "NVFP4 (divisor)", ("U8",), _nvfp4,
        lambda n, k: _scale(("F8_E4M3",), scale_shape((n, k), 1, NVFP4_GROUP), global_scale=_GLOBAL),
    ),
    Encoding("MXFP4", ("U8",), _mxfp4, lambda n, k: _scale(E8M0, scale_shape((n, k), 1, MX_GROUP))),
    Encoding("INT4", ("I32",), _int4, _int4_beside, _int4_optional, _int4_check, _int4_values),
)  # fmt: skip
