"""Tables of groups of 128 weights on a GPU: the best without rounding, on the E4M3 grid, and of one scale.

A program takes one group with one warp, which holds its 128 values. What other lanes have found is read back from
memory, behind a barrier.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl

from convert_w4a8.kernels.codebooks.gpu_levels import levels_of, nearest, store_table
from convert_w4a8.kernels.codebooks.reference import STEPS
from convert_w4a8.kernels.fp8 import from_e4m3, to_e4m3

_FIRST_STEP, _LAST_STEP = tl.constexpr(STEPS[0]), tl.constexpr(STEPS[-1])
_V = tl.constexpr(128)


@triton.jit
def _error(values, weights, levels):
    d = tl.min(tl.abs(values[:, None] - levels[None, :]), axis=1)
    return tl.sum(weights * d * d, axis=0)


@triton.jit
def _place(levels, j, entry):
    """Return the levels with another entry j."""
    c = tl.arange(0, 16)
    return tl.where(c == j, entry, tl.where((c > 8) & (c == 16 - j), -entry, levels))


@triton.jit
def _centres(values, weights, codes, levels, ROUND: tl.constexpr):
    """Return the levels of the best entries under these codes."""
    c = tl.arange(0, 16)
    entry = tl.where(c < 8, c, 16 - c)
    used = (codes[:, None] == entry[None, :]) | (codes[:, None] == 16 - entry[None, :])
    signed = weights * tl.where(codes > 8, -values, values)
    down = tl.sum(tl.where(used, weights[:, None], 0.0), axis=0)
    up = tl.sum(tl.where(used, signed[:, None], 0.0), axis=0)
    best = tl.div_rn(up, tl.where(down > 0, down, 1.0))
    if ROUND:
        best = from_e4m3(to_e4m3(best))
    return tl.where((down > 0) & (c != 8), tl.where(c < 8, best, -best), levels)


@triton.jit(do_not_specialize=["rounds"])
def fit_group(signed, shares, all_sums, all_scratch, all_back, tables, rounds):
    """Do what `gpu.fit` does, for magnitudes in order."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, _V)
    value, weight = tl.load(signed + r * _V + i), tl.load(shares + r * _V + i)
    magnitude = tl.abs(value)
    sums, scratch, back = all_sums + r * 516, all_scratch + r * 1032, all_back + r * 896
    p0, p1, p2 = tl.load(sums + 1 + i), tl.load(sums + 130 + i), tl.load(sums + 259 + i)
    # The least error of the i + 1 smallest magnitudes as zeros and c clusters.
    total = p2
    for c in range(7):
        tl.store(scratch + c * 129 + 1 + i, total)
        tl.debug_barrier()
        first = i + 1
        for j in range(_V):
            before = tl.load(scratch + c * 129 + j)
            d0, d1 = p0 - tl.load(sums + j), p1 - tl.load(sums + 129 + j)
            d2 = p2 - tl.load(sums + 258 + j)
            trial = before + (d2 - tl.div_rn(d1 * d1, tl.where(d0 > 0, d0, 1.0)))
            better = (trial < total) & (i >= j)
            total = tl.where(better, trial, total)
            first = tl.where(better, j, first)
        tl.store(back + c * _V + i, first.to(tl.uint8))
    tl.debug_barrier()
    c16 = tl.arange(0, 16)
    levels = tl.zeros((16,), tl.float32)
    means = tl.zeros((_V,), tl.float32)
    stop = tl.full((), _V, tl.int32)
    for c in range(7):
        start = tl.load(back + (6 - c) * _V + stop - 1, mask=stop > 0, other=0).to(tl.int32)
        d0 = tl.load(sums + stop) - tl.load(sums + start)
        d1 = tl.load(sums + 129 + stop) - tl.load(sums + 129 + start)
        mean = tl.where(d0 > 0, tl.div_rn(d1, tl.where(d0 > 0, d0, 1.0)), 0.0)
        levels = _place(levels, c + 1, -mean)
        means = tl.where((i >= start) & (i < stop), mean, means)
        stop = start
    # The lone entry: the run of one sign that gains most by a mean of its own.
    best, lone = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for side in range(2):
        sign = tl.where(side == 0, -1.0, 1.0)
        mask = value * sign > 0
        h = tl.where(mask, weight, 0.0)
        d = magnitude - means
        q0, q1 = tl.cumsum(h, axis=0), tl.cumsum(h * magnitude, axis=0)
        q2, qe = tl.cumsum(h * magnitude * magnitude, axis=0), tl.cumsum(h * d * d, axis=0)
        tl.debug_barrier()
        tl.store(scratch + 1 + i, q0)
        tl.store(scratch + 130 + i, q1)
        tl.store(scratch + 259 + i, q2)
        tl.store(scratch + 388 + i, qe)
        tl.debug_barrier()
        gains, centres = tl.zeros((_V,), tl.float32), tl.zeros((_V,), tl.float32)
        for j in range(_V):
            d0, d1 = q0 - tl.load(scratch + j), q1 - tl.load(scratch + 129 + j)
            d2, de = q2 - tl.load(scratch + 258 + j), qe - tl.load(scratch + 387 + j)
            centre = tl.div_rn(d1, tl.where(d0 > 0, d0, 1.0))
            gain = de - (d2 - d1 * centre)
            better = (gain > gains) & (i >= j) & (d0 > 0)
            gains = tl.where(better, gain, gains)
            centres = tl.where(better, centre, centres)
        gain = tl.max(gains, axis=0)
        centre = tl.sum(tl.where(i == tl.argmax(gains, axis=0), centres, 0.0), axis=0)
        lone = tl.where(gain > best, sign * centre, lone)
        best = tl.maximum(gain, best)
    levels = tl.where(c16 == 0, lone, levels)
    for _ in range(rounds):
        levels = _centres(value, weight, nearest(value, levels), levels, False)
    store_table(tables + r * 8, levels)


@triton.jit(do_not_specialize=["count", "passes"])
def refine_group(values, importance, tables, codes, count, passes):
    """Do what `gpu.refine` does."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, _V)
    c = tl.arange(0, 16)
    value, weight = tl.load(values + r * _V + i), tl.load(importance + r % count * _V + i)
    levels = from_e4m3(to_e4m3(levels_of(tables + r * 8)))
    for _ in range(4):
        levels = _centres(value, weight, nearest(value, levels), levels, True)
    for _ in range(passes):
        best = _error(value, weight, levels)
        for j in range(8):
            for side in range(2):
                entry = tl.sum(tl.where(c == j, levels, 0.0), axis=0)
                place = to_e4m3(tl.abs(entry))
                place = tl.where(entry < 0, -place, place) + 2 * side - 1
                step = from_e4m3(tl.minimum(tl.abs(place), 126))
                trial = _place(levels, j, tl.where(place < 0, -step, step))
                error = _error(value, weight, trial)
                levels = tl.where(error < best, trial, levels)
                best = tl.minimum(error, best)
        for _ in range(2):
            levels = _centres(value, weight, nearest(value, levels), levels, True)
    store_table(tables + r * 8, levels)
    tl.store(codes + r * _V + i, nearest(value, levels).to(tl.uint8))


@triton.jit(do_not_specialize=["count"])
def fit_scale_group(values, importance, scales, limits, tables, codes, count):
    """Do what `gpu.fit_scale` does."""
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, _V)
    c = tl.arange(0, 16)
    value, weight = tl.load(values + r * _V + i), tl.load(importance + r % count * _V + i)
    scale = tl.load(scales + r)
    low, high = tl.load(limits + 2 * r).to(tl.int32), tl.load(limits + 2 * r + 1).to(tl.int32)
    middle = to_e4m3(tl.abs(scale))
    best = tl.full((), float("inf"), tl.float32)
    levels = tl.zeros((16,), tl.float32)
    for step in range(_FIRST_STEP, _LAST_STEP + 1):
        f = from_e4m3(tl.minimum(tl.maximum(middle + step, low), high))
        trial = from_e4m3(to_e4m3(tl.where(scale < 0, -f, f) * (c - 8).to(tl.float32)))
        error = _error(value, weight, trial)
        levels = tl.where(error < best, trial, levels)
        best = tl.minimum(error, best)
    store_table(tables + r * 8, levels)
    tl.store(codes + r * _V + i, nearest(value, levels).to(tl.uint8))
