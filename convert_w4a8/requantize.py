"""Layers whose codes the kernel cannot take, made symmetric in contiguous groups of 128.

Kept exactly, group by group: a zero-point of 8 keeps codes and scale; one of 7 (values −7 … 8) becomes values −8 … 7 of
the negated scale; groups of a multiple of 128 only repeat their scale. All other groups (other zero-points, activation
order, groups of 32 or 64) are quantized again from their dequantized values.

A new scale is the best by squared error among 18 candidates, 1/16 of an octave apart, each with its nearest codes and
then with the least-squares scale of those codes. Its sign puts the code −8 on the side of the group's largest value.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from convert_w4a8 import codebook
from convert_w4a8.dequantize import dequantize, output_blocks
from convert_w4a8.layout import pack_rows, unpack_codes
from convert_w4a8.scales import CODE_MAX
from convert_w4a8.tables import entries
from convert_w4a8.weights import GROUP_SIZE, SYMMETRIC_ZERO, Packing, W4A8Linear, W4Linear

_CANDIDATES = 18
_CANDIDATES_PER_OCTAVE = 16
_FIRST_CANDIDATE = 8 / 7
"""In units of max|w|/8: the largest value becomes ∓7. The last candidate, 0.547, clips at little over half of it."""
_PLAIN_RANGE = 7.5
"""amax/7.5 uses the codes −8 … 7 to both ends with the same error."""
_ROWS_AT_ONCE = 4096
"""Groups worked on together: 2 MiB of float32 values, which stay in a core's cache."""
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
    total = torch.zeros(k, dtype=torch.float32, device=w.packed.device)
    for start, stop in output_blocks(n, k):
        total += dequantize(w.outputs(start, stop)).square_().sum(dim=0)
    mean = total.mean()
    return total / torch.where(mean > 0, mean, 1.0)


def requantize(w: W4Linear, importance: torch.Tensor | None = None) -> tuple[W4Linear, bool]:
    """Return a kernel-ready layer with the nearest weights, and whether they are equal to those of `w`.

    Scales become float32, and some negative, unless the layer was kernel-ready but for `expand_groups`.
    importance: what a squared error in each input channel counts, float32 [K]; the same for all if None.
    Memory is bounded by a block of output channels. Raises ValueError unless K is a multiple of 128.
    """
    w = expand_groups(w)
    if w.is_kernel_ready:
        return w, True
    n, k = w.shape_nk
    if k % GROUP_SIZE:
        raise ValueError(f"K = {k} is not a multiple of {GROUP_SIZE}")
    weights = torch.ones(k, device=w.packed.device) if importance is None else importance
    rows, scales, exact = [], [], True
    for start, stop in output_blocks(n, k):
        codes, scale, kept = _requantize_block(w.outputs(start, stop), weights.view(-1, GROUP_SIZE))
        rows.append(pack_rows(codes.flatten(1)))
        scales.append(scale.t())
        exact &= bool(kept.all())
    return W4Linear(torch.cat(rows), Packing.ROWS, torch.cat(scales, dim=1), None, None, GROUP_SIZE), exact


def refit(w: W4Linear, w4a8: W4A8Linear, importance: torch.Tensor) -> W4A8Linear:
    """Choose the codes of requantized groups again, nearest to what the FP8 tables hold; and the entries, if stored.

    w: the source. w4a8: its conversion by way of `requantize`, codes in ROWS packing.
    """
    w = expand_groups(w)
    n, k = w.shape_nk
    rows, luts = [], []
    for start, stop in output_blocks(n, k):
        part = w4a8.outputs(start, stop)
        tables = entries(part).transpose(0, 1).contiguous()
        codes = unpack_codes(part.packed, part.packing).view(*tables.shape[:2], GROUP_SIZE)
        chosen = ~_kept(w.outputs(start, stop))
        values = dequantize(w.outputs(start, stop)).view(codes.shape) / part.channel_scale[:, None, None]
        weights = importance.view(1, -1, GROUP_SIZE).expand(codes.shape)[chosen]
        codes[chosen], tables[chosen] = codebook.fit(
            values[chosen], weights, tables[chosen], rounds=0 if w4a8.lut is None else _REFITS
        )
        rows.append(pack_rows(codes.flatten(1)))
        luts.append(tables.transpose(0, 1))
    lut = None if w4a8.lut is None else torch.cat(luts, dim=1).contiguous()
    return replace(w4a8, packed=torch.cat(rows), lut=lut)


def quantize_plain(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize float32 [n, K] in the plainest way: codes uint8 [n, K] and scales float32 [K/128, n]."""
    groups = weights.view(len(weights), -1, GROUP_SIZE)
    scales = groups.abs().amax(dim=-1) / _PLAIN_RANGE
    steps = groups / torch.where(scales > 0, scales, 1.0)[..., None]
    codes = steps.round_().clamp_(-CODE_MAX, CODE_MAX - 1) + SYMMETRIC_ZERO
    return codes.to(torch.uint8).flatten(1), scales.t()


def fit_symmetric(values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize groups of values, float32 [R, 128], with weights of their squared errors, broadcastable to [R, 128].

    Returns unsigned symmetric codes uint8 [R, 128] and scales float32 [R].
    """
    low, high = values.aminmax(dim=1)
    unit = torch.where(high > -low, -high, -low) / CODE_MAX  # negative: −8 stands for the largest positive value
    unit = torch.where(unit == 0, 1.0, unit)
    normal = values / unit[:, None]
    best = torch.ones_like(unit)
    best_gain = torch.zeros_like(unit)
    for i in range(_CANDIDATES):
        codes = _round(normal * (2 ** (i / _CANDIDATES_PER_OCTAVE) / _FIRST_CANDIDATE))
        weighted = codes * weights
        # Under codes q the best scale is Σwq/Σq², and it leaves the error Σw² − (Σwq)²/Σq².
        wq = (weighted * normal).sum(dim=1)
        qq = weighted.mul_(codes).sum(dim=1)
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


def _requantize_block(w: W4Linear, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes uint8 [n, G, 128], scales float32 [n, G] and which groups were kept, bool [n, G]."""
    kept = _kept(w)
    values = dequantize(w).view(*kept.shape, GROUP_SIZE)
    codes = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    scale = torch.empty(kept.shape, device=values.device)
    if w.zeros is not None and bool(kept.any()):
        flipped = w.zeros.t() != SYMMETRIC_ZERO
        u = unpack_codes(w.packed, w.packing).view(values.shape)
        codes = torch.where(flipped[..., None], 15 - u, u)
        scale = torch.where(flipped, -w.scales.t().float(), w.scales.t().float())
    for index in _batches(~kept):
        codes[index], scale[index] = fit_symmetric(values[index], weights[index[1]])
    return codes, scale, kept


def _batches(mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the indices where a mask [n, G] is set, some thousand at a time."""
    n, g = mask.nonzero(as_tuple=True)
    for start in range(0, len(n), _ROWS_AT_ONCE):
        yield n[start : start + _ROWS_AT_ONCE], g[start : start + _ROWS_AT_ONCE]
