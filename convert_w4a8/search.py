"""FP8 group scales and channel scales that minimise the error of the final table entries."""

from dataclasses import dataclass

import torch

from convert_w4a8.envelope import ErrorTable
from convert_w4a8.weights import GROUP_SIZE


@dataclass(frozen=True)
class Energies:
    """Per output channel, float64 [N], summed over all input channels.

    signal: squared dequantized weights. noise: squared differences of the final weights from them.
    """

    signal: torch.Tensor
    noise: torch.Tensor


def table_energies(
    scales: torch.Tensor, group_scale: torch.Tensor, channel_scale: torch.Tensor, table: ErrorTable
) -> Energies:
    """Return the energies of FP8 scales [G, N] and channel scales [N] that stand for scales [G, N], in closed form.

    A scale and its FP8 scale have the same sign, or the FP8 scale is zero.
    """
    s = scales.float().abs()
    x = s / channel_scale
    noise = table.error(x, _bits(group_scale)).sum(dim=0, dtype=torch.float64) * channel_scale.double().square()
    signal = s.square().sum(dim=0, dtype=torch.float64) * table.energy
    return Energies(signal * GROUP_SIZE, noise * GROUP_SIZE)


def _bits(group_scale: torch.Tensor) -> torch.Tensor:
    """Return the bits of |f| as int64: its index in an ErrorTable."""
    return (group_scale.view(torch.uint8) & 0x7F).long()
