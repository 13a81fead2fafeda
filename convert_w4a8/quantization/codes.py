"""Layers whose codes the kernel cannot take, made symmetric in contiguous groups of 128.

Which groups keep the values of their codes is `linear.kept_groups`: a zero-point of 8 keeps codes and scale; one of 7
(values −7 … 8) becomes values −8 … 7 of the negated scale; groups of a multiple of 128 only repeat their scale. All
other groups (other zero-points, activation order, groups of 32 or 64, dense layers) are quantized anew from their
dequantized values.

A new scale is the best by squared error among 18 candidates, 1/16 of an octave apart, each with its nearest codes and
then with the least-squares scale of those codes. Its sign puts the code −8 on the side of the group's largest value.
"""

from dataclasses import dataclass, replace

import torch

from convert_w4a8 import devices
from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.fp8 import CODE_MAX
from convert_w4a8.linear import (
    GROUP_SIZE,
    SYMMETRIC_ZERO,
    DenseLinear,
    Packing,
    W4Linear,
    has_activation_order,
    kept_groups,
)
from convert_w4a8.quantization.groups import Groups, by_output_channel, gather, has_alphabet

_CANDIDATES = 18
_CANDIDATES_PER_OCTAVE = 16
_FIRST_CANDIDATE = 8 / 7
"""In units of max|w|/8: the largest value becomes ∓7. The last candidate, 0.547, clips at little over half of it."""
SCALE_CANDIDATES = [2 ** (i / _CANDIDATES_PER_OCTAVE) / _FIRST_CANDIDATE for i in range(_CANDIDATES)]
"""What the values of a group, with max|w| = 8, are multiplied by before they are rounded to codes."""
_REFITS = 3
"""Rounds of nearest codes and best entries; more gain less than 0.05 dB."""


def expand_groups(w: W4Linear) -> W4Linear:
    """Drop a g_idx and zero-points that say nothing, split groups of a multiple of 128; the weights stay the same."""
    if w.zeros is not None and bool((w.zeros == SYMMETRIC_ZERO).all()):
        w = replace(w, zeros=None)
    if not has_activation_order(w):
        w = replace(w, g_idx=None)
    times, rest = divmod(w.group_size, GROUP_SIZE)
    if rest or w.g_idx is not None or times == 1:
        return w
    zeros = None if w.zeros is None else w.zeros.repeat_interleave(times, dim=0)
    return replace(w, scales=w.scales.repeat_interleave(times, dim=0), zeros=zeros, group_size=GROUP_SIZE)


def input_energies(w: W4Linear | DenseLinear) -> torch.Tensor:
    """Return the energy of each input channel's weights relative to the mean, float32 [K].

    It is the best guess, without data, of how much an error in that channel costs: AWQ scales those channels up
    whose activations are large, and its search takes too little from them for their share to become average.
    """
    n, k = w.shape_nk
    total = torch.zeros(k, dtype=torch.float64, device=w.device)
    for start, stop in output_blocks(n, k):
        part = w.output_channels(start, stop)
        if has_alphabet(part):
            devices.codes(w.device).add_energies(*by_output_channel(part), total)
        else:
            total += dequantize(part).square_().sum(dim=0, dtype=torch.float64)
    total = total.cpu()  # a GPU's mean differs in its last bit
    mean = total.mean()
    return (total / torch.where(mean > 0, mean, 1.0)).float().to(w.device)


@dataclass(frozen=True)
class NewCodes:
    """Symmetric codes and scales for some output channels of a layer, by the values of its groups.

    kept: which groups lose nothing, bool [R]. codes: uint8 [R, V]. scales: float32 [K/128, n], some negative.
    """

    groups: Groups
    kept: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor

    def packed(self) -> torch.Tensor:
        """Return the codes of all weights as compressed-tensors packs them, int32 [n, K/8]."""
        return self.groups.packed(self.codes, self.scales.shape[1])

    def frequencies(self) -> torch.Tensor:
        """Return the frequencies of the 16 codes, float64 [16] with sum 1."""
        counts = torch.bincount(self.codes.flatten(), self.groups.counts.flatten().double(), minlength=16)
        return counts / counts.sum()


def to_symmetric(w: W4Linear | DenseLinear, importance: torch.Tensor | None = None) -> tuple[W4Linear, bool]:
    """Return a kernel-ready layer with the nearest weights, and whether all codes kept their values.

    Scales become float32, and some negative, unless the layer was kernel-ready but for `expand_groups`.
    importance: what a squared error in each input channel counts, float32 [K]; the same for all if None.
    Memory is bounded by a block of output channels. Raises ValueError unless K is a multiple of 128.
    """
    if isinstance(w, W4Linear):
        w = expand_groups(w)
        if w.is_kernel_ready:
            return w, True
    blocks = [choose_codes(w.output_channels(start, stop), importance) for start, stop in output_blocks(*w.shape_nk)]
    packed = torch.cat([block.packed() for block in blocks])
    scales = torch.cat([block.scales for block in blocks], dim=1)
    symmetric = W4Linear(packed, Packing.PACK_QUANTIZED, scales, None, None, GROUP_SIZE)
    return symmetric, all(bool(block.kept.all()) for block in blocks)


def choose_codes(w: W4Linear | DenseLinear, importance: torch.Tensor | None, *, weighted: bool = True) -> NewCodes:
    """Choose symmetric codes and scales for an expanded layer, or for some of its output channels.

    weighted: whether the importance counts already here, or only in a later `refit`.
    """
    n, k = w.shape_nk
    if k % GROUP_SIZE:
        raise ValueError(f"K = {k} is not a multiple of {GROUP_SIZE}")
    groups, kept = gather(w, importance), kept_groups(w).flatten()
    codes, scales = _kept_codes(w, groups)
    shares = groups.importance if weighted else groups.counts
    devices.codes(w.device).fit_symmetric(groups.values, shares, kept, SCALE_CANDIDATES, codes, scales)
    return NewCodes(groups, kept, codes, scales.view(n, -1).t().contiguous())


def refit(
    new: NewCodes, tables: torch.Tensor, channel_scale: torch.Tensor, *, free: bool
) -> tuple[NewCodes, torch.Tensor, float, float]:
    """Choose codes again, nearest to what the FP8 tables hold; and the entries, if they are `free`.

    tables: float8_e4m3fn [K/128, n, 8]. channel_scale: float32 [n].
    Returns codes, tables, the energy of the source's weights, and that of their difference from the final ones.
    """
    groups, codes = new.groups, new.codes.clone()
    table = tables.transpose(0, 1).flatten(0, 1)
    signal, noise = devices.codes(codes.device).refit(
        groups.values,
        groups.counts,
        groups.importance,
        new.kept,
        channel_scale,
        codes,
        table,
        _REFITS if free else 0,
    )
    return replace(new, codes=codes), table.view(-1, len(tables), CODE_MAX).transpose(0, 1), signal, noise


def _kept_codes(w: W4Linear | DenseLinear, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes uint8 [R, V] and scales float32 [R] of groups that are kept; the others get any."""
    if not has_alphabet(w):
        return torch.zeros_like(groups.values, dtype=torch.uint8), torch.zeros_like(groups.values[:, 0])
    _, zeros, scales = by_output_channel(w)
    negated = (zeros != SYMMETRIC_ZERO).flatten()
    codes = torch.arange(16, dtype=torch.uint8, device=negated.device).repeat(len(negated), 1)
    return torch.where(negated[:, None], 15 - codes, codes), torch.where(negated, -scales.flatten(), scales.flatten())
