"""Look-ups in tables, choices of codes, and gradients of entries: operations of `reference` in Triton."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import torch
import triton
import triton.language as tl

from convert_w4a8.fp8 import E4M3_MAX
from convert_w4a8.kernels.fp8 import OPTIONS, from_e4m3, to_e4m3
from convert_w4a8.kernels.training.reference import LEAST_ROOT, MOST
from convert_w4a8.linear import GROUP_SIZE

_GROUP = tl.constexpr(GROUP_SIZE)
_FP8_MAX = tl.constexpr(E4M3_MAX)
_MOST = tl.constexpr(MOST)
_LEAST_ROOT = tl.constexpr(LEAST_ROOT)
_ENTRIES = 1024
"""Entries of a block."""
_ROWS = 8
"""Groups of weights of a block."""
_TABLES = 32
"""Tables that are sorted by one program."""


def look_up(entries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """See `reference.look_up`."""
    out = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    groups = codes.numel() // GROUP_SIZE
    with torch.cuda.device_of(codes):
        _look_up_kernel[(triton.cdiv(groups, _ROWS),)](entries, codes, out, groups, ROWS=_ROWS, **OPTIONS)
    return out


def choose(weights: torch.Tensor, factor: torch.Tensor, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.choose`."""
    levels, order = _levels(entries)
    codes = torch.empty(weights.shape, dtype=torch.uint8, device=weights.device)
    values = torch.empty(weights.shape, dtype=torch.bfloat16, device=weights.device)
    groups = codes.numel() // GROUP_SIZE
    with torch.cuda.device_of(weights):
        _choose_kernel[(triton.cdiv(groups, _ROWS),)](
            weights,
            factor,
            levels,
            order,
            codes,
            values,
            groups,
            entries.shape[1],
            ROWS=_ROWS,
            **OPTIONS,
        )
    return codes, values


def _levels(entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the codes of each table mean in ascending order, float32 [N, G, 16], and these codes, uint8."""
    levels = torch.empty(*entries.shape[:2], 16, dtype=torch.float32, device=entries.device)
    order = torch.empty(levels.shape, dtype=torch.uint8, device=entries.device)
    groups = levels.numel() // 16
    entries = entries.contiguous()
    with torch.cuda.device_of(entries):
        _levels_kernel[(triton.cdiv(groups, _TABLES),)](entries, levels, order, groups, TABLES=_TABLES, **OPTIONS)
    return levels, order


def sum_by_entry(gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """See `reference.sum_by_entry`."""
    n, k = gradient.shape
    out = torch.empty(n, k // GROUP_SIZE, 8, dtype=torch.float32, device=gradient.device)
    groups = codes.numel() // GROUP_SIZE
    with torch.cuda.device_of(gradient):
        _sum_kernel[(triton.cdiv(groups, _ROWS),)](gradient, codes, out, groups, ROWS=_ROWS, **OPTIONS)
    return out


def pull(
    entries: torch.Tensor,
    start: torch.Tensor,
    step: torch.Tensor,
    known: torch.Tensor,
    second: torch.Tensor,
    part: float,
) -> None:
    """See `reference.pull`."""
    count = entries.numel()
    with torch.cuda.device_of(entries):
        _pull_kernel[(triton.cdiv(count, _ENTRIES),)](
            entries, start, step, known, second, part, count, BLOCK=_ENTRIES, **OPTIONS
        )


@triton.jit
def _look_up_kernel(entries, codes, out, GROUPS, ROWS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = group < GROUPS
    place = group * _GROUP + tl.arange(0, _GROUP)[None, :]
    code = tl.load(codes + place, mask=inside, other=8).to(tl.int32)
    entry = tl.load(entries + group * 8 + tl.where(code > 8, 16 - code, code), mask=inside & (code != 8), other=0.0)
    tl.store(out + place, tl.where(code > 8, -entry, entry).to(tl.bfloat16), mask=inside)


@triton.jit
def _levels_kernel(entries, levels, order, GROUPS, TABLES: tl.constexpr):
    group = (tl.program_id(0).to(tl.int64) * TABLES + tl.arange(0, TABLES))[:, None]
    inside = group < GROUPS
    code = tl.arange(0, 16)[None, :]
    entry = tl.load(entries + group * 8 + tl.where(code > 8, 16 - code, code % 8), mask=inside, other=0.0)
    value = tl.where(code > 8, -entry, tl.where(code == 8, 0.0, entry))
    place = tl.zeros((TABLES, 16), tl.int32)
    for other in tl.static_range(16):
        start = entries + group * 8 + (16 - other if other > 8 else other % 8)
        theirs = tl.load(start, mask=inside, other=0.0)
        if other > 8:
            theirs = -theirs
        if other == 8:
            theirs = theirs * 0.0
        place += ((theirs < value) | ((theirs == value) & (other < code))).to(tl.int32)
    tl.store(levels + group * 16 + place, value, mask=inside)
    tl.store(order + group * 16 + place, (code + place * 0).to(tl.uint8), mask=inside)


@triton.jit
def _choose_kernel(weights, factor, levels, order, codes, values, GROUPS, PER_ROW, ROWS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = group < GROUPS
    place = group * _GROUP + tl.arange(0, _GROUP)[None, :]
    wanted = tl.load(weights + place, mask=inside, other=0.0) * tl.load(
        factor + group // PER_ROW, mask=inside, other=0.0
    )
    found = tl.zeros((ROWS, _GROUP), tl.int32)
    low = tl.load(levels + group * 16, mask=inside, other=0.0)
    for level in tl.static_range(1, 16):
        high = tl.load(levels + group * 16 + level, mask=inside, other=0.0)
        found += (wanted > (high + low) * 0.5).to(tl.int32)
        low = high
    tl.store(codes + place, tl.load(order + group * 16 + found, mask=inside, other=0), mask=inside)
    chosen = tl.load(levels + group * 16 + found, mask=inside, other=0.0)
    tl.store(values + place, chosen.to(tl.bfloat16), mask=inside)


@triton.jit
def _sum_kernel(gradient, codes, out, GROUPS, ROWS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = group < GROUPS
    place = group[:, None] * _GROUP + tl.arange(0, _GROUP)[None, :]
    value = tl.load(gradient + place, mask=inside[:, None], other=0.0)
    code = tl.load(codes + place, mask=inside[:, None], other=8).to(tl.int32)
    value = tl.where(code > 8, -value, value)
    entry = tl.where(code > 8, 16 - code, code)
    for each in tl.static_range(8):
        tl.store(out + group * 8 + each, tl.sum(tl.where(entry == each, value, 0.0), 1), mask=inside)


@triton.jit
def _pull_kernel(entries, start, step, known, second, part, COUNT, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < COUNT
    entry = tl.load(entries + place, mask=inside, other=0.0)
    base = tl.load(start + place, mask=inside, other=0.0)
    unit = tl.load(step + place, mask=inside, other=1.0)
    rounded = from_e4m3(to_e4m3(tl.clamp(base + entry * unit, -_FP8_MAX, _FP8_MAX)))
    root = tl.sqrt_rn(tl.load(second + place, mask=inside, other=1.0)) + _LEAST_ROOT
    way = tl.minimum(tl.div_rn(tl.load(known + place, mask=inside, other=0.0) * part, root), _MOST)
    entry += (tl.div_rn(rounded.to(tl.float32) - base, unit) - entry) * way
    tl.store(entries + place, entry, mask=inside)
