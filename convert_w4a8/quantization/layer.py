"""A linear layer as its checkpoint means it → as the W4A8 kernel takes it, and what that cost."""

from dataclasses import dataclass

import torch

from convert_w4a8.encoding.dequantize import output_blocks
from convert_w4a8.encoding.packing import code_frequencies
from convert_w4a8.linear import GROUP_SIZE, DenseLinear, Packing, W4A8Linear, W4Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.baselines import check_finite
from convert_w4a8.quantization.codes import choose_codes, expand_groups, input_energies, refit
from convert_w4a8.quantization.envelope import ErrorTable, error_table, magnitude_frequencies
from convert_w4a8.quantization.error import sqnr_db
from convert_w4a8.quantization.scale_search import (
    ScaleChoice,
    quantize_direct,
    quantize_search,
    quantize_stock,
    reference_tables,
)

_SAMPLED_WORDS = 1 << 13
"""Words sampled for the code frequencies: 65,536 codes, frequencies to within a hundredth of themselves."""


@dataclass(frozen=True)
class LayerStats:
    """What a conversion did to one layer.

    codes_kept: all codes kept their values (`linear.kept_groups`); only scales or table entries were rounded.
    signal, noise: energy of the dequantized source, and of the final weights' difference from it, summed over all
        weights; measured where codes are new, else estimated from the code frequencies.
    distinct_scales: how many different FP8 group scale magnitudes are left (None: tables without a scale).
    """

    codes_kept: bool
    signal: float
    noise: float
    distinct_scales: int | None

    @property
    def sqnr_db(self) -> float:
        """Signal over noise of the final weights against the dequantized source, in dB; inf where nothing was lost."""
        return sqnr_db(self.signal, self.noise)


def to_w4a8(w: W4Linear | DenseLinear, mode: ScalesMode, *, stock: bool = False) -> tuple[W4A8Linear, LayerStats]:
    """Convert a layer; on the device that its tensors are on.

    stock: the FP8 step is left to vLLM's load-time path, so `source_scale` is set to BF16 scales from which
        `quantize_reference` computes exactly the group and channel scales that are returned.
    Raises ValueError on scales that are not finite, on K that is not a multiple of 128, and for DIRECT with `stock`.
    """
    if stock and mode is ScalesMode.DIRECT:
        raise ValueError("stock vLLM cannot load tables that are not multiples of a scale")
    if isinstance(w, W4Linear):
        check_finite(w.scales)
        w = expand_groups(w)
        if w.is_kernel_ready:
            return _keep_codes(w, mode, stock=stock)
    importance = input_energies(w)
    return _join(
        [
            _choose_codes(w.output_channels(start, stop), mode, importance, stock=stock)
            for start, stop in output_blocks(*w.shape_nk)
        ]
    )


def _keep_codes(w: W4Linear, mode: ScalesMode, *, stock: bool) -> tuple[W4A8Linear, LayerStats]:
    """Convert a kernel-ready layer, codes as they are."""
    frequencies = magnitude_frequencies(code_frequencies(w.packed, _SAMPLED_WORDS))
    table = error_table(frequencies)
    choice, source_scale = _quantize(w.scales, mode, frequencies, table, stock=stock)
    signal = table.energy * GROUP_SIZE * float(w.scales.double().square().sum())
    w4a8 = W4A8Linear(w.packed, w.packing, choice.group_scale, choice.entries, choice.channel_scale, source_scale)
    return w4a8, LayerStats(True, signal, float(choice.noise.sum()), _distinct(choice.group_scale))


def _choose_codes(
    w: W4Linear | DenseLinear, mode: ScalesMode, importance: torch.Tensor, *, stock: bool
) -> tuple[W4A8Linear, LayerStats]:
    """Convert some output channels whose codes cannot all be kept."""
    # Free tables are fitted later, and best from codes that follow the source's own grid.
    free = mode is ScalesMode.DIRECT
    new = choose_codes(w, importance, weighted=not free)
    frequencies = magnitude_frequencies(new.frequencies())
    table = error_table(frequencies)
    chosen, source_scale = _quantize(new.scales, mode, frequencies, table, stock=stock)
    new, entries, signal, noise = refit(new, chosen.tables(), chosen.channel_scale, free=free)
    w4a8 = W4A8Linear(
        packed=new.packed(),
        packing=Packing.PACK_QUANTIZED,
        group_scale=chosen.group_scale,
        entries=entries.contiguous() if free else None,
        channel_scale=chosen.channel_scale,
        source_scale=source_scale,
    )
    return w4a8, LayerStats(bool(new.kept.all()), signal, noise, None)


def _join(parts: list[tuple[W4A8Linear, LayerStats]]) -> tuple[W4A8Linear, LayerStats]:
    """Put output channels that were converted apart side by side."""
    layers = [layer for layer, _ in parts]
    stats = [stats for _, stats in parts]

    def joined(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present, dim=1) if present else None

    group_scale = joined([layer.group_scale for layer in layers])
    w4a8 = W4A8Linear(
        packed=torch.cat([layer.packed for layer in layers]),
        packing=Packing.PACK_QUANTIZED,
        group_scale=group_scale,
        entries=joined([layer.entries for layer in layers]),
        channel_scale=torch.cat([layer.channel_scale for layer in layers]),
        source_scale=joined([layer.source_scale for layer in layers]),
    )
    kept = all(s.codes_kept for s in stats)
    return w4a8, LayerStats(kept, sum(s.signal for s in stats), sum(s.noise for s in stats), _distinct(group_scale))


def _quantize(
    scales: torch.Tensor, mode: ScalesMode, frequencies: torch.Tensor, table: ErrorTable, *, stock: bool
) -> tuple[ScaleChoice, torch.Tensor | None]:
    """Choose the FP8 tables of scales [G, N]; also BF16 scales that stand for them, if vLLM is to compute them.

    Always on the CPU: a GPU's logarithms and the order of its sums differ in their last bits, which decide between
    channel scales that are nearly as good as one another, and every device is to write the same bytes.
    """
    device, scales = scales.device, scales.cpu()
    source: torch.Tensor | None = None
    match mode:
        case ScalesMode.REFERENCE:
            source = scales.bfloat16() if stock else None
            choice = reference_tables(scales, scales if source is None else source, table)
        case ScalesMode.SEARCH if stock:
            choice, source = quantize_stock(scales, table)
        case ScalesMode.SEARCH:
            choice = quantize_search(scales, table)
        case ScalesMode.DIRECT:
            choice = quantize_direct(scales, frequencies, table)
    return choice.to(device), None if source is None else source.to(device)


def _distinct(group_scale: torch.Tensor | None) -> int | None:
    if group_scale is None:
        return None
    return int(torch.bincount((group_scale.view(torch.uint8) & 0x7F).flatten(), minlength=128).count_nonzero())
