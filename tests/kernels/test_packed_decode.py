"""The PTX of prefill's decoding, executed instruction by instruction: no test without a GPU runs it."""

import re

import pytest
import torch

from indexproj.kernels import Format, Matrix
from indexproj.kernels.tile import DECODE_E2M1_PTX, DECODE_E4M3_PTX, decode_e2m1_packed, decode_e4m3_packed


def halves(word):
    return word & 0xFFFF, word >> 16


def bits_of(values):
    """Of bf16 values that need no rounding."""
    rounded = values.bfloat16()
    assert torch.equal(rounded.double(), values.double())
    return (rounded.view(torch.int16).int().flatten() & 0xFFFF).tolist()


def fma_bf16x2(*words):
    a, b, c = (torch.tensor(halves(word)).to(torch.int16).view(torch.bfloat16).double() for word in words)
    low, high = bits_of(a * b + c)
    return high << 16 | low


def prmt(a, b, selector):
    """Byte i of the result is byte (selector >> 4 * i) & 7 of b:a."""
    assert not selector & 0x8888  # bit 3 would replicate the sign
    source = (b << 32 | a).to_bytes(8, "little")
    return int.from_bytes(bytes(source[selector >> 4 * i & 7] for i in range(4)), "little")


OPERATIONS = {
    "mov.b32": lambda a: a,
    "prmt.b32": prmt,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "fma.rn.bf16x2": fma_bf16x2,
}


def execute(ptx, constraints, codes):
    """The bf16 bits in each output. One without & takes the register of the codes, as the compiler may decide."""
    *outputs, _ = constraints.split(",")
    place = {f"${i}": f"${i}" if "&" in output else f"${len(outputs)}" for i, output in enumerate(outputs)}
    registers = {f"${len(outputs)}": int.from_bytes(bytes(codes), "little")}
    for line in re.sub(r"\.reg[^;]*;|[{}]", "", ptx).split(";"):
        if line.strip():
            operation, operands = line.split(maxsplit=1)
            to, *sources = (place.get(operand.strip(), operand.strip()) for operand in operands.split(","))
            values = [registers[name] if name in registers else int(name, 0) for name in sources]
            registers[to] = OPERATIONS[operation](*values)
    return [halves(registers[place[f"${i}"]]) for i in range(len(outputs))]


CODES = torch.arange(256, dtype=torch.uint8).view(1, 256)
E4M3 = Matrix(Format.FP8_BLOCK, CODES.view(torch.float8_e4m3fn), torch.ones(1, 2))
E2M1 = Matrix(Format.MXFP4, CODES, torch.ones(1, 16).to(torch.float8_e8m0fnu))


@pytest.mark.parametrize(
    ("ptx", "decoder", "matrix", "per_code"),
    [(DECODE_E4M3_PTX, decode_e4m3_packed, E4M3, 1), (DECODE_E2M1_PTX, decode_e2m1_packed, E2M1, 2)],
    ids=["e4m3", "e2m1"],
)
def test_ptx_decodes_every_code(ptx, decoder, matrix, per_code):
    (constraints,), expected = re.findall(r'"(=.*,r)"', decoder.src), bits_of(matrix.dequantize())
    for code in range(256):
        codes = code, (code + 77) % 256, 255 - code, (code * 5 + 3) % 256
        found = execute(ptx.value, constraints, codes)
        for half in range(per_code):
            values = found[2 * half] + found[2 * half + 1]
            assert list(values) == [expected[per_code * each + half] for each in codes]
