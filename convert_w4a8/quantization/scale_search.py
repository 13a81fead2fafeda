"""FP8 tables and channel scales that minimise the squared error of the final table entries.

Given a channel scale, every group's best table is found exactly (`envelope.py`; entry by entry where tables are free).
What is left is one number a channel. Doubling a channel scale only shifts exponents, so it is searched within one
octave, at the top of the E4M3 range, where subnormal entries are rarest.

The error of a group relative to its energy depends only on x = |s|/C, so it is tabulated once, over log2(x). The error
of a channel at all positions of C is then a sum of table rows, one a group, weighted by s²: an embedding bag.
"""

from dataclasses import dataclass

import torch

from convert_w4a8.encoding.tables import expand_tables
from convert_w4a8.fp8 import CODE_MAX, E4M3, E4M3_MAX, SCALE_MAX, to_e4m3
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.quantization.baselines import CHANNEL_FLOOR, channel_unit, quantize_reference
from convert_w4a8.quantization.envelope import ErrorTable

_STEPS = 256
"""Positions of the channel scale in an octave."""
_STRIDE = 2
"""Positions from one table row to the next: 128 rows an octave of group scales."""
_ROWS = 5 * _STEPS // _STRIDE
"""Groups more than 5 octaves below their channel's largest share the last row: they weigh less than 1/1000."""
_TOP = 32 * 2 ** (219 / _STEPS)
"""The largest |s|/C that is tried: 8·57.9 = 463.2 still rounds to 448, the largest FP8 value. The grid goes through 32,
where every entry is exact: a channel with one scale for all its groups loses nothing."""
_STOCK_TOP, _STOCK_POSITIONS = 61.0, 64
"""Where the largest group has to have the FP8 scale 56: |s|/C from 61 down to 51.6."""
_SCALE_MAX_BITS = int(torch.tensor(SCALE_MAX).to(E4M3).view(torch.uint8))


@dataclass(frozen=True)
class ScaleChoice:
    """FP8 tables for scales [G, N], as `W4A8Linear` has them, and what they cost.

    group_scale: float8_e4m3fn [G, N], or None where `entries` is given.
    entries: float8_e4m3fn [G, N, 8], or None.
    channel_scale: float32 [N].
    noise: float64 [N], sum over all weights of a channel of the squared difference from scale·code.
    """

    group_scale: torch.Tensor | None
    entries: torch.Tensor | None
    channel_scale: torch.Tensor
    noise: torch.Tensor

    def to(self, device: torch.device) -> "ScaleChoice":
        """Return the same on another device."""
        group_scale = None if self.group_scale is None else self.group_scale.to(device)
        entries = None if self.entries is None else self.entries.to(device)
        return ScaleChoice(group_scale, entries, self.channel_scale.to(device), self.noise)

    def tables(self) -> torch.Tensor:
        """Return the table entries, stored or expanded, float8_e4m3fn [G, N, 8]."""
        if self.group_scale is not None:
            return expand_tables(self.group_scale)
        if self.entries is None:
            raise ValueError("a choice needs group_scale or entries")
        return self.entries


def table_noise(
    scales: torch.Tensor, group_scale: torch.Tensor, channel_scale: torch.Tensor, table: ErrorTable
) -> torch.Tensor:
    """Return the noise of each channel, float64 [N], if FP8 and channel scales stand for scales [G, N]; closed form.

    A scale and its FP8 scale have the same sign, or the FP8 scale is zero.
    """
    bits = (group_scale.view(torch.uint8) & 0x7F).long()
    return _noise(scales.float().abs() / channel_scale, bits, channel_scale, table)


def reference_tables(scales: torch.Tensor, source: torch.Tensor, table: ErrorTable) -> ScaleChoice:
    """Return `quantize_reference` of `source`, and its noise as a stand-in for `scales`, both [G, N]."""
    group_scale, channel = quantize_reference(source)
    return ScaleChoice(group_scale, None, channel, table_noise(scales, group_scale, channel, table))


def quantize_search(scales: torch.Tensor, table: ErrorTable) -> ScaleChoice:
    """Choose FP8 group scales and channel scales; never worse for any channel than `quantize_reference`.

    scales: float16, bfloat16 or float32 [G, N]. table: of the layer's code frequencies.
    Raises ValueError on a scale that is not finite.
    """
    reference = reference_tables(scales, scales, table)
    s = scales.float().abs()
    x = _scale_candidates(_TOP, _STEPS, s.device)
    channel = _best_position(s, x, table.error(x, table.best(x)) / x.square())
    x = s / channel
    bits = table.best(x)
    return _merge(ScaleChoice(_signed(bits, scales), None, channel, _noise(x, bits, channel, table)), reference)


def quantize_stock(scales: torch.Tensor, table: ErrorTable) -> tuple[ScaleChoice, torch.Tensor]:
    """Choose among what stock vLLM computes at load from BF16 scales; returns those scales too, bfloat16 [G, N].

    vLLM takes c = amax/448, so the channel's largest group always gets f = 56 and its scale is a BF16 number; the
    other groups are free. Never worse for any channel than `quantize_reference` of the scales cast to BF16.
    Raises ValueError on a scale that is not finite.
    """
    rounded = scales.bfloat16()
    reference = reference_tables(scales, rounded, table)
    s = scales.float().abs()
    x = _scale_candidates(_STOCK_TOP, _STOCK_POSITIONS, s.device)
    relative = table.error(x, table.best(x)) / x.square()
    first = x[:_STOCK_POSITIONS]
    forced = table.error(first, torch.full_like(first, _SCALE_MAX_BITS, dtype=torch.int64)) / first.square()
    top = _best_position(s, x, relative, forced - relative[:_STOCK_POSITIONS]).mul_(SCALE_MAX).bfloat16().float()
    channel = channel_unit(top) * CODE_MAX
    is_top = (s == s.amax(dim=0)) & (top > E4M3_MAX * CHANNEL_FLOOR)
    bits = torch.where(is_top, _SCALE_MAX_BITS, table.best(s / channel))
    source = (_signed(bits, scales).float() * channel).bfloat16()
    # vLLM's own arithmetic has the last word on what these scales become.
    group_scale, channel = quantize_reference(source)
    chosen = ScaleChoice(group_scale, None, channel, table_noise(scales, group_scale, channel, table))
    return _merge(chosen, reference), torch.where(chosen.noise < reference.noise, source, rounded)


def quantize_direct(scales: torch.Tensor, frequencies: torch.Tensor, table: ErrorTable) -> ScaleChoice:
    """Choose channel scales for tables whose entries are the nearest E4M3 values to s·v/C, each by itself.

    Same guarantee and errors as `quantize_search`. frequencies: of the code magnitudes 1 … 8, float64 [8].
    """
    reference = reference_tables(scales, scales, table)
    s = scales.float()
    x = _scale_candidates(_TOP, _STEPS, s.device)
    channel = _best_position(s.abs(), x, _nearest_entries(x, frequencies)[1] / x.square())
    chosen, error = _nearest_entries(s / channel, frequencies)
    noise = _sum_up(error, channel)
    # At the reference's channel scale, free entries are never worse than the reference's own.
    worse = (~(noise < reference.noise)).nonzero()[:, 0]
    channel[worse] = reference.channel_scale[worse]
    entries, error = _nearest_entries(s[:, worse] / channel[worse], frequencies)
    chosen.view(torch.uint8)[:, worse] = entries.view(torch.uint8)  # torch does not index FP8 on every device
    noise[worse] = _sum_up(error, channel[worse])
    return ScaleChoice(None, chosen, channel, noise)


def _nearest_entries(x: torch.Tensor, frequencies: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the entries nearest to x·v for v = −8 … −1, E4M3 [..., 8], and their squared error a weight, like x.

    x: scales in units of C, float32. The error is in units of C².
    """
    entries = torch.empty(*x.shape, CODE_MAX, dtype=E4M3, device=x.device)
    total = torch.zeros_like(x)
    for m, frequency in enumerate(frequencies.tolist(), start=1):
        ideal = x * -m
        entry = to_e4m3(ideal)
        entries[..., CODE_MAX - m] = entry
        total.add_(entry.float().sub_(ideal).square_(), alpha=frequency)
    return entries, total


def _noise(x: torch.Tensor, bits: torch.Tensor, channel: torch.Tensor, table: ErrorTable) -> torch.Tensor:
    return _sum_up(table.error(x, bits), channel)


def _sum_up(error: torch.Tensor, channel: torch.Tensor) -> torch.Tensor:
    """Return the noise of channels, float64 [n], from their groups' errors a weight [G, n] in units of C²."""
    return error.sum(dim=0, dtype=torch.float64) * channel.double().square() * GROUP_SIZE


def _merge(chosen: ScaleChoice, reference: ScaleChoice) -> ScaleChoice:
    """Take each channel from `chosen` where that has less noise, else from `reference`; both have group scales."""
    better = chosen.noise < reference.noise  # false for NaN
    assert chosen.group_scale is not None
    assert reference.group_scale is not None
    bits = torch.where(better, chosen.group_scale.view(torch.uint8), reference.group_scale.view(torch.uint8))
    return ScaleChoice(
        bits.view(E4M3),
        None,
        torch.where(better, chosen.channel_scale, reference.channel_scale),
        torch.where(better, chosen.noise, reference.noise),
    )


def _signed(bits: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the FP8 scales with these bits and the signs of `scales`, float8_e4m3fn."""
    return (bits.to(torch.uint8) | (scales < 0).to(torch.uint8) << 7).view(E4M3)


def _scale_candidates(top: float, positions: int, device: torch.device) -> torch.Tensor:
    """Return every |s|/C that the search looks up, float32: falling from the top, an octave in _STEPS steps."""
    steps = torch.arange(_ROWS * _STRIDE + positions, dtype=torch.float64, device=device)
    return (top * torch.exp2(-steps / _STEPS)).float()


def _best_position(
    s: torch.Tensor, x: torch.Tensor, relative_error: torch.Tensor, largest: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the channel scales amax/x[p], float32 [N], with the smallest total error.

    s: |scales| float32 [G, N]. x: from `_scale_candidates`, p being its leading positions.
    relative_error: a group's error over s² at each x. largest: what the largest group pays more, at each position.
    """
    amax = s.amax(dim=0)
    amax = torch.where(amax > 0, amax, 1.0)
    ratio = (s / amax).t().contiguous()
    row = (ratio.log2() * (-_STEPS / _STRIDE)).round_().clamp_(max=_ROWS - 1).int()
    # Row r, column p: a group r·_STRIDE steps below the largest, which is p steps below the top.
    rows = relative_error.unfold(0, len(x) - _ROWS * _STRIDE, _STRIDE)[:_ROWS].contiguous()
    total = torch.nn.functional.embedding_bag(row, rows, per_sample_weights=ratio.square_(), mode="sum")
    if largest is not None:
        total += largest
    return amax / x[total.argmin(dim=1)]
