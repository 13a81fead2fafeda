"""Codes of groups of 128 weights on a CPU under a second moment: error feedback, and coordinate descent."""

# numba's decorator and its functions have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import numpy as np
from numba import njit

from convert_w4a8.kernels.codebooks.cpu_tables import rounded
from convert_w4a8.kernels.codebooks.reference import GAIN, ROUNDS


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


@njit(cache=True, nogil=True, error_model="numpy")
def feedback_rows(goal, start, factor, entries, codes, errors):
    """Do what `cpu.feedback` does."""
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
            row, d = factor[r % len(factor), k], np.float64(error)
            for j in range(k + 1, n):
                x[j] -= d * row[j]


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
            aim = rounded(table[j] - b[j] / h, scratch, bits, e4m3)
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


@njit(cache=True, nogil=True, error_model="numpy")
def descend_rows(goal, gradient, moments, entries, codes, errors, rounds, free, e4m3):
    """Do what `cpu.descend` does."""
    n = goal.shape[1]
    x, y = np.empty(n), np.empty(n)
    ordered, letters, middles = np.empty(16), np.empty(16, np.uint8), np.empty(15)
    products, a, b, before = np.empty((8, n)), np.empty((8, 8)), np.empty(8), np.empty(8)
    entry, sign = np.empty(n, np.int64), np.empty(n)
    scratch = np.empty(1, np.float32)
    bits = scratch.view(np.uint32)
    for r in range(len(goal)):
        table, code, moment = entries[r], codes[r], moments[r % len(moments)]
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
