"""Codes of groups of 128 weights on a GPU under a second moment: error feedback, and coordinate descent.

A program takes one group with one warp, which holds its 128 values.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from convert_w4a8.kernels.codebooks.gpu_levels import levels_of, pick, store_table
from convert_w4a8.kernels.codebooks.reference import GAIN, ROUNDS
from convert_w4a8.kernels.fp8 import from_e4m3, to_e4m3

_NEEDED, _ROUNDS = tl.constexpr(-GAIN), tl.constexpr(ROUNDS)
_V = tl.constexpr(128)


@triton.jit(do_not_specialize=["count"])
def feedback_group(goal, start, factors, tables, codes, errors, count):
    """Do what `gpu.feedback` does."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, _V)
    c = tl.arange(0, 16)
    levels = levels_of(tables + r * 8)
    factor = factors + r % count * _V * _V
    x, aim = tl.load(start + r * _V + i), tl.load(goal + r * _V + i)
    code = tl.zeros((_V,), tl.int32)
    error = tl.zeros((_V,), tl.float32)
    for k in range(_V):
        here = tl.sum(tl.where(i == k, x, 0.0), axis=0)
        u = tl.argmin(tl.abs(levels - here), axis=0)
        q = tl.sum(tl.where(c == u, levels, 0.0), axis=0)
        code = tl.where(i == k, u, code)
        error = tl.where(i == k, q - aim, error)
        d = q - tl.sum(tl.where(i == k, aim, 0.0), axis=0)
        x -= tl.where(i > k, d * tl.load(factor + k * _V + i), 0.0)
    tl.store(codes + r * _V + i, code.to(tl.uint8))
    tl.store(errors + r * _V + i, error)


@triton.jit(do_not_specialize=["count", "rounds"])
def descend_group(goal, gradient, moments, diagonals, tables, codes, errors, count, rounds, FREE: tl.constexpr):
    """Do what `gpu.descend` does."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, _V)
    c = tl.arange(0, 16)
    e8 = tl.arange(0, 8)
    levels = levels_of(tables + r * 8)
    moment, diagonal = moments + r % count * _V * _V, diagonals + r % count * _V
    code = tl.load(codes + r * _V + i).to(tl.int32)
    x, y = pick(levels, code), tl.load(gradient + r * _V + i)
    for _ in range(rounds):
        for k in range(_V):
            h = tl.load(diagonal + k)
            here, slope = tl.sum(tl.where(i == k, x, 0.0), axis=0), tl.sum(tl.where(i == k, y, 0.0), axis=0)
            u = tl.argmin(tl.abs(levels - (here - tl.div_rn(slope, tl.where(h > 0, h, 1.0)))), axis=0)
            d = tl.sum(tl.where(c == u, levels, 0.0), axis=0) - here
            if (h > 0) & (d * (2 * slope + d * h) < d * d * h * _NEEDED):
                code = tl.where(i == k, u, code)
                x = tl.where(i == k, x + d, x)
                y += d * tl.load(moment + k * _V + i)
        x = pick(levels, code)
        if FREE:
            entry = tl.where(code < 8, code, 16 - code) % 8
            sign = tl.where(code < 8, 1.0, tl.where(code == 8, 0.0, -1.0))
            products = tl.zeros((8, _V), tl.float32)
            for k in range(_V):
                e = tl.sum(tl.where(i == k, entry, 0), axis=0)
                s = tl.sum(tl.where(i == k, sign, 0.0), axis=0)
                products += tl.where(e8 == e, s, 0.0)[:, None] * tl.load(moment + k * _V + i)[None, :]
            mine = tl.where(entry[None, :] == e8[:, None], sign[None, :], 0.0)  # [8, V]
            b = tl.sum(mine * y[None, :], axis=1)
            a = tl.zeros((8, 8), tl.float32)
            for j in range(8):
                column = tl.sum(products * tl.where(entry == j, sign, 0.0)[None, :], axis=1)
                a = tl.where(e8[None, :] == j, column[:, None], a)
            table = tl.sum(tl.where(c[None, :] == e8[:, None], levels[None, :], 0.0), axis=1)
            old = table
            for _ in range(_ROUNDS):
                for j in range(8):
                    column = tl.sum(tl.where(e8[None, :] == j, a, 0.0), axis=1)
                    h = tl.sum(tl.where(e8 == j, column, 0.0), axis=0)
                    slope = tl.sum(tl.where(e8 == j, b, 0.0), axis=0)
                    here = tl.sum(tl.where(e8 == j, table, 0.0), axis=0)
                    d = from_e4m3(to_e4m3(here - tl.div_rn(slope, tl.where(h > 0, h, 1.0)))) - here
                    d = tl.where((h > 0) & (d * (2 * slope + d * h) < d * d * h * _NEEDED), d, 0.0)
                    table = tl.where(e8 == j, table + d, table)
                    b += d * column
            y += tl.sum((table - old)[:, None] * products, axis=0)
            lower = tl.where(c < 8, c, 16 - c) % 8
            levels = tl.sum(tl.where(lower[None, :] == e8[:, None], table[:, None], 0.0), axis=0)
            levels = tl.where(c < 8, levels, tl.where(c == 8, 0.0, -levels))
            x = pick(levels, code)
    store_table(tables + r * 8, levels)
    tl.store(codes + r * _V + i, code.to(tl.uint8))
    tl.store(errors + r * _V + i, x - tl.load(goal + r * _V + i))
