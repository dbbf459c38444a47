"""The PTX of prefill's decoding, executed instruction by instruction: no test without a GPU runs it."""

import re

import torch

from indexproj.kernels import Fp4Matrix, Fp8Matrix
from indexproj.kernels.tile import DECODE_E2M1_PTX, DECODE_E4M3_PTX


def bf16(bits):
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()


def bits(value):
    rounded = value.to(torch.bfloat16)
    assert torch.equal(rounded.double(), value)  # exact products need no rounding
    return rounded.view(torch.int16).int().item() & 0xFFFF


def fma_bf16x2(a, b, c):
    low, high = (
        bits(bf16(a >> shift & 0xFFFF) * bf16(b >> shift & 0xFFFF) + bf16(c >> shift & 0xFFFF)) for shift in (0, 16)
    )
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


def execute(ptx, **registers):
    for line in re.sub(r"\.reg[^;]*;|[{}]", "", ptx).split(";"):
        if line.strip():
            operation, operands = line.split(maxsplit=1)
            to, *sources = (operand.strip() for operand in operands.split(","))
            values = [registers[name] if name in registers else int(name, 0) for name in sources]
            registers[to] = OPERATIONS[operation](*values)
    return registers


def halves(*words):
    return [half for word in words for half in (word & 0xFFFF, word >> 16)]


def as_bits(values):
    return (values.to(torch.bfloat16).view(torch.int16).int().flatten() & 0xFFFF).tolist()


def four_codes():
    """Every code in every place of a register."""
    for code in range(256):
        yield code, (code + 77) % 256, 255 - code, (code * 5 + 3) % 256


def test_ptx_decodes_every_e4m3_code():
    codes = torch.arange(256, dtype=torch.uint8)
    matrix = Fp8Matrix(codes.view(1, 256).view(torch.float8_e4m3fn), torch.ones(1, 1))
    expected = as_bits(matrix.dequantize())
    for four in four_codes():
        found = execute(DECODE_E4M3_PTX.value, **{"$2": int.from_bytes(bytes(four), "little")})
        assert halves(found["$0"], found["$1"]) == [expected[code] for code in four]


def test_ptx_decodes_every_e2m1_code():
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256)
    scale = torch.ones(1, 16).to(torch.float8_e8m0fnu)
    expected = as_bits(Fp4Matrix(codes, scale).dequantize())
    for four in four_codes():
        found = execute(DECODE_E2M1_PTX.value, **{"$4": int.from_bytes(bytes(four), "little")})
        assert halves(found["$0"], found["$1"]) == [expected[2 * code] for code in four]
        assert halves(found["$2"], found["$3"]) == [expected[2 * code + 1] for code in four]
