"""Lookups of positive and negative weights apart, for tables that are multiples of a scale, in Gluon.

Where the tensor core has time, weights are looked up apart: positive and negative ones are two operands, and each has
zeros where the other one has weights. `prmt` makes these zeros of a nibble's top bit by itself (a selector's top bit
fills a byte with the sign of the one that it selects, and magnitudes have none), in place of the operations that spread
that bit over a byte and choose by it.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from convert_w4a8.kernels.gemm.hopper_lookups import _weights

# $4: eight nibbles, four of row g and four of row g + 8. $5, $6: magnitudes of row g for codes without the top bit, of
# 0 … 7; $7 with $6: for codes with it. $8 … $10: of row g + 8.
_LOOK_UP_APART = gl.constexpr("""
{
.reg .b32 other, high, other_high;
xor.b32 other, $4, 0x88888888;
shr.u32 high, $4, 16;
shr.u32 other_high, other, 16;
prmt.b32 $0, $5, $6, $4;
prmt.b32 $1, $7, $6, other;
prmt.b32 $2, $8, $9, high;
prmt.b32 $3, $10, $9, other_high;
}
""")
_LOOK_UP_APART_BY_PRODUCTS = gl.constexpr(
    _LOOK_UP_APART.value.replace("shr.u32", "mul.hi.u32").replace(", 16;", ", $11;")
)  # $11: 2¹⁶, which the compiler must not know


@gluon.jit
def _magnitudes(table):
    """Return words of tables int64 [tiles, 8] without signs: low of positive codes, high, and low of negative ones."""
    low = table.to(gl.int32)[None, :, :, None, None]
    high = (table >> 32).to(gl.int32)[None, :, :, None, None]
    return low & 0x7F7F7F00, high & 0x7F7F7F7F, low & 0x7F7F7F7F


@gluon.jit
def _look_up_apart(words, first, second, shift, BLOCK_N: gl.constexpr, BY_PRODUCTS: gl.constexpr):
    """Return what the weights of `_look_up` are without signs: of positive codes and of negative ones, else 0."""
    first_low, first_high, first_low_negative = _magnitudes(first)
    second_low, second_high, second_low_negative = _magnitudes(second)
    upper, upper_negative, lower, lower_negative = gl.inline_asm_elementwise(
        _LOOK_UP_APART_BY_PRODUCTS if BY_PRODUCTS else _LOOK_UP_APART,
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r",
        [words, first_low, first_high, first_low_negative, second_low, second_high, second_low_negative, shift],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return _weights(upper, lower, BLOCK_N), _weights(upper_negative, lower_negative, BLOCK_N)


@gluon.jit
def _signs(first, second, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    """Return the signs of what tables int64 [BLOCK_N/16, 8] are multiples of, float32 [BLOCK_N]: −1 is their last."""
    ONE: gl.constexpr = 0x3F800000
    SIGN: gl.constexpr = -0x80000000
    last = gl.join((first >> 32).to(gl.int32), (second >> 32).to(gl.int32)).permute((0, 2, 1)).reshape((BLOCK_N,))
    last = gl.convert_layout(last, LAYOUT, assert_trivial=True)
    return (((last ^ -1) & SIGN) | ONE).to(gl.float32, bitcast=True)
