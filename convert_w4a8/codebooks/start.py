"""Channel scales, chosen before anything else: what the tables of all groups of an output channel share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from convert_w4a8 import devices
from convert_w4a8.fp8 import E4M3, E4M3_MAX, SCALE_MAX, to_e4m3
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.quantization.baselines import CHANNEL_FLOOR, quantize_reference
from convert_w4a8.quantization.codes import SCALE_CANDIDATES
from convert_w4a8.quantization.envelope import error_table, magnitude_frequencies
from convert_w4a8.quantization.scale_search import quantize_search, quantize_stock
from convert_w4a8.threads import one_thread_each, side_by_side

_ROWS = {"cpu": 128, "cuda": 1 << 14}
"""Output channels that are worked at a time."""
_POSITIONS = 16
"""Positions of the channel scale in an octave, where tables are free."""
_HEADROOM = 1.25
"""How much larger than before the entries of groups may become that make up for other groups' errors."""
_LEAST = 2.0**-100
"""The least channel scale: dividing by it overflows for no weight that is not much larger."""
_TOP = int(torch.tensor(SCALE_MAX).to(E4M3).view(torch.uint8))


def by_rows(work: Callable[[slice], None], weight: torch.Tensor, together: int = 1) -> None:
    """Work on the output channels of a matrix [N, K], some at a time: on a CPU side by side, on a GPU in turns.

    Their number is a multiple of `together`. What they give does not depend on the number of threads: how many are
    taken together does not.
    """
    n, step = len(weight), _ROWS[weight.device.type]
    step = max(1, step // together) * together
    parts = [slice(row, min(n, row + step)) for row in range(0, n, step)]
    if weight.device.type == "cpu":
        side_by_side(work, parts)
        return
    for part in parts:
        work(part)


def free_channel_scale(entries: torch.Tensor, *, headroom: bool) -> torch.Tensor:
    """Return the channel scales, float32 [n], whose E4M3 grid suits the entries of a channel best, float64 [n, 8·G].

    They lie in the octave above the least at which no entry saturates.
    """
    top = (entries.abs().amax(1) * ((_HEADROOM if headroom else 1.0) / E4M3_MAX)).clamp(min=_LEAST)
    normal = entries / top[:, None]
    best, found = torch.full_like(top, torch.inf), top.clone()
    for position in range(_POSITIONS):
        relative = 2 ** (position / _POSITIONS)
        rounded = to_e4m3((normal / relative).float()).double() * relative
        error = (rounded - normal).square_().sum(1)
        found = torch.where(error < best, top * relative, found)
        best = torch.minimum(error, best)
    return found.float()


class Uniform(Protocol):
    """What makes tables that are multiples of a scale, for some output channels."""

    @property
    def channel_scale(self) -> torch.Tensor:
        """Their channel scales, float32 [n]."""

    @property
    def is_fixed(self) -> bool:
        """Whether the channel scales have to stay."""

    def tables(
        self, values: torch.Tensor, importance: torch.Tensor, groups: slice, codes: torch.Tensor
    ) -> torch.Tensor:
        """Return the entries of groups, float64 [R, 8], and put their nearest codes into `codes`.

        values: float32 [R, 128] in units of the channel scale, in the order [n, groups]. importance: float64 [g, 128].
        """


@dataclass(frozen=True)
class UniformStart:
    """Channel scales float32 [N], and what stock vLLM asks of the group scales.

    pinned: groups whose FP8 scale has to be 56, bool [N, G], because vLLM's channel scale comes from them; None where
    every scale is free.
    """

    channel_scale: torch.Tensor
    pinned: torch.Tensor | None

    @property
    def is_fixed(self) -> bool:
        """Whether the channel scales have to stay: where they come from a group's scale."""
        return self.pinned is not None

    def rows(self, part: slice) -> "UniformStart":
        """Return those of some output channels."""
        return UniformStart(self.channel_scale[part], None if self.pinned is None else self.pinned[part])

    def tables(
        self, values: torch.Tensor, importance: torch.Tensor, groups: slice, codes: torch.Tensor
    ) -> torch.Tensor:
        """Return the entries of these groups, float64 [R, 8], and put their nearest codes into `codes`."""
        scales = torch.empty(len(values), device=values.device)
        shares = (importance / importance.mean()).float().repeat(len(values) // len(importance), 1)
        kept = torch.zeros(len(values), dtype=torch.bool, device=values.device)
        devices.codes(values.device).fit_symmetric(values, shares, kept, SCALE_CANDIDATES, codes, scales)
        limits = torch.zeros(len(self.channel_scale), groups.stop - groups.start, 2, dtype=torch.uint8)
        limits = limits.to(values.device)
        limits[..., 1] = _TOP
        if self.pinned is not None:
            limits[..., 0] = self.pinned[:, groups] * _TOP
        kernels = devices.codebooks(values.device)
        return kernels.fit_scale(values, importance, scales, limits.view(-1, 2), codes)

    def source_scale(self, group_scale: torch.Tensor) -> torch.Tensor | None:
        """Return the BF16 scales from which vLLM computes these, float8_e4m3fn [G, N]; None unless it is to do so."""
        if self.pinned is None:
            return None
        source = (group_scale.float() * self.channel_scale).bfloat16()
        found, channel = quantize_reference(source)
        if not torch.equal(channel, self.channel_scale) or not torch.equal(found.float(), group_scale.float()):
            raise AssertionError("vLLM would compute other scales")
        return source


def uniform_start(goal: torch.Tensor, importance: torch.Tensor, *, headroom: bool, stock: bool) -> UniformStart:
    """Choose channel scales for tables e4m3(f·v), as `search` does; goal [N, K], importance float64 [G, 128].

    headroom: for group scales up to twice as large as those of the weights as they are.
    """
    scales, counts = _group_scales(goal, (importance / importance.mean()).float())
    table = error_table(magnitude_frequencies(counts / counts.sum()))
    with one_thread_each():
        if stock:
            choice, source = quantize_stock(scales.cpu(), table)
            top = source.float().abs().amax(0)
            is_pinned = (source.float().abs() == top) & (top > E4M3_MAX * CHANNEL_FLOOR)
            first = is_pinned & (is_pinned.cumsum(0) == 1)
            return UniformStart(choice.channel_scale.to(goal.device), first.t().contiguous().to(goal.device))
        channel = quantize_search(scales.cpu(), table).channel_scale.to(goal.device)
    return UniformStart(channel * 2 if headroom else channel, None)  # which only shifts exponents


def _group_scales(goal: torch.Tensor, importance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scales of uniform tables, not rounded, float32 [G, N], and the counts of the codes, float64 [16]."""
    n, k = goal.shape
    scales = torch.empty(n, k // GROUP_SIZE, device=goal.device)
    counts = torch.zeros(n, 16, dtype=torch.int32, device=goal.device)
    kernels = devices.codes(goal.device)

    def choose(part: slice) -> None:
        values = goal[part].float().reshape(-1, GROUP_SIZE)
        shares = importance.repeat(len(values) // len(importance), 1)
        kept = torch.zeros(len(values), dtype=torch.bool, device=goal.device)
        codes = torch.empty_like(values, dtype=torch.uint8)
        found = torch.empty(len(values), device=goal.device)
        kernels.fit_symmetric(values, shares, kept, SCALE_CANDIDATES, codes, found)
        scales[part] = found.view(-1, k // GROUP_SIZE)
        for u in range(16):
            counts[part, u] = (codes.view(-1, k) == u).sum(1)

    by_rows(choose, goal)
    return scales.t().contiguous(), counts.sum(0).double().cpu()
