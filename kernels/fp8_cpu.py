"""What several numba kernels do with numbers, rounded as torch rounds it."""

# numba's decorator and its functions have no Python types.
# ruff: noqa: ANN001, ANN201
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

ROUNDER = np.float32(1.5 * 2**23)
"""x + this − this rounds |x| < 2²² to the nearest integer, ties to even."""
E4M3_VALUES: npt.NDArray[np.float32] = torch.arange(256).byte().view(torch.float8_e4m3fn).float().numpy()
"""The values of all bytes."""
_E4M3_MAX, _E4M3_NORMAL, _E4M3_STEPS = np.float32(448), np.float32(2**-6), np.float32(2**9)
_ZERO = np.float32(0)


@njit(cache=True, inline="always")
def to_e4m3(x, scratch, bits):
    """Return the byte of the nearest E4M3 value, ties to even, saturating; `bits` is `scratch` seen as uint32."""
    magnitude = min(abs(x), _E4M3_MAX)
    scratch[0] = x
    sign = (bits[0] >> np.uint32(24)) & np.uint32(0x80)
    if magnitude < _E4M3_NORMAL:
        return sign | np.uint32((magnitude * _E4M3_STEPS + ROUNDER) - ROUNDER)
    scratch[0] = magnitude
    b = bits[0]
    b += np.uint32(0x7FFFF) + ((b >> np.uint32(20)) & np.uint32(1))
    return sign | ((b >> np.uint32(20)) - np.uint32(120 << 3))


@njit(cache=True, inline="always")
def nearest(value, entries, ordered, order, counts, codes):
    """Choose for each value the nearest of the 16 that `entries` stand for, the earlier in a stable sort if equal."""
    descending = entries[0] > _ZERO  # most are sorted already, one way or the other
    for step in range(16):
        c = 15 - step if descending else step
        x = entries[c] if c < 8 else (_ZERO if c == 8 else -entries[16 - c])
        i = step
        while i > 0 and (ordered[i - 1] > x or (descending and ordered[i - 1] == x)):
            ordered[i], order[i] = ordered[i - 1], order[i - 1]
            i -= 1
        ordered[i], order[i] = x, c
    counts[:] = 0
    for i in range(15):
        middle = (ordered[i + 1] + ordered[i]) / np.float32(2)
        for v in range(len(value)):
            counts[v] += middle < value[v]
    for v in range(len(value)):
        codes[v] = order[counts[v]]
