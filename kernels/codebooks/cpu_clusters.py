"""The best table without rounding for groups of 128 weights on a CPU: clusters, and Lloyd's rounds."""

# numba's decorator and its functions have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# min() and max() ask for NaN first, and are not vectorized.
# ruff: noqa: FURB136
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import numpy as np
from numba import njit

from convert_w4a8.kernels.fp8_cpu import nearest


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


@njit(cache=True, inline="always")
def best_entries(value, weight, code, up, down):
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


@njit(cache=True, nogil=True, error_model="numpy")
def fit_rows(values, importance, entries, rounds):
    """Fill the entries of each row as `cpu.fit` returns them."""
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
            best_entries(value, weight, code, up, down)
            moved = False
            for j in range(8):
                if down[j] > 0.0:
                    entry = up[j] / down[j]
                    moved |= entry != table[j]
                    table[j] = entry
            if not moved:
                break
