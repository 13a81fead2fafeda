"""A linear layer as its checkpoint means it → as the W4A8 kernel takes it, and what that cost."""

import math
from dataclasses import dataclass
from enum import StrEnum

import torch

from convert_w4a8.envelope import error_table, magnitude_weights
from convert_w4a8.layout import code_histogram
from convert_w4a8.scales import quantize_reference
from convert_w4a8.search import Energies, table_energies
from convert_w4a8.weights import W4A8Linear, W4Linear


class ScalesMode(StrEnum):
    """How FP8 scales are chosen."""

    REFERENCE = "reference"
    """Exactly as vLLM does at load."""
    SEARCH = "search"
    """The FP8 scale and channel scale that give the final table entries the smallest squared error."""
    DIRECT = "direct"
    """Table entries chosen one by one; only for output formats that store them."""


@dataclass(frozen=True)
class LayerStats:
    """What a conversion did to one layer. Energies are sums over all weights, estimated from the code histogram.

    exact: every INT4 code kept its value; only scales were rounded.
    signal, noise: energy of the dequantized source, and of the final weights' difference from it.
    distinct_scales: how many different FP8 group scale magnitudes are left (None: tables without a scale).
    """

    exact: bool
    signal: float
    noise: float
    distinct_scales: int | None

    @property
    def sqnr_db(self) -> float:
        """Signal over noise of the final weights against the dequantized source, in dB; inf where nothing was lost."""
        return sqnr_db(self.signal, self.noise)

    @property
    def requantize_sqnr_db(self) -> float | None:
        """The same where codes were chosen anew; None where all were kept."""
        return None if self.exact else self.sqnr_db


def sqnr_db(signal: float, noise: float) -> float:
    """10·log10(signal/noise); inf without noise."""
    return 10 * math.log10(signal / noise) if noise and signal else math.inf


def to_w4a8(w: W4Linear, mode: ScalesMode, *, stock: bool = False) -> tuple[W4A8Linear, LayerStats]:
    """Convert a layer; on the device that its tensors are on.

    stock: the FP8 step is left to vLLM's load-time path, so `source_scale` is set to BF16 scales from which
        `quantize_reference` computes exactly the group and channel scales that are returned.
    Raises ValueError on scales that are not finite, and for DIRECT with `stock`.
    """
    if mode is not ScalesMode.REFERENCE or not w.is_kernel_ready:
        raise NotImplementedError
    source = w.scales.to(torch.bfloat16) if stock else None
    group_scale, channel = quantize_reference(w.scales if source is None else source)
    table = error_table(magnitude_weights(code_histogram(w.packed)), w.scales.device)
    energies = table_energies(w.scales, group_scale, channel, table)
    w4a8 = W4A8Linear(w.packed, w.packing, group_scale, None, channel, source)
    return w4a8, _stats(energies, group_scale, exact=True)


def _stats(energies: Energies, group_scale: torch.Tensor | None, *, exact: bool) -> LayerStats:
    distinct = None
    if group_scale is not None:
        distinct = int(torch.bincount((group_scale.view(torch.uint8) & 0x7F).flatten(), minlength=128).count_nonzero())
    return LayerStats(exact, float(energies.signal.sum()), float(energies.noise.sum()), distinct)
