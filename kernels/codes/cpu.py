"""New codes, scales and table entries on a CPU, compiled by numba: the same as reference.py.

Every operation is rounded as torch rounds it, and sums run in the same order: the bytes are those of the references.
Groups are rows [R, V] of V = 16 values (one a code) or 128 (one a weight).
"""

# numba's decorator and its functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from convert_w4a8.kernels.fp8_cpu import E4M3_VALUES, ROUNDER, nearest, to_e4m3

_ZERO, _ONE = np.float32(0), np.float32(1)
_CODE_MAX = np.float32(8)
_LOWEST, _HIGHEST = np.float32(-9), np.float32(8)


def gather(
    packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count the codes of groups of 128: see `quantization/groups.py` for what is returned.

    packed: int32 [n, K/8]. zeros: uint8 [n, K/128]. scales: float32 [n, K/128]. importance: float32 [K].
    """
    count = zeros.numel()
    values, counts, importances = torch.empty(3, count, 16).unbind()
    letters = torch.empty(count, 128, dtype=torch.uint8)
    _gather(
        _words(packed), _array(zeros), _array(scales), _array(importance), *map(_array, (values, counts, importances))
    )
    _unpack(_words(packed).reshape(-1), letters.numpy().reshape(-1))
    return values, counts, importances, letters


def add_energies(packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, energies: torch.Tensor) -> None:
    """Add the squares of the weights of groups of 128 to `energies`, float64 [K]; arguments as for `gather`."""
    _add_energies(_words(packed), _array(zeros), _array(scales), energies.numpy())


def fit_symmetric(
    values: torch.Tensor,
    importance: torch.Tensor,
    kept: torch.Tensor,
    candidates: list[float],
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Put what `reference.fit_symmetric` returns into `codes` and `scales`, for the groups that are not kept."""
    factors = np.array(candidates, np.float32)
    _fit_symmetric(_array(values), _array(importance), _array(kept), factors, codes.numpy(), scales.numpy())


def refit(
    values: torch.Tensor,
    counts: torch.Tensor,
    importance: torch.Tensor,
    kept: torch.Tensor,
    channel_scale: torch.Tensor,
    codes: torch.Tensor,
    tables: torch.Tensor,
    rounds: int,
) -> tuple[float, float]:
    """Do what `reference.refit` does to `codes` and `tables`, for the groups that are not kept.

    channel_scale: float32 [n]; the groups are in the order [n, K/128]. tables: float8_e4m3fn [R, 8].
    Returns the energy of the values, and that of their difference from what they became, of all groups.
    """
    arrays = map(_array, (values, counts, importance, kept, channel_scale))
    energies: tuple[float, float] = _refit(
        tuple(arrays), codes.numpy(), tables.view(torch.uint8).numpy(), rounds, E4M3_VALUES
    )
    return energies


def spell(letters: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the codes uint8 [R, 16] of the letters uint8 [R, 128], eight a word: int32 [R, 16]."""
    words = torch.empty(len(letters), 16, dtype=torch.int32)
    _spell(letters.numpy(), _array(codes), _words(words))
    return words


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    return tensor.contiguous().numpy()


def _words(packed: torch.Tensor) -> npt.NDArray[np.uint32]:
    words: npt.NDArray[np.uint32] = packed.contiguous().numpy().view(np.uint32)
    return words


@njit(cache=True, nogil=True)
def _gather(words, zeros, scales, importance, values, counts, weights):
    channels, groups = zeros.shape
    for n in range(channels):
        for g in range(groups):
            r = n * groups + g
            count, weight, value = counts[r], weights[r], values[r]
            count[:] = _ZERO
            weight[:] = _ZERO
            for w in range(16 * g, 16 * g + 16):
                word = words[n, w]
                for i in range(8):
                    u = (word >> np.uint32(4 * i)) & np.uint32(15)
                    count[u] += _ONE
                    weight[u] += importance[8 * w + i]
            zero, scale = np.float32(zeros[n, g]), scales[n, g]
            for u in range(16):
                value[u] = (np.float32(u) - zero) * scale if count[u] > _ZERO else _ZERO


@njit(cache=True, nogil=True)
def _unpack(words, letters):
    for w in range(len(words)):
        word = words[w]
        for i in range(8):
            letters[8 * w + i] = (word >> np.uint32(4 * i)) & np.uint32(15)


@njit(cache=True, nogil=True)
def _add_energies(words, zeros, scales, energies):
    channels, groups = zeros.shape
    squares = np.empty(16, np.float32)
    for n in range(channels):
        for g in range(groups):
            zero, scale = np.float32(zeros[n, g]), scales[n, g]
            for u in range(16):
                value = (np.float32(u) - zero) * scale
                squares[u] = value * value
            for w in range(16 * g, 16 * g + 16):
                word = words[n, w]
                for i in range(8):
                    energies[8 * w + i] += squares[(word >> np.uint32(4 * i)) & np.uint32(15)]


@njit(cache=True, inline="always")
def _round_code(x):
    clamped = min(max(x, _LOWEST), _HIGHEST)
    rounded = (clamped + ROUNDER) - ROUNDER
    return min(max(rounded, -_CODE_MAX), _CODE_MAX - _ONE)


@njit(cache=True, inline="always")
def _tree_sum(terms):
    """Sum up each column as `reference.tree_sum` does, overwriting the terms; the sums are in the first row."""
    half = len(terms) // 2
    while half:
        for v in range(half):
            for i in range(terms.shape[1]):
                terms[v, i] += terms[v + half, i]
        half //= 2


@njit(cache=True, nogil=True)
def _fit_symmetric(values, weights, kept, factors, codes, scales):
    width, candidates = values.shape[1], len(factors)
    normal = np.empty(width, np.float32)
    wq, qq = np.empty((width, candidates), np.float32), np.empty((width, candidates), np.float32)
    for r in range(len(values)):
        if kept[r]:
            continue
        value, weight = values[r], weights[r]
        low = high = value[0]
        for v in range(1, width):
            low, high = min(low, value[v]), max(high, value[v])
        unit = (-high if high > -low else -low) / _CODE_MAX
        if unit == _ZERO:
            unit = _ONE
        for v in range(width):
            normal[v] = value[v] / unit
            for i in range(candidates):
                code = _round_code(normal[v] * factors[i])
                weighted = code * weight[v]
                wq[v, i] = weighted * normal[v]
                qq[v, i] = weighted * code
        _tree_sum(wq)
        _tree_sum(qq)
        best, best_gain = _ONE, _ZERO
        for i in range(candidates):
            scale = wq[0, i] / qq[0, i] if qq[0, i] > _ZERO else _ZERO
            gain = wq[0, i] * scale
            if gain > best_gain:
                best, best_gain = scale, gain
        for v in range(width):
            codes[r, v] = np.uint8(_round_code(normal[v] / best) + _CODE_MAX)
        scales[r] = best * unit


@njit(cache=True, nogil=True)
def _refit(groups, codes, tables, rounds, e4m3_values):
    values, counts, weights, kept, channel_scale = groups
    width, groups_per_channel = values.shape[1], len(values) // len(channel_scale)
    entries, ordered, order = np.empty(8, np.float32), np.empty(16, np.float32), np.empty(16, np.uint8)
    scratch, places, value = np.empty(1, np.float32), np.empty(width, np.int32), np.empty(width, np.float32)
    bits = scratch.view(np.uint32)
    up, down = np.empty((width, 8), np.float32), np.empty((width, 8), np.float32)
    previous = np.empty(width, np.uint8)
    signal = noise = 0.0
    for r in range(len(values)):
        weight, table, code, channel = weights[r], tables[r], codes[r], channel_scale[r // groups_per_channel]
        for j in range(8):
            entries[j] = e4m3_values[table[j]]
        if not kept[r]:
            for v in range(width):
                value[v] = values[r, v] / channel
            is_settled = False
            for i in range(rounds):
                nearest(value, entries, ordered, order, places, code)
                is_settled = i > 0 and (code == previous).all()  # then the entries are, too
                if is_settled:
                    break
                previous[:] = code
                _best_entries(value, weight, code, up, down)
                for j in range(8):
                    if down[0, j] > _ZERO:
                        table[j] = to_e4m3(up[0, j] / down[0, j], scratch, bits)
                        entries[j] = e4m3_values[table[j]]
            if not is_settled:
                nearest(value, entries, ordered, order, places, code)
        for v in range(width):
            c = code[v]
            entry = entries[c] if c < 8 else (_ZERO if c == 8 else -entries[16 - c])
            difference = entry * channel - values[r, v]
            signal += np.float64(values[r, v] * values[r, v] * counts[r, v])
            noise += np.float64(difference * difference * counts[r, v])
    return signal, noise


@njit(cache=True, inline="always")
def _best_entries(value, weight, code, up, down):
    """Leave the numerators and denominators of `reference.best_entries` in the first rows of `up` and `down`."""
    up[:] = _ZERO
    down[:] = _ZERO
    for v in range(len(value)):
        if code[v] < 8:
            down[v, code[v]] = weight[v]
            up[v, code[v]] = weight[v] * value[v]
        elif code[v] > 8:
            down[v, 16 - code[v]] = weight[v]
            up[v, 16 - code[v]] = weight[v] * -value[v]
    _tree_sum(down)
    _tree_sum(up)


@njit(cache=True, nogil=True)
def _spell(letters, codes, words):
    for r in range(len(letters)):
        for w in range(16):
            word = np.uint32(0)
            for i in range(8):
                word |= np.uint32(codes[r, letters[r, 8 * w + i]]) << np.uint32(4 * i)
            words[r, w] = word
