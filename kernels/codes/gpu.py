"""New codes, scales and table entries on a GPU: the same as reference.py.

Every operation is rounded as torch rounds it on a CPU (no fused multiply-add, divisions to the nearest), and sums run
in the same order: the bytes are those of the references. Groups are rows [R, V] of V = 16 values (one a code) or 128
(one a weight); a program takes some of them. What is written to must be contiguous.

What `tl.sum` sums are integers, or one value among zeros, the same in any order; or squares of 24 bits in float64,
exact unless scales lie many octaves apart, and statistics. Sizes are not specialized, so that a few kernels, compiled
once, do for all layers.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl

from convert_w4a8.kernels.fp8 import OPTIONS, from_e4m3, round_code, to_e4m3, tree_sum

_GROUPS = 64
"""Groups of 16 values of a program."""
_ELEMENTS = 1 << 11
"""Elements [groups, V, 16] of a program where values meet codes."""
_CHANNELS, _CHANNELS_AT_ONCE = 256, 16
"""Output channels of a program that adds up energies, and of one step of it."""


def gather(
    packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count the codes of groups of 128: see `quantization/groups.py` for what is returned.

    packed: int32 [n, K/8]. zeros: uint8 [n, K/128]. scales: float32 [n, K/128]. importance: float32 [K].
    """
    count, device = zeros.numel(), zeros.device
    values, counts, importances = torch.empty(3, count, 16, device=device).unbind()
    letters = torch.empty(count, 128, dtype=torch.uint8, device=device)
    inputs = (tensor.contiguous() for tensor in (packed, zeros, scales, importance))
    _launch(_gather, count, _GROUPS, *inputs, values, counts, importances, letters, zeros.shape[1], count)
    return values, counts, importances, letters


def add_energies(packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, energies: torch.Tensor) -> None:
    """Add the squares of the weights of groups of 128 to `energies`, float64 [K]; arguments as for `gather`."""
    n, groups = zeros.shape
    parts = triton.cdiv(n, _CHANNELS)
    partial = torch.empty(parts, groups * 128, dtype=torch.float64, device=packed.device)
    inputs = (tensor.contiguous() for tensor in (packed, zeros, scales))
    with torch.cuda.device_of(packed):
        _add_energies[(groups, parts)](
            *inputs, partial, n, groups, CHANNELS=_CHANNELS, STEP=_CHANNELS_AT_ONCE, **OPTIONS
        )
    energies += partial.sum(dim=0)


def fit_symmetric(
    values: torch.Tensor,
    importance: torch.Tensor,
    kept: torch.Tensor,
    candidates: list[float],
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Put what `reference.fit_symmetric` returns into `codes` and `scales`, for the groups that are not kept."""
    count, width = values.shape
    factors = torch.tensor(candidates, dtype=torch.float32, device=values.device)
    inputs = (tensor.contiguous() for tensor in (values, importance, kept.view(torch.uint8), factors))
    block = _GROUPS * 16 // width
    _launch(_fit_symmetric, count, block, *inputs, codes, scales, len(candidates), count, WIDTH=width)


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
    count, width = values.shape
    block = _ELEMENTS // (16 * width)
    energies = torch.empty(2, triton.cdiv(count, block), dtype=torch.float64, device=values.device)
    tensors = (values, counts, importance, kept.view(torch.uint8), channel_scale)
    inputs = (tensor.contiguous() for tensor in tensors)
    outputs = (codes, tables.view(torch.uint8), energies)
    groups = count // len(channel_scale)
    _launch(_refit, count, block, *inputs, *outputs, rounds, groups, count, WIDTH=width)
    signal, noise = energies.sum(dim=1).tolist()
    return signal, noise


def spell(letters: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the codes uint8 [R, 16] of the letters uint8 [R, 128], eight a word: int32 [R, 16]."""
    words = torch.empty(len(letters), 16, dtype=torch.int32, device=letters.device)
    _launch(_spell, len(letters), _GROUPS, letters.contiguous(), codes.contiguous(), words, len(letters))
    return words


def _launch(kernel: Any, count: int, block: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over `count` groups, `block` of them a program, without fused multiply-adds."""
    with torch.cuda.device_of(arguments[0]):
        kernel[(triton.cdiv(count, block),)](*arguments, **constants, BLOCK=block, **OPTIONS)


@triton.jit(do_not_specialize=["groups", "count"])
def _gather(rows, zeros, scales, importance, values, counts, weights, letters, groups, count, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = r < count
    code = tl.arange(0, 16)[None, :]
    first = r % groups * 128
    number = tl.zeros((BLOCK, 16), tl.float32)
    weight = tl.zeros((BLOCK, 16), tl.float32)
    for w in range(16):
        word = tl.load(rows + r * 16 + w, mask=inside, other=0)
        for i in tl.static_range(8):
            share = tl.load(importance + first + (8 * w + i), mask=inside, other=0)
            is_code = ((word >> (4 * i)) & 15)[:, None] == code
            number += is_code.to(tl.float32)
            weight += tl.where(is_code, share[:, None], 0.0)
    zero = tl.load(zeros + r, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + r, mask=inside, other=0)
    value = tl.where(number > 0, (code.to(tl.float32) - zero[:, None]) * scale[:, None], 0.0)
    place = r[:, None] * 16 + code
    tl.store(values + place, value, mask=inside[:, None])
    tl.store(counts + place, number, mask=inside[:, None])
    tl.store(weights + place, weight, mask=inside[:, None])
    words = tl.load(rows + place, mask=inside[:, None], other=0)
    nibble = tl.arange(0, 8)[None, None, :]
    spelled = ((words[:, :, None] >> (4 * nibble)) & 15).to(tl.uint8)
    tl.store(letters + (place * 8)[:, :, None] + nibble, spelled, mask=inside[:, None, None])


@triton.jit(do_not_specialize=["n", "groups"])
def _add_energies(rows, zeros, scales, partial, n, groups, CHANNELS: tl.constexpr, STEP: tl.constexpr):
    g = tl.program_id(0).to(tl.int64)
    word, nibble = tl.arange(0, 16)[None, :], tl.arange(0, 8)[None, None, :]
    total = tl.zeros((STEP, 16, 8), tl.float64)
    for start in range(0, CHANNELS, STEP):
        channel = tl.program_id(1).to(tl.int64) * CHANNELS + start + tl.arange(0, STEP)
        inside = channel < n
        r = channel * groups + g
        words = tl.load(rows + r[:, None] * 16 + word, mask=inside[:, None], other=0)
        zero = tl.load(zeros + r, mask=inside, other=0).to(tl.float32)
        scale = tl.load(scales + r, mask=inside, other=0)
        code = ((words[:, :, None] >> (4 * nibble)) & 15).to(tl.float32)
        value = (code - zero[:, None, None]) * scale[:, None, None]
        total += (value * value).to(tl.float64)
    k = tl.arange(0, 16)[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(partial + (tl.program_id(1) * groups + g) * 128 + k, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["candidates", "count"])
def _fit_symmetric(
    values, weights, kept, factors, codes, scales, candidates, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wanted = (r < count) & (tl.load(kept + r, mask=r < count, other=1) == 0)
    place = r[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    value = tl.load(values + place, mask=wanted[:, None], other=0)
    weight = tl.load(weights + place, mask=wanted[:, None], other=0)
    low, high = tl.min(value, axis=1), tl.max(value, axis=1)
    unit = tl.where(high > -low, -high, -low) * 0.125
    unit = tl.where(unit == 0, 1.0, unit)
    normal = tl.div_rn(value, unit[:, None])
    best = tl.full((BLOCK,), 1.0, tl.float32)
    best_gain = tl.zeros((BLOCK,), tl.float32)
    for i in range(candidates):
        code = round_code(normal * tl.load(factors + i))
        weighted = code * weight
        wq, qq = tl.split(tree_sum(tl.join(weighted * normal, weighted * code)))
        scale = tl.where(qq > 0, tl.div_rn(wq, tl.where(qq > 0, qq, 1.0)), 0.0)
        gain = wq * scale
        best = tl.where(gain > best_gain, scale, best)
        best_gain = tl.maximum(gain, best_gain)
    code = round_code(tl.div_rn(normal, best[:, None])) + 8
    tl.store(codes + place, code.to(tl.uint8), mask=wanted[:, None])
    tl.store(scales + r, best * unit, mask=wanted)


@triton.jit(do_not_specialize=["rounds", "groups", "count"])
def _refit(
    values,
    counts,
    weights,
    kept,
    channel_scale,
    codes,
    tables,
    energies,
    rounds,
    groups,
    count,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = (r < count)[:, None]
    is_kept = tl.load(kept + r, mask=r < count, other=1)[:, None] != 0
    channel = tl.load(channel_scale + r // groups, mask=r < count, other=1)[:, None]
    place = r[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    value = tl.load(values + place, mask=inside, other=0)
    weight = tl.load(weights + place, mask=inside, other=0)
    normal = tl.div_rn(value, channel)
    # Entries by code: those of the table, 0, and the table's from the last to the second, negated.
    c = tl.arange(0, 16)[None, :]
    bits = tl.load(tables + r[:, None] * 8 + tl.where(c < 8, c, (16 - c) % 8), mask=inside, other=0)
    entries = from_e4m3(bits)
    entries = tl.where(c < 8, entries, tl.where(c == 8, 0.0, -entries))
    for _ in range(rounds):
        improved = _best_entries(normal, weight, _nearest(normal, entries), entries)
        entries = tl.where(is_kept, entries, improved)
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    code = tl.where(is_kept, code, _nearest(normal, entries))
    tl.store(codes + place, code.to(tl.uint8), mask=inside & ~is_kept)
    tl.store(tables + r[:, None] * 8 + c, to_e4m3(entries).to(tl.uint8), mask=inside & ~is_kept & (c < 8))
    entry = tl.sum(tl.where(code[:, :, None] == c[:, None, :], entries[:, None, :], 0.0), axis=2)
    difference = entry * channel - value
    number = tl.load(counts + place, mask=inside, other=0)
    signal = tl.sum(tl.sum((value * value * number).to(tl.float64), axis=1), axis=0)
    noise = tl.sum(tl.sum((difference * difference * number).to(tl.float64), axis=1), axis=0)
    tl.store(energies + tl.program_id(0), signal)
    tl.store(energies + tl.num_programs(0) + tl.program_id(0), noise)


@triton.jit(do_not_specialize=["count"])
def _spell(letters, codes, rows, count, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    place = r * 16 + tl.arange(0, 16)[None, :]
    word = tl.zeros((BLOCK, 16), tl.int32)
    for i in tl.static_range(8):
        letter = tl.load(letters + place * 8 + i, mask=r < count, other=0)
        word |= tl.load(codes + r * 16 + letter, mask=r < count, other=0).to(tl.int32) << (4 * i)
    tl.store(rows + place, word, mask=r < count)


@triton.jit
def _nearest(values, entries):
    """Return for values [R, V] the codes, int32, whose entries [R, 16] are nearest, as `reference.nearest_codes` does.

    A code's rank is its place among the entries in a stable sort; a value has the rank of the first entry behind whose
    middle to the next it does not lie.
    """
    code = tl.arange(0, 16)
    this, other = entries[:, :, None], entries[:, None, :]
    is_before = (other < this) | ((other == this) & (code[None, None, :] < code[None, :, None]))
    rank = tl.sum(is_before.to(tl.int32), axis=2)
    ordered = tl.sum(tl.where(rank[:, :, None] == code[None, None, :], this, 0.0), axis=1)
    following = tl.sum(tl.where(rank[:, :, None] == code[None, None, :] + 1, this, 0.0), axis=1)
    middle = tl.where(code[None, :] < 15, (following + ordered) * 0.5, float("inf"))
    place = tl.sum((middle[:, None, :] < values[:, :, None]).to(tl.int32), axis=2)
    return tl.sum(tl.where(rank[:, None, :] == place[:, :, None], code[None, None, :], 0), axis=2)


@triton.jit
def _best_entries(values, weights, codes, entries):
    """Return the entries by code, float32 [R, 16], that `reference.best_entries` finds, rounded to E4M3."""
    code = tl.arange(0, 16)[None, :]
    entry = tl.where(code < 8, code, 16 - code)
    used = (codes[:, :, None] == entry[:, None, :]) | (codes[:, :, None] == 16 - entry[:, None, :])
    signed = weights * tl.where(codes > 8, -values, values)
    down = tree_sum(tl.where(used, weights[:, :, None], 0.0))
    up = tree_sum(tl.where(used, signed[:, :, None], 0.0))
    best = from_e4m3(to_e4m3(tl.div_rn(up, tl.where(down > 0, down, 1.0))))
    return tl.where((down > 0) & (code != 8), tl.where(code < 8, best, -best), entries)
