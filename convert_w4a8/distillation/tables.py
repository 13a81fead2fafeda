"""FP8 tables that are trained: entries rounded to E4M3, and codes of latent weights, with straight-through gradients.

A layer has real-valued entries r [N, G, 8] in units of its channel scales. It multiplies by e = e4m3(r), looked up by
its codes as in `encoding.tables` (`kernels/training/reference.py`).
"""

import torch

from convert_w4a8.fp8 import E4M3_MAX, to_e4m3
from convert_w4a8.kernels.training.reference import by_code, look_up
from convert_w4a8.linear import GROUP_SIZE

_LEAST_EXPONENT = -6
"""Of E4M3's normal numbers; below are subnormal ones, as far apart as those of this exponent."""
_MANTISSA_BITS = 3


def spacing(values: torch.Tensor) -> torch.Tensor:
    """Return how far apart E4M3 numbers lie at float32 values up to ±448."""
    exponent = torch.frexp(values.abs().clamp(min=2.0**_LEAST_EXPONENT, max=E4M3_MAX)).exponent - 1
    return torch.exp2((exponent - _MANTISSA_BITS).float())


def round_to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Round float32 values to the nearest E4M3 numbers, saturated, as float32."""
    return to_e4m3(values).to(values.dtype)


def nearest_within_cells(weights: torch.Tensor, entries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return weights [N, K] moved as little as lets `choose` give values equal to those of `codes`.

    All in units of the channel scales. What it returns lies a little inside of the cell of a code's value.
    """
    levels, _ = by_code(entries).sort(dim=-1, stable=True)
    values = look_up(entries, codes).float().view(*entries.shape[:2], GROUP_SIZE)
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
