"""Tables of E4M3 numbers for groups of 128 weights on a CPU, and their nearest codes."""

# numba's decorator and its functions have no Python types.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import numpy as np
from numba import njit

from convert_w4a8.kernels.codebooks.cpu_clusters import best_entries
from convert_w4a8.kernels.codebooks.reference import LARGEST, STEPS
from convert_w4a8.kernels.fp8_cpu import nearest, to_e4m3

_FIRST_STEP, _LAST_STEP = STEPS[0], STEPS[-1]


@njit(cache=True, inline="always")
def rounded(x, scratch, bits, e4m3):
    """Return a number rounded to E4M3."""
    return np.float64(e4m3[to_e4m3(np.float32(x), scratch, bits)])


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
def refine_rows(values, importance, entries, codes, passes, e4m3):
    """Do what `cpu.refine` does."""
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
            table[j] = rounded(table[j], scratch, bits, e4m3)
        for attempt in range(passes + 1):
            for _ in range(2 if attempt else 4):
                nearest(value, table, ordered, letters, places, code)
                best_entries(value, weight, code, up, down)
                moved = False
                for j in range(8):
                    if down[j] > 0.0:
                        entry = rounded(up[j] / down[j], scratch, bits, e4m3)
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
def fit_scale_rows(values, importance, scales, limits, entries, codes, e4m3):
    """Fill entries and codes as `cpu.fit_scale` does."""
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
                table[j] = rounded(sign * e4m3[place] * (j - 8), scratch, bits, e4m3)
            error = _error(value, weight, table, ordered, letters, places, code)
            if error < best:
                best = error
                entries[r] = table
        nearest(value, entries[r], ordered, letters, places, code)
