"""Codebooks of groups of 128 weights on a CPU, compiled by numba: the same as reference.py, bit for bit.

Every operation is rounded as torch rounds it, and sums run in the same order. Each row is worked by itself.
"""

# numba's decorator and its functions have no Python types.
# ruff: noqa: ANN001, ANN202
# min() and max() ask for NaN first, and are not vectorized.
# ruff: noqa: FURB136
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import numpy as np
import torch
from numba import njit

from convert_w4a8.kernels.codebooks.reference import GAIN, LARGEST, ROUNDS, STEPS
from convert_w4a8.kernels.fp8_cpu import E4M3_VALUES, nearest, to_e4m3

_FIRST_STEP, _LAST_STEP = STEPS[0], STEPS[-1]


def fit(values: torch.Tensor, importance: torch.Tensor, rounds: int) -> torch.Tensor:
    """Return what `reference.fit` returns."""
    entries = torch.empty(len(values), 8, dtype=torch.float64)
    _fit(values.numpy(), importance.numpy(), entries.numpy(), rounds)
    return entries


def refine(
    values: torch.Tensor, importance: torch.Tensor, entries: torch.Tensor, codes: torch.Tensor, passes: int
) -> None:
    """Do what `reference.refine` does to `entries` and `codes`."""
    _refine(values.numpy(), importance.numpy(), entries.numpy(), codes.numpy(), passes, E4M3_VALUES)


def fit_scale(
    values: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, limits: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Return what `reference.fit_scale` returns, and put codes into `codes`."""
    entries = torch.empty(len(values), 8, dtype=torch.float64)
    _fit_scale(
        values.numpy(),
        importance.numpy(),
        scales.numpy(),
        limits.numpy(),
        entries.numpy(),
        codes.numpy(),
        E4M3_VALUES,
    )
    return entries


def feedback(
    goal: torch.Tensor,
    start: torch.Tensor,
    factor: torch.Tensor,
    entries: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Do what `reference.feedback` does to `codes` and `errors`."""
    _feedback(goal.numpy(), start.numpy(), factor.numpy(), entries.numpy(), codes.numpy(), errors.numpy())


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
    arrays = goal.numpy(), gradient.numpy(), moment.numpy()
    _descend(*arrays, entries.numpy(), codes.numpy(), errors.numpy(), rounds, free, E4M3_VALUES)


@njit(cache=True, inline="always")
def _value(entries, code):
    return entries[code] if code < 8 else (0.0 if code == 8 else -entries[16 - code])


@njit(cache=True, inline="always")
def _levels(entries, ordered, order):
    """Sort the 16 values of a table, equal ones by their codes."""
    for c in range(16):
        x = _value(entries, c)
        i = c
        while i > 0 and ordered[i - 1] > x:
            ordered[i], order[i] = ordered[i - 1], order[i - 1]
            i -= 1
        ordered[i], order[i] = x, c


@njit(cache=True, inline="always")
def _place(x, middles):
    """How many of the 15 sorted middles are below x."""
    low, high = 0, 15
    while low < high:
        half = (low + high) >> 1
        if middles[half] < x:
            low = half + 1
        else:
            high = half
    return low


@njit(cache=True, inline="always")
def _rounded(x, scratch, bits, e4m3):
    return np.float64(e4m3[to_e4m3(np.float32(x), scratch, bits)])


@njit(cache=True, error_model="numpy")
def _sort(keys, order, spare):
    """Sort `order` by the keys it points to, equal ones as they come, by merging runs."""
    n = len(order)
    width = 1
    while width < n:
        for start in range(0, n, 2 * width):
            middle, stop = min(start + width, n), min(start + 2 * width, n)
            i, j = start, middle
            for k in range(start, stop):
                if i < middle and (j >= stop or keys[order[i]] <= keys[order[j]]):
                    spare[k] = order[i]
                    i += 1
                else:
                    spare[k] = order[j]
                    j += 1
        order[:] = spare
        width *= 2


@njit(cache=True, error_model="numpy")
def _cut(sums, costs, totals):
    """Put into totals[c, i] the least error of the i smallest magnitudes as zeros and c clusters."""
    n = costs.shape[1] - 1
    for j in range(n):
        row, b0, b1, b2 = costs[j, j + 1 :], sums[0, j], sums[1, j], sums[2, j]
        p0, p1, p2 = sums[0, j + 1 :], sums[1, j + 1 :], sums[2, j + 1 :]
        for i in range(len(row)):
            d0, d1 = p0[i] - b0, p1[i] - b1
            row[i] = (p2[i] - b2) - (d1 * d1) / (d0 if d0 > 0.0 else 1.0)
    totals[0, : n + 1] = sums[2]
    for c in range(7):
        old, new = totals[c], totals[c + 1]
        new[:] = old
        for j in range(0, n, 4):  # four at a time: what is read and written once does for all
            t0, t1, t2, t3 = old[j], old[j + 1], old[j + 2], old[j + 3]
            r0, r1, r2, r3 = costs[j, j:], costs[j + 1, j:], costs[j + 2, j:], costs[j + 3, j:]
            part = new[j : n + 1]
            for i in range(len(part)):
                x0, x1, x2, x3 = t0 + r0[i], t1 + r1[i], t2 + r2[i], t3 + r3[i]
                x0 = x0 if x0 < x1 else x1
                x2 = x2 if x2 < x3 else x3
                x0 = x0 if x0 < x2 else x2
                part[i] = x0 if x0 < part[i] else part[i]


@njit(cache=True, error_model="numpy")
def _first(costs, totals, c, stop):
    """Return where the last of c clusters begins that end before `stop`: the first place with the least error."""
    least, old = totals[c, stop], totals[c - 1]
    if old[stop] == least:
        return stop
    j = 0
    while old[j] + costs[j, stop] != least:
        j += 1
    return j


@njit(cache=True, error_model="numpy")
def _lone(sums, errors, count, gains):
    """Find the cluster of sorted magnitudes of one sign that gains most: its gain and mean."""
    gains[: count + 1] = 0.0
    for j in range(count):
        b0, b1, b2, be = sums[0, j], sums[1, j], sums[2, j], errors[j]
        p0, p1, p2 = sums[0, j + 1 : count + 1], sums[1, j + 1 : count + 1], sums[2, j + 1 : count + 1]
        error, best = errors[j + 1 : count + 1], gains[j + 1 : count + 1]
        for i in range(len(best)):
            d0, d1 = p0[i] - b0, p1[i] - b1
            gain = (error[i] - be) - ((p2[i] - b2) - (d1 * d1) / (d0 if d0 > 0.0 else 1.0))
            best[i] = gain if gain > best[i] else best[i]
    stop = 0
    for i in range(1, count + 1):
        if gains[i] > gains[stop]:
            stop = i
    if gains[stop] == 0.0:
        return 0.0, 0.0
    for j in range(stop):
        d0, d1 = sums[0, stop] - sums[0, j], sums[1, stop] - sums[1, j]
        d2 = sums[2, stop] - sums[2, j]
        if (errors[stop] - errors[j]) - (d2 - (d1 * d1) / (d0 if d0 > 0.0 else 1.0)) == gains[stop]:
            return gains[stop], d1 / (d0 if d0 > 0.0 else 1.0)
    return 0.0, 0.0


@njit(cache=True, inline="always")
def _extend(sums, i, weight, magnitude):
    """Extend the prefix sums of weights, of weighted magnitudes and of their squares by an element."""
    sums[0, i + 1] = sums[0, i] + weight
    sums[1, i + 1] = sums[1, i] + weight * magnitude
    sums[2, i + 1] = sums[2, i] + weight * magnitude * magnitude


@njit(cache=True, nogil=True, error_model="numpy")
def _fit(values, importance, entries, rounds):
    n = values.shape[1]
    value, weight, magnitude = np.empty(n), np.empty(n), np.empty(n)
    order, spare = np.empty(n, np.int64), np.empty(n, np.int64)
    sums, totals = np.empty((3, n + 1)), np.zeros((8, n + 4))
    costs = np.full((n + 3, n + 1), np.inf)
    cluster, means, errors = np.empty(n, np.int64), np.empty(8), np.empty(n + 1)
    gains = np.empty(n + 1)
    ordered, letters, places, code = np.empty(16), np.empty(16, np.uint8), np.empty(n, np.int64), np.empty(n, np.uint8)
    up, down = np.empty(8), np.empty(8)
    for r in range(len(values)):
        shares, table = importance[r % len(importance)], entries[r]
        for k in range(n):
            value[k], weight[k] = values[r, k], shares[k]
            magnitude[k] = abs(value[k])
            order[k] = k
        _sort(magnitude, order, spare)
        sums[:, 0] = 0.0
        for i in range(n):
            _extend(sums, i, weight[order[i]], magnitude[order[i]])
        _cut(sums, costs, totals)
        means[:] = 0.0
        cluster[:] = 0
        stop = n
        for c in range(7, 0, -1):
            start = _first(costs, totals, c, stop)
            d0 = sums[0, stop] - sums[0, start]
            means[c] = (sums[1, stop] - sums[1, start]) / d0 if d0 > 0.0 else 0.0
            for i in range(start, stop):
                cluster[i] = c
            stop = start
        best, table[0] = 0.0, 0.0
        for negative in (True, False):
            count = 0
            errors[0] = 0.0
            for i in range(n):
                k = order[i]
                if value[k] < 0.0 if negative else value[k] > 0.0:
                    _extend(sums, count, weight[k], magnitude[k])
                    d = magnitude[k] - means[cluster[i]]
                    errors[count + 1] = errors[count] + weight[k] * d * d
                    count += 1
            gain, mean = _lone(sums, errors, count, gains)
            if gain > best:
                best, table[0] = gain, -mean if negative else mean
        for c in range(1, 8):
            table[8 - c] = -means[c]
        for _ in range(rounds):
            nearest(value, table, ordered, letters, places, code)
            _sums(value, weight, code, up, down)
            moved = False
            for j in range(8):
                if down[j] > 0.0:
                    entry = up[j] / down[j]
                    moved |= entry != table[j]
                    table[j] = entry
            if not moved:
                break


@njit(cache=True, inline="always")
def _sums(value, weight, code, up, down):
    """Leave numerators and denominators of the best entries under these codes."""
    up[:] = 0.0
    down[:] = 0.0
    for k in range(len(value)):
        if code[k] < 8:
            down[code[k]] += weight[k]
            up[code[k]] += weight[k] * value[k]
        elif code[k] > 8:
            down[16 - code[k]] += weight[k]
            up[16 - code[k]] += weight[k] * -value[k]


@njit(cache=True, inline="always")
def _error(value, weight, table, ordered, letters, places, code):
    """Return the error under the nearest codes, which it leaves in `code`."""
    nearest(value, table, ordered, letters, places, code)
    total = 0.0
    for k in range(len(value)):
        d = value[k] - ordered[places[k]]
        total += weight[k] * d * d
    return total


@njit(cache=True, nogil=True, error_model="numpy")
def _refine(values, importance, entries, codes, passes, e4m3):
    n = values.shape[1]
    value, weight = np.empty(n), np.empty(n)
    ordered, letters, places = np.empty(16), np.empty(16, np.uint8), np.empty(n, np.int64)
    up, down, scratch = np.empty(8), np.empty(8), np.empty(1, np.float32)
    bits = scratch.view(np.uint32)
    for r in range(len(values)):
        shares, table, code = importance[r % len(importance)], entries[r], codes[r]
        for k in range(n):
            value[k], weight[k] = values[r, k], shares[k]
        for j in range(8):
            table[j] = _rounded(table[j], scratch, bits, e4m3)
        for attempt in range(passes + 1):
            for _ in range(2 if attempt else 4):
                nearest(value, table, ordered, letters, places, code)
                _sums(value, weight, code, up, down)
                moved = False
                for j in range(8):
                    if down[j] > 0.0:
                        entry = _rounded(up[j] / down[j], scratch, bits, e4m3)
                        moved |= entry != table[j]
                        table[j] = entry
                if not moved:
                    break
            best = _error(value, weight, table, ordered, letters, places, code)
            if attempt == passes:
                break
            moved = False
            for j in range(8):
                for direction in (-1, 1):
                    old = table[j]
                    scratch[0] = old
                    place = np.int64(to_e4m3(np.float32(abs(old)), scratch, bits))
                    place = (-place if old < 0.0 else place) + direction
                    step = np.float64(e4m3[min(abs(place), LARGEST)])
                    table[j] = -step if place < 0 else step
                    error = _error(value, weight, table, ordered, letters, places, code)
                    if error < best:
                        best = error
                        moved = True
                    else:
                        table[j] = old
            if not moved:
                nearest(value, table, ordered, letters, places, code)
                break


@njit(cache=True, nogil=True, error_model="numpy")
def _fit_scale(values, importance, scales, limits, entries, codes, e4m3):
    n = values.shape[1]
    value, weight, table = np.empty(n), np.empty(n), np.empty(8)
    ordered, letters, places = np.empty(16), np.empty(16, np.uint8), np.empty(n, np.int64)
    scratch = np.empty(1, np.float32)
    bits = scratch.view(np.uint32)
    for r in range(len(values)):
        shares, code = importance[r % len(importance)], codes[r]
        for k in range(n):
            value[k], weight[k] = values[r, k], shares[k]
        sign = -1.0 if scales[r] < 0.0 else 1.0
        middle = np.int64(to_e4m3(np.float32(abs(scales[r])), scratch, bits))
        best = np.inf
        for step in range(_FIRST_STEP, _LAST_STEP + 1):
            place = min(max(middle + step, np.int64(limits[r, 0])), np.int64(limits[r, 1]))
            for j in range(8):
                table[j] = _rounded(sign * e4m3[place] * (j - 8), scratch, bits, e4m3)
            error = _error(value, weight, table, ordered, letters, places, code)
            if error < best:
                best = error
                entries[r] = table
        nearest(value, entries[r], ordered, letters, places, code)


@njit(cache=True, nogil=True, error_model="numpy")
def _feedback(goal, start, factor, entries, codes, errors):
    n = goal.shape[1]
    x, ordered, letters, middles = np.empty(n), np.empty(16), np.empty(16, np.uint8), np.empty(15)
    for r in range(len(goal)):
        for k in range(n):
            x[k] = start[r, k]
        _levels(entries[r], ordered, letters)
        for i in range(15):
            middles[i] = (ordered[i + 1] + ordered[i]) / 2.0
        for k in range(n):
            place = _place(x[k], middles)
            codes[r, k] = letters[place]
            error = np.float32(ordered[place] - goal[r, k])
            errors[r, k] = error
            row, d = factor[k], np.float64(error)
            for j in range(k + 1, n):
                x[j] -= d * row[j]


@njit(cache=True, nogil=True, error_model="numpy")
def _descend(goal, gradient, moment, entries, codes, errors, rounds, free, e4m3):
    n = goal.shape[1]
    x, y = np.empty(n), np.empty(n)
    ordered, letters, middles = np.empty(16), np.empty(16, np.uint8), np.empty(15)
    products, a, b, before = np.empty((8, n)), np.empty((8, 8)), np.empty(8), np.empty(8)
    entry, sign = np.empty(n, np.int64), np.empty(n)
    scratch = np.empty(1, np.float32)
    bits = scratch.view(np.uint32)
    for r in range(len(goal)):
        table, code = entries[r], codes[r]
        for k in range(n):
            x[k], y[k] = _value(table, code[k]), gradient[r, k]
        for _ in range(rounds):
            _levels(table, ordered, letters)
            for i in range(15):
                middles[i] = (ordered[i + 1] + ordered[i]) / 2.0
            moved = False
            for k in range(n):
                h = moment[k, k]
                if h <= 0.0:
                    continue
                place = _place(x[k] - y[k] / h, middles)
                d = ordered[place] - x[k]
                if d * (2.0 * y[k] + d * h) < -GAIN * (d * d * h):
                    code[k] = letters[place]
                    x[k] = ordered[place]
                    row = moment[k]
                    for j in range(n):
                        y[j] += d * row[j]
                    moved = True
            if free:
                moved |= _move_entries(
                    x, y, moment, table, code, (entry, sign, products, a, b, before, scratch, bits), e4m3
                )
            if not moved:
                break
        for k in range(n):
            errors[r, k] = np.float32(x[k] - goal[r, k])


@njit(cache=True, error_model="numpy")
def _move_entries(x, y, moment, table, code, spare, e4m3):
    """Move the entries of a table on the E4M3 grid while that helps; whether any moved."""
    entry, sign, products, a, b, before, scratch, bits = spare
    n = len(x)
    products[:] = 0.0
    b[:] = 0.0
    a[:] = 0.0
    for k in range(n):
        c = code[k]
        entry[k] = (c if c < 8 else 16 - c) & 7
        sign[k] = 1.0 if c < 8 else (0.0 if c == 8 else -1.0)
        if c != 8:
            target, row, s = products[entry[k]], moment[k], sign[k]
            b[entry[k]] += s * y[k]
            for j in range(n):
                target[j] += s * row[j]
    for j in range(8):
        for k in range(n):
            a[j, entry[k]] += sign[k] * products[j, k]
        before[j] = table[j]
    for _ in range(ROUNDS):
        moved = False
        for j in range(8):
            h = a[j, j]
            if h <= 0.0:
                continue
            aim = _rounded(table[j] - b[j] / h, scratch, bits, e4m3)
            d = aim - table[j]
            if d * (2.0 * b[j] + d * h) < -GAIN * (d * d * h):
                table[j] = aim
                for i in range(8):
                    b[i] += d * a[i, j]
                moved = True
        if not moved:
            break
    moved = False
    for j in range(8):
        d = table[j] - before[j]
        if d != 0.0:
            moved = True
            row = products[j]
            for k in range(n):
                y[k] += d * row[k]
    if moved:
        for k in range(n):
            x[k] = _value(table, code[k])
    return moved
