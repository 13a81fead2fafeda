"""Codebooks of groups of 128 weights on a GPU: what reference.py does, in float32.

Bytes differ from those of a CPU, whose arithmetic is in float64; they are the same from run to run. A program takes
one group with one warp, which holds its 128 values. What other lanes have found is read back from memory, behind a
barrier. What is written to must be contiguous.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl

from convert_w4a8.kernels.codebooks import reference
from convert_w4a8.kernels.fp8 import OPTIONS, from_e4m3, to_e4m3

_GROUPS_AT_ONCE = 1 << 17
_NEEDED, _ROUNDS = tl.constexpr(-reference.GAIN), tl.constexpr(reference.ROUNDS)
_FIRST_STEP, _LAST_STEP = tl.constexpr(reference.STEPS[0]), tl.constexpr(reference.STEPS[-1])
_V = tl.constexpr(128)


def fit(values: torch.Tensor, importance: torch.Tensor, rounds: int) -> torch.Tensor:
    """Return what `reference.fit` returns."""
    entries = torch.empty(len(values), 8, device=values.device)
    shares, count = _float(importance), len(importance)
    for start in range(0, len(values), _GROUPS_AT_ONCE):
        part = values[start : start + _GROUPS_AT_ONCE].contiguous()
        row = (torch.arange(start, start + len(part), device=values.device) % count)[:, None]
        magnitude, order = part.abs().sort(dim=1, stable=True)
        share = shares[row, order]
        signed = part.gather(1, order)
        sums = torch.zeros(len(part), 4, 129, device=values.device)
        torch.cumsum(share, 1, out=sums[:, 0, 1:])
        torch.cumsum(share * magnitude, 1, out=sums[:, 1, 1:])
        torch.cumsum(share * magnitude * magnitude, 1, out=sums[:, 2, 1:])
        scratch = torch.zeros(len(part), 8, 129, device=values.device)
        back = torch.empty(len(part), 7, 128, dtype=torch.uint8, device=values.device)
        _launch(_fit, len(part), signed, share, sums, scratch, back, entries[start : start + len(part)], rounds)
    return entries.double()


def refine(
    values: torch.Tensor, importance: torch.Tensor, entries: torch.Tensor, codes: torch.Tensor, passes: int
) -> None:
    """Do what `reference.refine` does to `entries` and `codes`."""
    table = entries.float()
    inputs = values.contiguous(), _float(importance)
    _launch(_refine, len(values), *inputs, table, codes, len(importance), passes)
    entries.copy_(table)


def fit_scale(
    values: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, limits: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Return what `reference.fit_scale` returns, and put codes into `codes`."""
    table = torch.empty(len(values), 8, device=values.device)
    inputs = values.contiguous(), _float(importance), scales.contiguous(), limits.contiguous()
    _launch(_fit_scale, len(values), *inputs, table, codes, len(importance))
    return table.double()


def feedback(
    goal: torch.Tensor,
    start: torch.Tensor,
    factor: torch.Tensor,
    entries: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Do what `reference.feedback` does to `codes` and `errors`."""
    inputs = (tensor.float().contiguous() for tensor in (goal, start, factor, entries))
    _launch(_feedback, len(goal), *inputs, codes, errors)


def descend(
    goal: torch.Tensor,
    gradient: torch.Tensor,
    moment: torch.Tensor,
    entries: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    rounds: int,
    free: bool,
) -> None:
    """Do what `reference.descend` does to `entries`, `codes` and `errors`."""
    table = entries.float()
    inputs = (tensor.float().contiguous() for tensor in (goal, gradient, moment, moment.diagonal()))
    _launch(_descend, len(goal), *inputs, table, codes, errors, rounds, FREE=free)
    entries.copy_(table)


def _float(importance: torch.Tensor) -> torch.Tensor:
    """Return importances in a range that float32 holds."""
    return (importance / importance.mean()).float().contiguous()


def _launch(kernel: Any, count: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over `count` groups."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(count,)](*arguments, **constants, num_warps=1, **OPTIONS)


@triton.jit
def _levels(table):
    """Return the 16 values of a table, by code."""
    c = tl.arange(0, 16)
    entry = tl.load(table + tl.where(c < 8, c, (16 - c) % 8))
    return tl.where(c < 8, entry, tl.where(c == 8, 0.0, -entry))


@triton.jit
def _nearest(values, levels):
    """Return the codes, int32 [V], of the nearest of 16 levels."""
    return tl.argmin(tl.abs(values[:, None] - levels[None, :]), axis=1)


@triton.jit
def _pick(levels, codes):
    """Return the levels of codes [V]."""
    c = tl.arange(0, 16)
    return tl.sum(tl.where(codes[:, None] == c[None, :], levels[None, :], 0.0), axis=1)


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


@triton.jit
def _store_table(table, levels):
    c = tl.arange(0, 16)
    tl.store(table + c, levels, mask=c < 8)


@triton.jit(do_not_specialize=["rounds"])
def _fit(signed, shares, all_sums, all_scratch, all_back, tables, rounds):
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
        levels = _centres(value, weight, _nearest(value, levels), levels, False)
    _store_table(tables + r * 8, levels)


@triton.jit(do_not_specialize=["count", "passes"])
def _refine(values, importance, tables, codes, count, passes):
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, _V)
    c = tl.arange(0, 16)
    value, weight = tl.load(values + r * _V + i), tl.load(importance + r % count * _V + i)
    levels = from_e4m3(to_e4m3(_levels(tables + r * 8)))
    for _ in range(4):
        levels = _centres(value, weight, _nearest(value, levels), levels, True)
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
            levels = _centres(value, weight, _nearest(value, levels), levels, True)
    _store_table(tables + r * 8, levels)
    tl.store(codes + r * _V + i, _nearest(value, levels).to(tl.uint8))


@triton.jit(do_not_specialize=["count"])
def _fit_scale(values, importance, scales, limits, tables, codes, count):
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
    _store_table(tables + r * 8, levels)
    tl.store(codes + r * _V + i, _nearest(value, levels).to(tl.uint8))


@triton.jit
def _feedback(goal, start, factor, tables, codes, errors):
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, _V)
    c = tl.arange(0, 16)
    levels = _levels(tables + r * 8)
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


@triton.jit(do_not_specialize=["rounds"])
def _descend(goal, gradient, moment, diagonal, tables, codes, errors, rounds, FREE: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, _V)
    c = tl.arange(0, 16)
    e8 = tl.arange(0, 8)
    levels = _levels(tables + r * 8)
    code = tl.load(codes + r * _V + i).to(tl.int32)
    x, y = _pick(levels, code), tl.load(gradient + r * _V + i)
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
        x = _pick(levels, code)
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
            x = _pick(levels, code)
    _store_table(tables + r * 8, levels)
    tl.store(codes + r * _V + i, code.to(tl.uint8))
    tl.store(errors + r * _V + i, x - tl.load(goal + r * _V + i))
