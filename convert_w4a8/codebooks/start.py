"""Channel scales, chosen before anything else: what the tables of all groups of an output channel share."""

from dataclasses import dataclass

import torch

from convert_w4a8 import devices
from convert_w4a8.codebooks.method import Method, Tables
from convert_w4a8.fp8 import CODE_MAX, E4M3, E4M3_MAX, SCALE_MAX, to_e4m3
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.quantization.baselines import CHANNEL_FLOOR, quantize_reference
from convert_w4a8.quantization.codes import SCALE_CANDIDATES
from convert_w4a8.quantization.envelope import error_table, magnitude_frequencies
from convert_w4a8.quantization.scale_search import quantize_search, quantize_stock
from convert_w4a8.threads import one_thread_each, side_by_side

_POSITIONS = 16
"""Positions of the channel scale in an octave, where tables are free."""
_HEADROOM = 1.25
"""How much larger than before the entries of groups may become that make up for other groups' errors."""
_LEAST = 2.0**-100
"""The least channel scale: dividing by it overflows for no weight."""
_TOP = int(torch.tensor(SCALE_MAX).to(E4M3).view(torch.uint8))
_ROWS = 128


@dataclass(frozen=True)
class Start:
    """Channel scales float32 [N], and what stock vLLM asks of the group scales.

    pinned: groups whose FP8 scale has to be 56, bool [N, G], because vLLM's channel scale comes from them; None where
    every scale is free.
    """

    channel_scale: torch.Tensor
    pinned: torch.Tensor | None

    def limits(self, rows: slice, groups: slice) -> torch.Tensor:
        """Return the least and the largest bytes of the scales of some groups, uint8 [n·g, 2], in the order [n, g]."""
        n, g = len(self.channel_scale[rows]), groups.stop - groups.start
        limits = torch.zeros(n, g, 2, dtype=torch.uint8, device=self.channel_scale.device)
        limits[..., 1] = _TOP
        if self.pinned is not None:
            limits[..., 0] = self.pinned[rows, groups] * _TOP
        return limits.view(-1, 2)

    def source_scale(self, group_scale: torch.Tensor) -> torch.Tensor | None:
        """Return the BF16 scales from which vLLM computes these, float8_e4m3fn [G, N]; None unless it is to do so."""
        if self.pinned is None:
            return None
        source = (group_scale.float() * self.channel_scale).bfloat16()
        found, channel = quantize_reference(source)
        if not torch.equal(channel, self.channel_scale) or not torch.equal(found.float(), group_scale.float()):
            raise AssertionError("vLLM would compute other scales")
        return source


def choose_start(goal: torch.Tensor, importance: torch.Tensor, method: Method, *, stock: bool) -> Start:
    """Choose channel scales for a matrix [N, K] whose columns count `importance`, float64 [K]."""
    if method.tables is Tables.FREE:
        return Start(_free_scales(goal, importance.view(-1, GROUP_SIZE), _HEADROOM if method.feedback else 1.0), None)
    scales, counts = _group_scales(goal, importance.float().view(-1, GROUP_SIZE))
    table = error_table(magnitude_frequencies(counts / counts.sum()))
    with one_thread_each():
        if stock:
            choice, source = quantize_stock(scales.cpu(), table)
            top = source.float().abs().amax(0)
            is_pinned = (source.float().abs() == top) & (top > E4M3_MAX * CHANNEL_FLOOR)
            first = is_pinned & (is_pinned.cumsum(0) == 1)
            return Start(choice.channel_scale.to(goal.device), first.t().contiguous().to(goal.device))
        channel = quantize_search(scales.cpu(), table).channel_scale.to(goal.device)
    # Twice as much only shifts exponents, and leaves room for groups that make up for other groups' errors.
    return Start(channel * 2 if method.feedback else channel, None)


def _free_scales(goal: torch.Tensor, importance: torch.Tensor, headroom: float) -> torch.Tensor:
    """Return the channel scales, float32 [N], whose E4M3 grid suits the entries that groups would have, best.

    They lie in the octave above the least at which no entry saturates.
    """
    n, k = goal.shape
    result = torch.empty(n, dtype=torch.float32, device=goal.device)
    kernels = devices.codebooks(goal.device)

    def choose(row: int) -> None:
        values = goal[row : row + _ROWS].float().contiguous()
        entries = kernels.fit(values.view(-1, GROUP_SIZE), importance, 0).view(len(values), -1).float()
        top = (entries.abs().amax(1) / E4M3_MAX * headroom).clamp(min=_LEAST)
        best, found = torch.full_like(top, torch.inf), top.clone()
        for position in range(_POSITIONS):
            channel = top * 2 ** (position / _POSITIONS)
            rounded = to_e4m3(entries / channel[:, None]).float() * channel[:, None]
            error = (rounded - entries).square().sum(1) if bool(top.max() < 1e15) else (rounded / top[:, None] - entries / top[:, None]).square().sum(1)
            found = torch.where(error < best, channel, found)
            best = torch.minimum(error, best)
        result[row : row + _ROWS] = found

    rows = _ROWS if goal.device.type == "cpu" else n
    side_by_side(choose, range(0, n, rows))
    return result


def _group_scales(goal: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of uniform tables, not rounded, float32 [G, N], and how often each code occurs, float64 [16]."""
    n, k = goal.shape
    scales = torch.empty(n, k // GROUP_SIZE, device=goal.device)
    starts = range(0, n, _ROWS)
    counts = torch.zeros(len(starts), 16, dtype=torch.float64, device=goal.device)
    kernels = devices.codes(goal.device)

    def choose(row: int) -> None:
        values = goal[row : row + _ROWS].float().reshape(-1, GROUP_SIZE)
        shares = importance.repeat(len(values) // len(importance), 1)
        kept = torch.zeros(len(values), dtype=torch.bool, device=goal.device)
        codes = torch.empty_like(values, dtype=torch.uint8)
        found = torch.empty(len(values), device=goal.device)
        kernels.fit_symmetric(values, shares, kept, SCALE_CANDIDATES, codes, found)
        scales[row : row + _ROWS] = found.view(-1, k // GROUP_SIZE)
        counts[row // _ROWS] = torch.bincount(codes.flatten(), minlength=16)

    side_by_side(choose, starts)
    return scales.t().contiguous(), counts.sum(0).cpu()
