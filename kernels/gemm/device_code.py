"""What the Triton GEMMs of this directory do alike on a GPU: looking up weights, adding up parts of K."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import os

import triton
import triton.language as tl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# $2: eight nibbles, four of row g and four of row g + 8. $3, $4 and $7, $8: the tables of the two rows as they are
# stored, for negative codes; $5, $6 and $9, $10: with the signs flipped, and −0 for the code 0. The three low bits of a
# nibble choose the entry, its top bit the table: `first` and `second` are that bit in all bits of a byte, as a selector
# with its own top bit makes it.
LOOK_UP = tl.constexpr("""
{
.reg .b32 even, entry, first, second, negative, positive;
shl.b32 even, $2, 4;
prmt.b32 first, $2, even, 0x9D8C;
prmt.b32 second, $2, even, 0xBFAE;
and.b32 entry, $2, 0x77777777;
prmt.b32 negative, $3, $4, entry;
prmt.b32 positive, $5, $6, entry;
lop3.b32 $0, first, negative, positive, 0xCA;
shr.u32 entry, entry, 16;
prmt.b32 negative, $7, $8, entry;
prmt.b32 positive, $9, $10, entry;
lop3.b32 $1, second, negative, positive, 0xCA;
}
""")


@triton.jit
def _bytes_of(words, low, high):
    """Look up the four lower nibbles: four bytes an int32, for the interpreter, which runs no assembly."""
    found = words * 0
    for nibble in tl.static_range(4):
        code = (words >> (4 * nibble)) & 15
        entry = code & 7
        half = tl.where(entry < 4, low, high)
        byte = (half >> (8 * (entry & 3))) & 255
        byte = tl.where(code < 8, tl.where(entry == 0, 0, byte) ^ 128, byte)
        found |= byte << (8 * nibble)
    return found


@triton.jit
def look_up(words, first, second, BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr):
    """Return FP8 weights [BLOCK_N, 128] of words int32 [4, 4·BLOCK_N].

    first, second: the tables int64 [BLOCK_N/2] of the rows with n % 16 < 8, and of those 8 further.
    """
    TILES: tl.constexpr = BLOCK_N // 16
    words = words.reshape(4, TILES, 8, 4, 2)  # [k // 32, n // 16, n % 8, k % 16 // 4, k % 32 // 16]
    SIGNS: tl.constexpr = -0x7F7F7F80  # 0x80 in every byte
    first_low = first.to(tl.int32).reshape(1, TILES, 8, 1, 1)
    first_high = (first >> 32).to(tl.int32).reshape(1, TILES, 8, 1, 1)
    second_low = second.to(tl.int32).reshape(1, TILES, 8, 1, 1)
    second_high = (second >> 32).to(tl.int32).reshape(1, TILES, 8, 1, 1)
    if INTERPRETED:
        upper = _bytes_of(words, first_low, first_high)
        lower = _bytes_of(words >> 16, second_low, second_high)
    else:
        upper, lower = tl.inline_asm_elementwise(
            LOOK_UP,
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [
                words,
                first_low,
                first_high,
                (first_low & -256) ^ SIGNS,
                first_high ^ SIGNS,
                second_low,
                second_high,
                (second_low & -256) ^ SIGNS,
                second_high ^ SIGNS,
            ],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    four = tl.join(upper, lower)  # [.., half of n]: the bytes are four k side by side
    even = tl.join(four.to(tl.int8), (four >> 8).to(tl.int8))  # casts and joins: the bytes stay in their register
    odd = tl.join((four >> 16).to(tl.int8), (four >> 24).to(tl.int8))
    weights = tl.join(even, odd).to(tl.float8e4nv, bitcast=True)  # [.., half of n, k % 2, k % 4 // 2]
    return weights.permute(1, 5, 2, 0, 4, 3, 7, 6).reshape(BLOCK_N, 128)


@triton.jit
def settled(total, HOPPER: tl.constexpr):
    """Return the same sums, for which the tensor core must be done with all products that are in flight.

    Hopper's reads the weights of a product from registers until it is done, and ptxas may write there before: what
    Triton leaves in flight over the end of a turn of a loop does not keep these registers.
    """
    if HOPPER:
        total = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [total], dtype=tl.float32, is_pure=False, pack=1)
    return total


@triton.jit
def add_parts(total, sums_at, stride, part, counter, SPLITS, mask):
    """Leave a block's sums of one part of K; return whether it came last of all parts, and then the sum of all.

    The parts are added in their order: the same bytes whichever came last.
    """
    tl.store(sums_at + part * stride, total, mask=mask)
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        tl.store(counter, 0)
        total = tl.zeros_like(total)
        for other in range(0, SPLITS, 4):
            for ahead in tl.static_range(4):
                there = mask & (other + ahead < SPLITS)
                total += tl.load(sums_at + (other + ahead) * stride, mask=there, other=0.0, cache_modifier=".cg")
    return last, total
