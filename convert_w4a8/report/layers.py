"""One layer of a conversion in numbers: three ways to put its group scales into FP8, every weight counted.

`naive` casts the scales as they are, `reference` is vLLM's own path, `output` is what OUT holds. A layer whose codes
are kept is measured with its own codes and scales. Where they are new, the two baselines start from round to nearest of
the source's weights: groups of 128, scale = amax/7.5, nearest code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.encoding.packing import pack_codes, to_pack_quantized, unpack_codes
from convert_w4a8.encoding.tables import count_clipped, table_entries
from convert_w4a8.fp8 import CODE_MAX
from convert_w4a8.linear import GROUP_SIZE, SYMMETRIC_ZERO, DenseLinear, Packing, W4A8Linear, W4Linear, keeps_codes
from convert_w4a8.quantization.baselines import quantize_naive, quantize_reference, round_to_nearest
from convert_w4a8.quantization.codes import to_symmetric
from convert_w4a8.quantization.error import sqnr_db

LABELS = {"naive": "naive FP8 cast", "reference": "vLLM at load (reference)", "output": "this checkpoint"}
SCHEMES = tuple(LABELS)
"""Ways to put scales into FP8, in the order in which they are shown."""
_CODES = 16
_VALUES = torch.arange(_CODES) - SYMMETRIC_ZERO
_BIN_SHIFT = 19
"""A bin of a histogram is a float32's exponent and the top 4 bits of its mantissa: 16 bins an octave. The E4M3 values
(3 bits of mantissa) and equally many BF16 or FP16 values fall into each, so that no bin is favoured."""


_ULPS = 8
"""Numbers beyond the end of a bin by rounding alone still belong to it: vLLM rounds c = amax/448, so that amax/c is
only nearly 448."""


@dataclass
class Histogram:
    """Counts of non-negative numbers in bins a 16th of an octave wide, accumulated as they come.

    counts: float64 [4096] by the upper bits of the float32. A bin includes its upper end. The first, up to 2^-130, is
        that of zeros.
    """

    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(1 << 31 - _BIN_SHIFT, dtype=torch.float64))

    def add(self, values: torch.Tensor, times: torch.Tensor | None = None) -> None:
        """Count non-negative float32 values, each once or as many times as said."""
        bits = values.contiguous().flatten().view(torch.int32)
        bins = bits.sub(_ULPS).clamp_(min=0).bitwise_right_shift_(_BIN_SHIFT)
        weights = None if times is None else times.flatten().double()
        self.counts += torch.bincount(bins, weights, minlength=len(self.counts))

    @property
    def zeros(self) -> float:
        """How many numbers were 0."""
        return float(self.counts[0])

    @property
    def total(self) -> float:
        """How many numbers were counted, zeros included."""
        return float(self.counts.sum())

    def share_above(self, edge: float) -> float:
        """Return which part of all numbers is greater than the end of a bin."""
        first = int(torch.tensor(edge, dtype=torch.float32).view(torch.int32)) >> _BIN_SHIFT
        return float(self.counts[first:].sum()) / self.total

    def bins(self) -> list[tuple[float, float, float]]:
        """Return (lower edge, upper edge, count) of every bin of numbers above 0, from the first that has any on."""
        filled = (self.counts[1:].nonzero().flatten() + 1).tolist()
        if not filled:
            return []
        first, last = filled[0], filled[-1]
        edges = (torch.arange(first, last + 2, dtype=torch.int32) << _BIN_SHIFT).view(torch.float32).tolist()
        return list(zip(edges, edges[1:], self.counts[first : last + 1].tolist(), strict=False))


@dataclass(frozen=True)
class LayerReport:
    """One layer. kind is its name without numbers, block the first number in it (its place in the model).

    codes_kept: all codes of the source keep their values (`linear.kept_groups`).
    sqnr_db: by scheme, of the weights that the tensor core would see.
    distinct: different values of the scales of the source, of their naive FP8 cast, and of OUT's (FP8 times FP32).
    """

    module: str
    kind: str
    block: int
    out_features: int
    in_features: int
    codes_kept: bool
    sqnr_db: Mapping[str, float]
    distinct: Mapping[str, int]


@dataclass
class Distributions:
    """Sums over the whole model behind the pictures; counts of weights, scales or FP8 bytes.

    scales: histograms of the source's group scales and of OUT's (FP8 times FP32; where tables are stored, the scale
        that is nearest to a table by squared error).
    fp8: how often each of the 128 FP8 magnitudes occurs among naive scales and among OUT's (where tables are stored,
        among their entries).
    products: |code|·s/c, c = amax/448 of the output channel: what a table entry would be without the 1/8.
    clipped: table entries of OUT that clip.
    """

    scales: dict[str, Histogram] = field(default_factory=lambda: {"source": Histogram(), "output": Histogram()})
    fp8: dict[str, torch.Tensor] = field(
        default_factory=lambda: {name: torch.zeros(128, dtype=torch.int64) for name in ("naive", "output")}
    )
    products: Histogram = field(default_factory=Histogram)
    clipped: int = 0


@dataclass(frozen=True)
class CodeSums:
    """The weights of a block of output channels, gathered by the code that stands for them.

    count, mean: float32 [n, G, 16], by group and unsigned code. spread: the sum of squared differences of the weights
    from the mean of their code, which no table can mend; 0 where the weights are the codes' own values.
    """

    count: torch.Tensor
    mean: torch.Tensor
    spread: float

    @classmethod
    def of_scales(cls, codes: torch.Tensor, scales: torch.Tensor) -> "CodeSums":
        """Gather (code − 8)·scale, for codes uint8 [n, K] and scales [G, n]."""
        return cls(_count(codes).float(), scales.t().float()[..., None] * _VALUES, 0.0)

    @classmethod
    def of_weights(cls, codes: torch.Tensor, weights: torch.Tensor) -> "CodeSums":
        """Gather weights float32 [n, K], for which the codes uint8 [n, K] stand."""
        count = _count(codes)
        mean = (_count(codes, weights) / count.clamp(min=1)).float()
        difference = weights - mean.take(_index(codes)).view(weights.shape)
        return cls(count.float(), mean, _total(difference.square_()))

    @property
    def signal(self) -> float:
        """Sum of the squared weights."""
        return _total(self.mean.square().mul_(self.count)) + self.spread

    def noise(self, w: W4A8Linear) -> float:
        """Sum of squared differences of the weights from what the tables of `w` make of the codes."""
        t = table_entries(w).float().transpose(0, 1)
        values = torch.cat((t, torch.zeros_like(t[..., :1]), -t[..., 1:].flip(-1)), dim=-1)
        values.mul_(w.channel_scale[:, None, None])
        return _total(values.sub_(self.mean).square_().mul_(self.count)) + self.spread


def measure_layer(
    module: str, w: W4Linear | DenseLinear, w4a8: W4A8Linear, distributions: Distributions
) -> LayerReport:
    """Measure one layer of OUT against the source's, and add what the pictures need to `distributions`.

    Memory beyond the two layers is bounded by a block of output channels.
    """
    n, k = w.shape_nk
    kept = keeps_codes(w)
    signal = 0.0
    noise = dict.fromkeys(SCHEMES, 0.0)
    for start, stop in output_blocks(n, k):
        part, result = w.output_channels(start, stop), w4a8.output_channels(start, stop)
        if kept:
            same, _ = to_symmetric(part)
            codes, scales = unpack_codes(same.packed, same.packing), same.scales
            sums = CodeSums.of_scales(codes, scales)
        else:
            weights = dequantize(part)
            codes, scales = round_to_nearest(weights)
            sums = CodeSums.of_weights(codes, weights)
        signal += sums.signal
        packed = pack_codes(codes)
        reference = quantize_reference(scales)
        for scheme, (group_scale, channel) in (("naive", quantize_naive(scales)), ("reference", reference)):
            noise[scheme] += sums.noise(W4A8Linear(packed, Packing.PACK_QUANTIZED, group_scale, None, channel))
        c = reference[1] / CODE_MAX
        products = (scales.float().abs() / c).t()[..., None] * _VALUES.abs()
        distributions.products.add(products, sums.count)
        if not (kept and torch.equal(packed, to_pack_quantized(result.packed, result.packing))):
            sums = CodeSums.of_weights(unpack_codes(result.packed, result.packing), dequantize(part))
        noise["output"] += sums.noise(result)
        distributions.clipped += count_clipped(result)
    return LayerReport(
        module=module,
        kind=".".join(part for part in module.split(".") if not part.isdigit()),
        block=next((int(part) for part in module.split(".") if part.isdigit()), 0),
        out_features=n,
        in_features=k,
        codes_kept=kept,
        sqnr_db={
            scheme: sqnr_db(signal, noise[scheme]) if math.isfinite(noise[scheme]) else -math.inf for scheme in SCHEMES
        },
        distinct=_add_scales(distributions, w, w4a8),
    )


def _index(codes: torch.Tensor) -> torch.Tensor:
    """Return (channel·G + group)·16 + code for codes uint8 [n, K]: int64 [n·K]."""
    grouped = codes.reshape(-1, GROUP_SIZE).long()
    return grouped.add_(torch.arange(len(grouped))[:, None] * _CODES).flatten()


def _count(codes: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Count the codes uint8 [n, K], or add up their weights [n, K], by group and value: float64 [n, G, 16]."""
    n, k = codes.shape
    groups = k // GROUP_SIZE
    w = None if weights is None else weights.flatten().double()
    return torch.bincount(_index(codes), w, minlength=n * groups * _CODES).view(n, groups, _CODES).double()


def _add_scales(distributions: Distributions, w: W4Linear | DenseLinear, w4a8: W4A8Linear) -> dict[str, int]:
    """Add a layer's scales; return how many different values there are of each kind."""
    source = (round_to_nearest(dequantize(w))[1] if isinstance(w, DenseLinear) else w.scales).float().abs()
    naive = quantize_naive(source)[0]
    if w4a8.entries is None:
        assert w4a8.group_scale is not None
        output = w4a8.group_scale
        effective = output.float().abs() * w4a8.channel_scale
    else:
        output = w4a8.entries
        v = _VALUES[:CODE_MAX].float()
        effective = (output.float() @ (v / v.square().sum())).abs() * w4a8.channel_scale
    distributions.scales["source"].add(source)
    distributions.scales["output"].add(effective)
    for name, values in (("naive", naive), ("output", output)):
        magnitudes = values.contiguous().view(torch.uint8) & 0x7F
        distributions.fp8[name] += torch.bincount(magnitudes.flatten(), minlength=128)
    return {
        "source": len(torch.unique(source)),
        "naive": len(torch.unique(naive.view(torch.uint8))),
        "output": len(torch.unique(effective)),
    }


def _total(values: torch.Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
