"""How the GEMMs for Hopper look weights up, in Gluon: layouts of words and tables, and tables in shared memory."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from convert_w4a8.kernels.gemm.device_code import LOOK_UP

_LOOK_UP = gl.constexpr(LOOK_UP.value)


@gluon.constexpr_function
def _words_layout(block_n, warps):
    """Return the layout in which a thread reads words [4, 4·block_n]: those that its warp's tiles give it."""
    tiles = [[0, 64 << i] for i in range((block_n // 16).bit_length() - 1)]
    own = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [1, 0], [2, 0], *tiles[own:]],
        lane_bases=[[0, 2], [0, 4], [0, 8], [0, 16], [0, 32]],
        warp_bases=tiles[:own],
        block_bases=[],
        shape=[4, 4 * block_n],
    )


@gluon.constexpr_function
def _tables_layout(block_n, warps):
    """Return the layout in which a thread reads tables [block_n]: those of the rows whose words it has."""
    tiles = [[16 << i] for i in range((block_n // 16).bit_length() - 1)]
    own = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[8], *tiles[own:]],
        lane_bases=[[0], [0], [1], [2], [4]],
        warp_bases=tiles[:own],
        block_bases=[],
        shape=[block_n],
    )


@gluon.jit
def _columns(table):
    """Return the low and the high words of tables int64 [tiles, 8] for negative codes, then for positive ones."""
    SIGNS: gl.constexpr = -0x7F7F7F80  # 0x80 in every byte
    low = table.to(gl.int32)
    high = (table >> 32).to(gl.int32)
    return low, high, (low & -256) ^ SIGNS, high ^ SIGNS


@gluon.jit
def _spread(table):
    """Return `_columns` of tables int64 [tiles, 8], to be used for words."""
    low, high, low_positive, high_positive = _columns(table[None, :, :, None, None])
    return low, high, low_positive, high_positive


@gluon.jit
def _look_up(words, first, second, BLOCK_N: gl.constexpr):
    """Return FP8 weights [BLOCK_N, 128] of words [4, BLOCK_N/16, 8, 4, 2].

    first, second: the four words of the tables (`_columns`) of rows n % 16 < 8, and of those 8 further.
    """
    first_low, first_high, first_low_positive, first_high_positive = first
    second_low, second_high, second_low_positive, second_high_positive = second
    upper, lower = gl.inline_asm_elementwise(
        _LOOK_UP,
        "=r,=r,r,r,r,r,r,r,r,r,r",
        [
            words,
            first_low,
            first_high,
            first_low_positive,
            first_high_positive,
            second_low,
            second_high,
            second_low_positive,
            second_high_positive,
        ],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return _weights(upper, lower, BLOCK_N)


@gluon.jit
def _weights(upper, lower, BLOCK_N: gl.constexpr):
    """Return FP8 weights [BLOCK_N, 128] of four bytes of a row n % 16 < 8 each, and of the row 8 further."""
    four = gl.join(upper, lower)
    even = gl.join(four.to(gl.int8), (four >> 8).to(gl.int8))
    odd = gl.join((four >> 16).to(gl.int8), (four >> 24).to(gl.int8))
    weights = gl.join(even, odd).to(gl.float8e4nv, bitcast=True)
    return weights.permute((1, 5, 2, 0, 4, 3, 7, 6)).reshape((BLOCK_N, 128))


_SET_UP = gl.constexpr("""
{
.shared .align 16 .b8 entries[4096];
.reg .pred there;
.reg .b32 place, to, low, high, next_low, next_high, positive, positive_high;
.reg .b64 from;
mov.u32 $0, entries;
mov.u32 place, %tid.x;
setp.lt.u32 there, place, 128;
shl.b32 place, place, 4;
cvt.u64.u32 from, place;
add.u64 from, from, $1;
mad.lo.u32 to, place, 2, $0;
@there ld.global.v4.b32 {low, high, next_low, next_high}, [from];
and.b32 positive, low, 0xFFFFFF00;
xor.b32 positive, positive, 0x80808080;
xor.b32 positive_high, high, 0x80808080;
@there st.shared.v4.b32 [to], {low, high, positive, positive_high};
and.b32 positive, next_low, 0xFFFFFF00;
xor.b32 positive, positive, 0x80808080;
xor.b32 positive_high, next_high, 0x80808080;
@there st.shared.v4.b32 [to + 16], {next_low, next_high, positive, positive_high};
}
""")
"""Put 256 tables into shared memory, each as it is and with its signs flipped (`_columns`): two a thread."""


@gluon.jit
def _entries_in_shared(tables):
    """Return the address in shared memory where the distinct tables are after the next barrier."""
    return gl.inline_asm_elementwise(_SET_UP, "=r,l", [tables], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _entries(entries, index):
    """Return the four words of each of the tables with these indices uint8, as `_columns` does."""
    return gl.inline_asm_elementwise(
        "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,r",
        [entries + index.to(gl.int32) * 16],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=False,
        pack=1,
    )
