"""The lookups that kernels do in PTX, run here by what its manual says of each instruction: all codes at all places."""

import random
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest

DEVICE_CODE: Any = pytest.importorskip("convert_w4a8.kernels.gemm.device_code", reason="Triton is not installed")
_ALL = 0xFFFFFFFF


def _prmt(low: int, high: int, selector: int) -> int:
    """Permute bytes; a selector's top bit takes the sign of the byte for all of its bits."""
    source = high << 32 | low
    found = 0
    for place in range(4):
        chosen = selector >> 4 * place & 15
        byte = source >> 8 * (chosen & 7) & 255
        found |= (255 * (byte >> 7) if chosen & 8 else byte) << 8 * place
    return found


def _lop3(a: int, b: int, c: int, table: int) -> int:
    """Combine bits: bit 4·a + 2·b + c of the table."""
    return sum((table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32))


_INSTRUCTIONS: Mapping[str, Callable[..., int]] = {
    "prmt.b32": _prmt,
    "lop3.b32": _lop3,
    "shl.b32": lambda a, b: a << b & _ALL,
    "shr.u32": lambda a, b: a >> b,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "mul.hi.u32": lambda a, b: a * b >> 32,
}


def run(assembly: str, inputs: list[int], outputs: int) -> list[int]:
    """Return the outputs $0 … of a block of PTX whose further operands are the inputs."""
    values = {f"${outputs + place}": value for place, value in enumerate(inputs)}
    for line in assembly.strip("{}\n ").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, operands = line.split(maxsplit=1)
        target, *sources = re.split(r",\s*", operands.strip())
        values[target] = _INSTRUCTIONS[name](*(values[s] if s in values else int(s, 0) for s in sources))
    return [values[f"${place}"] for place in range(outputs)]


def number(byte: int) -> int:
    """Return a byte of sign and magnitude, such as FP8's order them."""
    return (byte & 127) * (-1 if byte & 128 else 1)


def expected(word: int, tables: list[list[int]]) -> list[int]:
    """Return what the eight codes of a word mean: four of each table, negated where the top bit is not set, 0 as 0."""
    codes = [word >> 4 * place & 15 for place in range(8)]
    return [
        number(tables[place // 4][code & 7]) if code & 8 else -number(tables[place // 4][code]) if code else 0
        for place, code in enumerate(codes)
    ]


def words_of(table: list[int]) -> tuple[int, int]:
    """Return the low and the high four bytes."""
    return int.from_bytes(table[:4], "little"), int.from_bytes(table[4:], "little")


def words() -> list[int]:
    """Return words with each code at each place, beside random ones."""
    chance = random.Random(0)
    others = [chance.getrandbits(32) for _ in range(128)]
    return [other & ~(15 << 4 * (i % 8)) | i // 8 << 4 * (i % 8) for i, other in enumerate(others)]


@pytest.mark.parametrize("word", words())
def test_a_table_of_any_signs(word: int) -> None:
    """By both tables at once: as stored, and with the signs flipped and −0 for the code 0."""
    chance = random.Random(word)
    tables = [[chance.randrange(256) for _ in range(8)] for _ in range(2)]
    inputs = [word]
    for table in tables:
        low, high = words_of(table)
        inputs += [low, high, low & 0xFFFFFF00 ^ 0x80808080, high ^ 0x80808080]
    found = run(DEVICE_CODE.LOOK_UP.value, inputs, 2)
    assert [number(word >> 8 * place & 255) for word in found for place in range(4)] == expected(word, tables)


@pytest.mark.parametrize("by_products", [False, True])
@pytest.mark.parametrize("word", words())
def test_multiples_of_a_scale_apart(word: int, by_products: bool) -> None:
    """Positive and negative weights, one of which is 0, times the sign of the scale."""
    lookups = pytest.importorskip("convert_w4a8.kernels.gemm.apart", reason="Triton has no Gluon here")
    assembly = lookups._LOOK_UP_APART_BY_PRODUCTS if by_products else lookups._LOOK_UP_APART
    chance = random.Random(word)
    signs = [chance.choice((-1, 1)) for _ in range(2)]
    tables = [
        [chance.randrange(127) | (128 if sign > 0 else 0) for _ in range(8)] for sign in signs
    ]  # −8 … −1 times it
    inputs = [word]
    for table in tables:
        low, high = words_of(table)
        inputs += [low & 0x7F7F7F00, high & 0x7F7F7F7F, low & 0x7F7F7F7F]
    found = run(assembly.value, [*inputs, *([1 << 16] if by_products else [])], 4)
    apart = [[number(word >> 8 * place & 255) for place in range(4)] for word in found]
    for positive, negative in ((apart[0], apart[1]), (apart[2], apart[3])):
        assert all(p >= 0 <= n and p * n == 0 for p, n in zip(positive, negative, strict=True))
    both = [
        sign * (p - n)
        for sign, positive, negative in zip(signs, apart[::2], apart[1::2], strict=True)
        for p, n in zip(positive, negative, strict=True)
    ]
    assert both == expected(word, tables)
