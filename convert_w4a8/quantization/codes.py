"""Layers whose codes the kernel cannot take, made symmetric in contiguous groups of 128.

Kept exactly, group by group: a zero-point of 8 keeps codes and scale; one of 7 (values −7 … 8) becomes values −8 … 7 of
the negated scale; groups of a multiple of 128 only repeat their scale. All other groups (other zero-points, activation
order, groups of 32 or 64) are quantized again from their dequantized values.

A new scale is the best by squared error among 18 candidates, 1/16 of an octave apart, each with its nearest codes and
then with the least-squares scale of those codes. Its sign puts the code −8 on the side of the group's largest value.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from convert_w4a8 import devices
from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.encoding.packing import to_rows
from convert_w4a8.fp8 import CODE_MAX
from convert_w4a8.linear import GROUP_SIZE, SYMMETRIC_ZERO, Packing, W4Linear
from convert_w4a8.quantization import codebook
from convert_w4a8.quantization.groups import Groups, gather, tree_sum

_CANDIDATES = 18
_CANDIDATES_PER_OCTAVE = 16
_FIRST_CANDIDATE = 8 / 7
"""In units of max|w|/8: the largest value becomes ∓7. The last candidate, 0.547, clips at little over half of it."""
FACTORS = [2 ** (i / _CANDIDATES_PER_OCTAVE) / _FIRST_CANDIDATE for i in range(_CANDIDATES)]
"""What the values of a group, with max|w| = 8, are multiplied by before they are rounded to codes."""
_VALUES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Values worked on together: 1 MiB of float32, which stays in a core's cache; on a GPU as many as there are."""
_REFITS = 3
"""Rounds of nearest codes and best entries; more gain less than 0.05 dB."""


def expand_groups(w: W4Linear) -> W4Linear:
    """Drop a g_idx and zero-points that say nothing, split groups of a multiple of 128; the weights stay the same."""
    if w.zeros is not None and bool((w.zeros == SYMMETRIC_ZERO).all()):
        w = replace(w, zeros=None)
    if w.g_idx is not None and _is_contiguous(w.g_idx, w.group_size):
        w = replace(w, g_idx=None)
    times, rest = divmod(w.group_size, GROUP_SIZE)
    if rest or w.g_idx is not None or times == 1:
        return w
    zeros = None if w.zeros is None else w.zeros.repeat_interleave(times, dim=0)
    return replace(w, scales=w.scales.repeat_interleave(times, dim=0), zeros=zeros, group_size=GROUP_SIZE)


def column_energies(w: W4Linear) -> torch.Tensor:
    """Return the energy of each input channel's weights relative to the mean, float32 [K].

    It is the best guess, without data, of how much an error in that channel costs: AWQ scales those channels up
    whose activations are large, and its search takes too little from them for their share to become average.
    """
    n, k = w.shape_nk
    total = torch.zeros(k, dtype=torch.float64, device=w.packed.device)
    kernels = devices.kernels("requantize", w.packed.device)
    for start, stop in output_blocks(n, k):
        part = w.outputs(start, stop)
        if kernels is None or part.zeros is None or part.g_idx is not None or part.group_size != GROUP_SIZE:
            total += dequantize(part).square_().sum(dim=0, dtype=torch.float64)
        else:
            rows = to_rows(part.packed, part.packing)
            kernels.add_energies(rows, part.zeros.t(), part.scales.t().float(), total)
    total = total.cpu()  # a GPU's mean differs in its last bit
    mean = total.mean()
    return (total / torch.where(mean > 0, mean, 1.0)).float().to(w.packed.device)


@dataclass(frozen=True)
class NewCodes:
    """Symmetric codes and scales for some output channels of a layer, by the values of its groups.

    kept: which groups lose nothing, bool [R]. codes: uint8 [R, V]. scales: float32 [K/128, n], some negative.
    """

    groups: Groups
    kept: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor

    def rows(self) -> torch.Tensor:
        """Return the codes of all weights in ROWS packing, int32 [n, K/8]."""
        return self.groups.rows(self.codes, self.scales.shape[1])

    def histogram(self) -> torch.Tensor:
        """Return the frequencies of the 16 codes, float64 [16] with sum 1."""
        counts = torch.bincount(self.codes.flatten(), self.groups.counts.flatten().double(), minlength=16)
        return counts / counts.sum()


def requantize(w: W4Linear, importance: torch.Tensor | None = None) -> tuple[W4Linear, bool]:
    """Return a kernel-ready layer with the nearest weights, and whether they are equal to those of `w`.

    Scales become float32, and some negative, unless the layer was kernel-ready but for `expand_groups`.
    importance: what a squared error in each input channel counts, float32 [K]; the same for all if None.
    Memory is bounded by a block of output channels. Raises ValueError unless K is a multiple of 128.
    """
    w = expand_groups(w)
    if w.is_kernel_ready:
        return w, True
    blocks = [choose_codes(w.outputs(start, stop), importance) for start, stop in output_blocks(*w.shape_nk)]
    rows = torch.cat([block.rows() for block in blocks])
    scales = torch.cat([block.scales for block in blocks], dim=1)
    return W4Linear(rows, Packing.ROWS, scales, None, None, GROUP_SIZE), all(bool(b.kept.all()) for b in blocks)


def choose_codes(w: W4Linear, importance: torch.Tensor | None, *, weighted: bool = True) -> NewCodes:
    """Choose symmetric codes and scales for an expanded layer, or for some of its output channels.

    weighted: whether the importance counts already here, or only in a later `refit`.
    """
    n, k = w.shape_nk
    if k % GROUP_SIZE:
        raise ValueError(f"K = {k} is not a multiple of {GROUP_SIZE}")
    groups, kept = gather(w, importance), _kept(w).flatten()
    codes, scales = _kept_codes(w, groups)
    weights = groups.weights if weighted else groups.counts
    kernels = devices.kernels("requantize", kept.device)
    if kernels is not None:
        kernels.fit_symmetric(groups.values, weights, kept, FACTORS, codes, scales)
    else:
        for index in _batches(~kept, groups.values.shape[1]):
            codes[index], scales[index] = fit_symmetric(groups.values[index], weights[index])
    return NewCodes(groups, kept, codes, scales.view(n, -1).t().contiguous())


def refit(
    new: NewCodes, tables: torch.Tensor, channel_scale: torch.Tensor, *, free: bool
) -> tuple[NewCodes, torch.Tensor, float, float]:
    """Choose codes again, nearest to what the FP8 tables hold; and the entries, if they are `free`.

    tables: float8_e4m3fn [K/128, n, 8]. channel_scale: float32 [n].
    Returns codes, tables, the energy of the source's weights, and that of their difference from the final ones.
    """
    groups, codes = new.groups, new.codes.clone()
    values, counts, weights = groups.values, groups.counts, groups.weights
    table = tables.transpose(0, 1).flatten(0, 1)
    rounds = _REFITS if free else 0
    kernels = devices.kernels("requantize", codes.device)
    if kernels is not None:
        signal, noise = kernels.refit(values, counts, weights, new.kept, channel_scale, codes, table, rounds)
    else:
        channel = channel_scale.repeat_interleave(len(tables))[:, None]
        for index in _batches(~new.kept, values.shape[1]):
            codes[index], table[index] = codebook.fit(
                values[index] / channel[index], weights[index], table[index], rounds
            )
        difference = codebook.values_of(table.float(), codes).mul_(channel).sub_(values)
        signal, noise = _energy(values, counts), _energy(difference, counts)
    return replace(new, codes=codes), table.view(-1, len(tables), CODE_MAX).transpose(0, 1), signal, noise


def fit_symmetric(values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize groups of values, float32 [R, V], with weights of their squared errors, broadcastable to [R, V].

    Returns unsigned symmetric codes uint8 [R, V] and scales float32 [R].
    """
    low, high = values.aminmax(dim=1)
    unit = torch.where(high > -low, -high, -low) / CODE_MAX  # negative: −8 stands for the largest positive value
    unit = torch.where(unit == 0, 1.0, unit)
    normal = values / unit[:, None]
    best = torch.ones_like(unit)
    best_gain = torch.zeros_like(unit)
    for factor in FACTORS:
        codes = _round(normal * factor)
        weighted = codes * weights
        # Under codes q the best scale is Σwq/Σq², and it leaves the error Σw² − (Σwq)²/Σq².
        wq = tree_sum(weighted * normal)
        qq = tree_sum(weighted.mul_(codes))
        scale = torch.where(qq > 0, wq / qq, 0.0)
        gain = wq * scale
        best = torch.where(gain > best_gain, scale, best)
        best_gain = torch.maximum(gain, best_gain)
    codes = _round(normal / best[:, None])
    return (codes + SYMMETRIC_ZERO).to(torch.uint8), best * unit


def _round(x: torch.Tensor) -> torch.Tensor:
    return x.round_().clamp_(-CODE_MAX, CODE_MAX - 1)


def _is_contiguous(g_idx: torch.Tensor, group_size: int) -> bool:
    return torch.equal(g_idx.long(), torch.arange(len(g_idx), device=g_idx.device) // group_size)


def _kept(w: W4Linear) -> torch.Tensor:
    """Return which groups of 128 of an expanded layer are kept exactly, bool [N, K/128]."""
    n, k = w.shape_nk
    if w.zeros is None or w.g_idx is not None or w.group_size != GROUP_SIZE:
        return torch.full((n, k // GROUP_SIZE), w.is_kernel_ready, device=w.packed.device)
    return ((w.zeros == SYMMETRIC_ZERO) | (w.zeros == SYMMETRIC_ZERO - 1)).t()


def _kept_codes(w: W4Linear, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes uint8 [R, V] and scales float32 [R] of groups that are kept; the others get any."""
    if groups.letters is None or w.zeros is None:
        return torch.zeros_like(groups.values, dtype=torch.uint8), torch.zeros_like(groups.values[:, 0])
    flipped = (w.zeros.t() != SYMMETRIC_ZERO).flatten()
    codes = torch.arange(16, dtype=torch.uint8, device=flipped.device).repeat(len(flipped), 1)
    scales = w.scales.t().float().flatten()
    return torch.where(flipped[:, None], 15 - codes, codes), torch.where(flipped, -scales, scales)


def _batches(mask: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Yield the indices where a mask [R] is set, for groups of `width` values, as many as suit the device at a time."""
    yield from torch.split(mask.nonzero()[:, 0], max(1, _VALUES_AT_ONCE[mask.device.type] // width))


def _energy(values: torch.Tensor, counts: torch.Tensor) -> float:
    return float(values.square().mul_(counts).sum(dtype=torch.float64))
