"""One layer of an output against the layer of the source: every code, every group, every output channel, the whole."""

import math
from dataclasses import dataclass

import torch

from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.encoding.packing import to_pack_quantized, unpack_codes
from convert_w4a8.encoding.tables import count_clipped, decode, table_entries
from convert_w4a8.errors import Problem
from convert_w4a8.fp8 import E4M3_MAX
from convert_w4a8.linear import (
    GROUP_SIZE,
    SYMMETRIC_ZERO,
    DenseLinear,
    ServedLinear,
    W4A8Linear,
    W4Linear,
    keeps_codes,
    kept_groups,
)
from convert_w4a8.quantization.baselines import CHANNEL_FLOOR, round_to_nearest
from convert_w4a8.quantization.error import sqnr_db

MIN_SQNR_DB_KEPT = 25.0
"""Layers whose codes are kept lose only the rounding of scales and tables: 29 dB and more are usual. A wrong nibble
order or zero-point rule leaves less than 10 dB."""
MAX_LOSS_DB_NEW = 2.0
"""New codes may lose this much against round to nearest of the source (`baselines.round_to_nearest`): they are better
than it, and lose less than 1 dB to the rounding of scales and tables. Codes that are not the source's at all, such as
those of an ignored g_idx, lose 4 dB and more."""
_GROUP_NOISE = 10**-1.4
"""The most noise of a group whose codes are kept, as a part of its signal: 14 dB. The scale and each table entry are
E4M3 numbers, rounded by a 16th at most, which leaves 18 dB and more."""
_CHANNEL_NOISE_KEPT = 10**-2.0
"""The same of an output channel: 20 dB. A channel of another layer, or another scale, leaves 0 dB."""
_CHANNEL_LOSS_NEW = 10**0.6
"""How many times the noise of round to nearest an output channel may have: 6 dB."""
MIN_SQNR_DB_CALIBRATED = 6.0
"""Codes that were chosen for the outputs of a layer, not for its weights: errors of some inputs make up for those of
others, so that the weights' own error is larger than that of round to nearest. Weights of another layer, or in another
order, have −3 dB."""
_CHANNEL_NOISE_CALIBRATED = 10**-0.3
"""The same of an output channel: 3 dB."""
_STEP = 2.0**-5
"""Errors of this many channel scales are the resolution of FP8's smallest numbers, whatever part of the signal that is:
2^-7 from a subnormal group scale, times code 8, at a channel scale that is not quite the one that is assumed."""
_ALIKE = 0.81
"""Square of the cosine from which on the weights of an input channel are the source's times something, …"""
_GAIN = 1.6
"""… and how far from 1 that may be. A power of two that is missing makes it 2 or 1/2."""
_GROUPS_AT_ONCE = 1 << 11
"""Groups whose codes are compared with their tables at a time: 1 MiB of float32."""
_TIE = 1e-5
"""Part of a group's largest table entry by which two codes may be equally near, for float32 rounds."""


@dataclass(frozen=True)
class LayerCheck:
    """One layer of the output against the source's.

    codes_kept: all codes of the source are in the output, with their values.
    wrong_codes: codes that are not the source's where they are to be kept, or not the nearest ones where they are new.
    wrong_groups, wrong_channels: groups and output channels whose error no right conversion has.
    wrong_inputs: input channels that are the source's times something else than they should be.
    worst_channel, worst_channel_db: the output channel with the least SQNR, −1 in a layer of zeros.
    sqnr_db: signal-to-noise ratio of the weights that the tensor core sees. max_error: largest absolute difference.
    clipped: table entries that are NaN, or that saturate.
    distinct_scales: different FP8 group scales; None where the tables are stored.
    expected_sqnr_db: the least SQNR of a right conversion.
    """

    module: str
    out_features: int
    in_features: int
    codes_kept: bool
    wrong_codes: int
    wrong_groups: int
    wrong_channels: int
    wrong_inputs: int
    worst_channel: int
    worst_channel_db: float
    sqnr_db: float
    max_error: float
    clipped: int
    distinct_scales: int | None
    expected_sqnr_db: float


@dataclass
class _Sums:
    """What is added up over the blocks of a layer."""

    signal: float = 0.0
    noise: float = 0.0
    plain_noise: float = 0.0
    max_error: float = 0.0
    clipped: int = 0
    wrong_codes: int = 0
    wrong_groups: int = 0
    wrong_channels: int = 0
    worst_channel: int = -1
    worst_ratio: float = 0.0
    inputs: torch.Tensor | None = None


def check_layer(module: str, w: W4Linear | DenseLinear, w4a8: ServedLinear, *, calibrated: bool = False) -> LayerCheck:
    """Compare a layer of the output with the source's. Memory beyond the two is bounded by a block of channels.

    calibrated: whether its codes were chosen for the outputs of the layer, so that they need not be the nearest.
    """
    n, k = w.shape_nk
    kept = keeps_codes(w)
    scales = w4a8.group_scale if isinstance(w4a8, W4A8Linear) else None
    sums = _Sums()
    for start, stop in output_blocks(n, k):
        _add_block(
            sums,
            w.output_channels(start, stop),
            w4a8.output_channels(start, stop),
            start,
            kept=kept,
            calibrated=calibrated,
        )
    least = MIN_SQNR_DB_KEPT if kept else sqnr_db(sums.signal, sums.plain_noise) - MAX_LOSS_DB_NEW
    least = MIN_SQNR_DB_CALIBRATED if calibrated else least
    return LayerCheck(
        module=module,
        out_features=n,
        in_features=k,
        codes_kept=kept and sums.wrong_codes == 0,
        wrong_codes=sums.wrong_codes,
        wrong_groups=sums.wrong_groups,
        wrong_channels=sums.wrong_channels,
        wrong_inputs=_count_wrong_inputs(sums.inputs),
        worst_channel=sums.worst_channel,
        worst_channel_db=sqnr_db(1.0, sums.worst_ratio) if math.isfinite(sums.worst_ratio) else -math.inf,
        sqnr_db=sqnr_db(sums.signal, sums.noise) if math.isfinite(sums.noise) else -math.inf,
        max_error=sums.max_error,
        clipped=sums.clipped,
        distinct_scales=None if scales is None else len(torch.unique(scales.view(torch.uint8))),
        expected_sqnr_db=least,
    )


def judge(check: LayerCheck, source_keeps: bool, min_sqnr_db: float | None) -> list[Problem]:
    """Return what is wrong with a layer; `source_keeps` is whether its codes are to be kept."""
    found = []
    if check.wrong_codes:
        what = "the source's" if source_keeps else "the nearest to the source's weights"
        found.append(f"{check.wrong_codes} INT4 codes are not {what}")
    least = check.expected_sqnr_db if min_sqnr_db is None else min_sqnr_db
    if not check.sqnr_db >= least:
        found.append(f"SQNR is {check.sqnr_db:.1f} dB, under {least:.4g} dB")
    if check.wrong_channels:
        worst = f"channel {check.worst_channel} has {check.worst_channel_db:.1f} dB"
        found.append(f"{check.wrong_channels} output channels have an error that no right conversion has ({worst})")
    if check.wrong_inputs:
        found.append(f"{check.wrong_inputs} input channels are not scaled as what makes the inputs")
    if check.wrong_groups:
        found.append(f"{check.wrong_groups} groups have an error that no right conversion has")
    if check.clipped:
        found.append(f"{check.clipped} table entries clip")
    return [Problem(check.module, reason, "convert the checkpoint again") for reason in found]


def _add_block(
    sums: _Sums, w: W4Linear | DenseLinear, out: ServedLinear, first: int, *, kept: bool, calibrated: bool
) -> None:
    """Add some output channels, of which the first is channel `first` of the layer."""
    n, k = w.shape_nk
    source, result = dequantize(w), decode(out)
    if calibrated:
        pairs = ((source, result), (source, source), (result, result))
        products = torch.stack([(a * b).sum(0, dtype=torch.float64) for a, b in pairs])
        sums.inputs = products if sums.inputs is None else sums.inputs + products
    difference = result.sub_(source)
    sums.max_error = max(sums.max_error, float(difference.abs().max()))
    sums.clipped += count_clipped(out)
    groups = kept_groups(w)
    noise = difference.square_().view(n, -1, GROUP_SIZE).sum(-1, dtype=torch.float64).nan_to_num_(math.inf, math.inf)
    signal = source.square().view(n, -1, GROUP_SIZE).sum(-1, dtype=torch.float64)
    sums.signal += float(signal.sum())
    sums.noise += float(noise.sum())
    # The channel scale that vLLM would take, from the source alone: what the output says may be what is wrong.
    largest = source.abs().amax(dim=1) / 8
    allowed = (_STEP * 8 * (largest / E4M3_MAX).clamp(min=CHANNEL_FLOOR)).double().square() * GROUP_SIZE
    sums.wrong_groups += int((groups & (noise > signal * _GROUP_NOISE + allowed[:, None])).sum())
    limit = signal.sum(1) * _CHANNEL_NOISE_KEPT
    if not kept:
        codes, scales = round_to_nearest(source)
        plain = (codes.view(n, -1, GROUP_SIZE).float() - SYMMETRIC_ZERO) * scales.t()[..., None]
        plain_noise = (plain.flatten(1) - source).square_().sum(1, dtype=torch.float64)
        sums.plain_noise += float(plain_noise.sum())
        limit = torch.maximum(limit, plain_noise * _CHANNEL_LOSS_NEW)
    if calibrated:
        limit = signal.sum(1) * _CHANNEL_NOISE_CALIBRATED
    wrong = noise.sum(1) > limit + allowed * (k // GROUP_SIZE)
    sums.wrong_channels += int(wrong.sum())
    ratio = torch.where(signal.sum(1) > 0, noise.sum(1) / signal.sum(1), torch.where(wrong, math.inf, 0.0))
    worst = int(ratio.argmax())
    if float(ratio[worst]) > sums.worst_ratio:
        sums.worst_channel, sums.worst_ratio = first + worst, float(ratio[worst])
    if not calibrated:
        assert isinstance(out, W4A8Linear)
        sums.wrong_codes += _count_wrong_codes(w, out, source, groups)


def _count_wrong_inputs(products: torch.Tensor | None) -> int:
    """Count input channels with the wrong scale, from products float64 [3, K]: source · output and their squares."""
    if products is None:
        return 0
    both, source, output = products
    alike = both.square() > _ALIKE * source * output
    gain = both / source
    return int((alike & ((gain > _GAIN) | (gain < 1 / _GAIN))).sum())


def _count_wrong_codes(w: W4Linear | DenseLinear, out: W4A8Linear, source: torch.Tensor, groups: torch.Tensor) -> int:
    """Count codes that differ where `groups` bool [n, G] are kept, and that are not the nearest elsewhere."""
    packed = to_pack_quantized(out.packed, out.packing)
    if isinstance(w, W4Linear) and w.zeros is None and bool(groups.all()):
        ours = to_pack_quantized(w.packed, w.packing)
        if torch.equal(packed, ours):
            return 0
    codes = unpack_codes(out.packed, out.packing).view(*groups.shape, GROUP_SIZE)
    wrong = 0
    if bool(groups.any()):
        assert isinstance(w, W4Linear)
        expected = unpack_codes(w.packed, w.packing).view(codes.shape)
        if w.zeros is not None:  # a zero-point of 7: the same values of the negated scale
            negated = (w.zeros != SYMMETRIC_ZERO).t().repeat_interleave(w.group_size // GROUP_SIZE, dim=1)
            expected = torch.where(negated[..., None], 15 - expected, expected)
        wrong += int(((codes != expected) & groups[..., None]).sum())
    new = (~groups).flatten().nonzero()[:, 0]
    if len(new):
        tables = (table_entries(out).float().transpose(0, 1) * out.channel_scale[:, None, None]).flatten(0, 1)
        values, by_group = source.view(-1, GROUP_SIZE), codes.view(-1, GROUP_SIZE)
        for part in torch.split(new, _GROUPS_AT_ONCE):
            wrong += _count_not_nearest(values[part], tables[part], by_group[part])
    return wrong


def _count_not_nearest(values: torch.Tensor, tables: torch.Tensor, codes: torch.Tensor) -> int:
    """Count the codes uint8 [R, 128] of values float32 [R, 128] to which another code of tables [R, 8] is nearer."""
    by_code = torch.cat((tables, torch.zeros_like(tables[:, :1]), -tables[:, 1:].flip(1)), dim=1)
    ordered, order = by_code.sort(dim=1)
    middles = (ordered[:, 1:] + ordered[:, :-1]) / 2
    infinite = torch.full_like(middles[:, :1], math.inf)
    rank = order.argsort(dim=1).gather(1, codes.long())
    tie = _TIE * by_code.abs().amax(dim=1, keepdim=True)
    low = torch.cat((-infinite, middles), dim=1).gather(1, rank)
    high = torch.cat((middles, infinite), dim=1).gather(1, rank)
    doubtful = (values < low - tie) | (values > high + tie)
    rows = doubtful.any(dim=1).nonzero()[:, 0]
    if not len(rows):
        return 0
    # Entries may be equal to one another, and then more than one code is right.
    distance = (values[rows, :, None] - by_code[rows, None, :]).abs()
    chosen = distance.gather(2, codes[rows].long()[..., None])[..., 0]
    return int((~(chosen <= distance.amin(dim=2) + tie[rows])).sum())
