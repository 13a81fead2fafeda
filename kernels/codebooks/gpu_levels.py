"""The 16 values of a table, in the registers of a warp."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl


@triton.jit
def levels_of(table):
    """Return the 16 values of a table, by code."""
    c = tl.arange(0, 16)
    entry = tl.load(table + tl.where(c < 8, c, (16 - c) % 8))
    return tl.where(c < 8, entry, tl.where(c == 8, 0.0, -entry))


@triton.jit
def nearest(values, levels):
    """Return the codes, int32 [V], of the nearest of 16 levels."""
    return tl.argmin(tl.abs(values[:, None] - levels[None, :]), axis=1)


@triton.jit
def pick(levels, codes):
    """Return the levels of codes [V]."""
    c = tl.arange(0, 16)
    return tl.sum(tl.where(codes[:, None] == c[None, :], levels[None, :], 0.0), axis=1)


@triton.jit
def store_table(table, levels):
    """Store the eight entries of a table."""
    c = tl.arange(0, 16)
    tl.store(table + c, levels, mask=c < 8)
