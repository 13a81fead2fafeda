"""FP8 tables that are trained: entries rounded to E4M3, and codes of latent weights, with straight-through gradients.

A layer has real-valued entries r [N, G, 8] in units of its channel scales. It multiplies by e = e4m3(r), looked up by
its codes as in `encoding.tables`. Codes here are unsigned, u = v + 8, uint8 [N, K].
"""

import torch

from convert_w4a8.fp8 import E4M3_MAX
from convert_w4a8.linear import GROUP_SIZE

_LEAST_EXPONENT = -6
"""Of E4M3's normal numbers; below are subnormal ones, as far apart as those of this exponent."""
_MANTISSA_BITS = 3
_ZERO = 8
"""The code that is 0."""


def spacing(values: torch.Tensor) -> torch.Tensor:
    """Return how far apart E4M3 numbers lie at float32 values up to ±448."""
    exponent = torch.frexp(values.abs().clamp(min=2.0**_LEAST_EXPONENT, max=E4M3_MAX)).exponent - 1
    return torch.exp2((exponent - _MANTISSA_BITS).float())


def round_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Round float32 values to the nearest E4M3 numbers, saturated, as float32."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(values.dtype)


def by_code(entries: torch.Tensor) -> torch.Tensor:
    """Return what the 16 codes of each table mean, [N, G, 16], from entries [N, G, 8]."""
    return torch.cat((entries, torch.zeros_like(entries[..., :1]), -entries[..., 1:].flip(-1)), dim=-1)


def look_up(entries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return entries [N, G, 8] by codes [N, K], in the dtype of the entries, [N, K]."""
    grouped = codes.view(*entries.shape[:2], GROUP_SIZE)
    return by_code(entries).gather(-1, grouped.long()).flatten(1)


def sum_by_entry(gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the gradient of entries, float32 [N, G, 8], from that of looked-up weights, float32 [N, K].

    An entry is the sum of its weights, with their signs. No atomic additions: the same bytes from run to run on a GPU.
    """
    grouped = gradient.view(gradient.shape[0], -1, GROUP_SIZE)
    codes = codes.view(grouped.shape)
    sums = [torch.where(codes == code, grouped, 0.0).sum(-1) for code in range(2 * _ZERO) if code != _ZERO]
    negative, positive = sums[:_ZERO], sums[_ZERO:]
    # Entry j stands for the code j − 8, and from 1 on, with its sign changed, for 8 − j.
    return torch.stack([negative[0], *(negative[j] - positive[_ZERO - 1 - j] for j in range(1, _ZERO))], dim=-1)


def nearest_codes(weights: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Return the codes of the nearest values, uint8 [N, K], of weights [N, K] in units of the channel scales.

    entries: [N, G, 8], those that are multiplied by. Of equal values the lowest code is taken, so ties are not random.
    """
    levels, order = by_code(entries).sort(dim=-1, stable=True)
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    grouped = weights.view(*entries.shape[:2], GROUP_SIZE)
    found = torch.searchsorted(middles.flatten(0, 1).contiguous(), grouped.flatten(0, 1).contiguous())
    return order.gather(-1, found.view(grouped.shape)).to(torch.uint8).flatten(1)


def nearest_within_cells(weights: torch.Tensor, entries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return weights [N, K] moved as little as lets `nearest_codes` give values equal to those of `codes`.

    All in units of the channel scales. What it returns lies a little inside of the cell of a code's value.
    """
    levels, _ = by_code(entries).sort(dim=-1, stable=True)
    values = look_up(entries, codes).view(*entries.shape[:2], GROUP_SIZE)
    tables = levels.flatten(0, 1).contiguous()
    flat = values.flatten(0, 1).contiguous()
    least = torch.searchsorted(tables, flat, right=False)
    most = torch.searchsorted(tables, flat, right=True)
    width = tables.shape[-1]
    below = torch.where(least > 0, tables.gather(-1, (least - 1).clamp(min=0)), -torch.inf)
    above = torch.where(most < width, tables.gather(-1, most.clamp(max=width - 1)), torch.inf)
    inside = 0.5 - 2.0**-10  # of the way to the next value: a little less than half
    low = (flat + inside * (below - flat)).view(values.shape)
    high = (flat + inside * (above - flat)).view(values.shape)
    return weights.view(values.shape).clamp(min=low, max=high).flatten(1)
