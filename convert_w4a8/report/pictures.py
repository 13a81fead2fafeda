"""The three pictures of a report, with matplotlib, as PNG bytes.

Colours are Okabe and Ito's, which the colour-blind tell apart; lines differ in dashes and markers as well.
"""

import math
import textwrap
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from convert_w4a8.fp8 import CODE_MAX, E4M3_MAX
from convert_w4a8.report.collect import Report, Spot, aggregate, fp8_values, short_kinds
from convert_w4a8.report.drawing import new_figure, png, style
from convert_w4a8.report.layers import LABELS, SCHEMES, Histogram
from convert_w4a8.text import printable
from convert_w4a8.verification.layers import MIN_SQNR_DB_KEPT

COLORS = {"source": "#555555", "naive": "#D55E00", "reference": "#0072B2", "output": "#009E73", "limit": "#CC79A7"}
_MARKERS = {"naive": "v", "reference": "s", "output": "o"}
_DASHES = {"naive": ":", "reference": "--", "output": "-"}
NAMES = ("scales", "products", "sqnr")
_MANY_BLOCKS = 24
"""From here on, lines without markers: they would touch."""


def draw(report: Report) -> dict[str, bytes]:
    """Return the pictures by name (of NAMES), each a PNG.

    Raises:
        ConvertError: matplotlib is not installed.

    """
    with style():
        return {
            "scales": png(_draw_scales(report)),
            "products": png(_draw_products(report)),
            "sqnr": png(_draw_sqnr(report)),
        }


def _draw_scales(report: Report) -> Any:
    figures = report.distributions
    distinct = {name: fmean(layer.distinct[name] for layer in report.layers) for name in ("source", "naive", "output")}
    figure = new_figure(8.6)
    source, naive, output, stored = figure.subplots(4, 1)
    for axes in (naive, output):
        axes.sharex(source)
    _steps(source, figures.scales["source"], COLORS["source"])
    source.set_title(f"Source ({report.source_format}): {distinct['source']:,.0f} distinct values a layer (mean)")
    _stems(naive, figures.fp8["naive"], COLORS["naive"])
    naive.set_title(
        f"Naive FP8 cast: {distinct['naive']:,.0f} distinct values a layer (mean), {_values(figures.fp8['naive'])}"
    )
    _steps(output, figures.scales["output"], COLORS["output"])
    output.set_title(
        f"This checkpoint, FP8 × FP32 channel scale: {distinct['output']:,.0f} distinct values a layer (mean)"
    )
    _stems(stored, figures.fp8["output"], COLORS["output"])
    what = "FP8 table entries" if report.stored_tables else "FP8 group scales"
    stored.set_title(f"This checkpoint, its {what} as stored: {_values(figures.fp8['output'], ' distinct values')}")
    output.set_xlabel("scale: weight units a code step")
    stored.set_xlabel(f"{what}, without the channel scale")
    for axes in (source, output):
        axes.set_ylabel("share of groups\nper 1/16 octave")
    naive.set_ylabel("share of groups\nat this value")
    stored.set_ylabel(f"share of {'entries' if report.stored_tables else 'groups'}\nat this value")
    for axes in (source, naive, output, stored):
        axes.set_xscale("log", base=2)
        axes.yaxis.set_major_formatter(_percent())
        axes.set_ylim(bottom=0)
    for axes in (source, naive, output, stored):
        _binary_ticks(axes)
    figure.align_ylabels()
    return figure


def _values(counts: Any, noun: str = "") -> str:
    """Say in words how many different FP8 values there are in the model, and how many of them are 0."""
    values = fp8_values(counts)
    zeros = sum(count for value, count in values if value == 0) / int(counts.sum())
    text = f"{len(values)}{noun} in the whole model"
    return f"{text}; {_share(zeros)} are 0" if zeros else text


def _draw_products(report: Report) -> Any:
    products = report.distributions.products
    figure = new_figure(4.4)
    axes = figure.subplots()
    axes.axvspan(E4M3_MAX, CODE_MAX * E4M3_MAX, color="#eeeeee", zorder=0, linewidth=0)
    axes.axvline(E4M3_MAX, color="#333333", linewidth=1)
    for name, divisor, color, dash in (
        ("without", 1, COLORS["naive"], "--"),
        ("with", CODE_MAX, COLORS["output"], "-"),
    ):
        label = f"{name} the 1/8: {_share(products.share_above(divisor * E4M3_MAX))} of all weights clip"
        _steps(axes, products, color, divisor=divisor, dash=dash, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xlim(_low_end(products) / CODE_MAX, CODE_MAX * E4M3_MAX)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    axes.text(E4M3_MAX * 1.04, axes.get_ylim()[1] * 0.97, "beyond 448,\nFP8's largest", va="top", fontsize=9)
    _binary_ticks(axes)
    axes.yaxis.set_major_formatter(_percent())
    axes.set_ylabel("share of weights per 1/16 octave")
    axes.set_xlabel("|INT4 code| × group scale / c, c = largest scale of the channel / 448")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _low_end(histogram: Histogram) -> float:
    """Return the edge below which there is less than 1/10,000 of the numbers above 0."""
    seen, total = 0.0, histogram.total - histogram.zeros
    for lower, _, count in histogram.bins():
        seen += count
        if seen > total / 10_000:
            return lower
    return 1.0


def _draw_sqnr(report: Report) -> Any:
    kinds = short_kinds(report.layers)
    spots = aggregate(report.layers)
    kept = {layer.kind for layer in report.layers if layer.codes_kept}
    columns = min(4, len(kinds))
    rows = math.ceil(len(kinds) / columns)
    figure = new_figure(0.9 + 2.2 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (kind, title) in zip(grid, kinds.items(), strict=False):
        alike = [spot for spot in spots if spot.kind == kind]
        _draw_kind(axes, alike)
        if kind in kept:
            label = f"least with kept codes ({MIN_SQNR_DB_KEPT:.0f} dB)"
            axes.axhline(MIN_SQNR_DB_KEPT, color=COLORS["limit"], linewidth=1, linestyle="-.", label=label)
        count = max(spot.count for spot in alike)
        # A name is no formula, whatever it holds of $, _ and \.
        axes.set_title(_wrapped(title) + (f" × {count}" if count > 1 else ""), fontsize=9, parse_math=False)
    for axes in grid[len(kinds) :]:
        axes.set_visible(False)
    for index, axes in enumerate(grid[: len(kinds)]):
        axes.tick_params(labelbottom=index + columns >= len(kinds))
    grid[0].xaxis.get_major_locator().set_params(integer=True)
    lines = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside upper left", ncols=len(lines))
    figure.supxlabel("block of the model", fontsize=10)
    figure.supylabel("SQNR in dB", fontsize=10)
    return figure


def _wrapped(name: str) -> str:
    """Break a long module name after a dot, so that the titles of neighbours do not meet; cut one that is too long."""
    breakable = printable(name).replace(".", ". ")
    return textwrap.fill(breakable, 28, max_lines=4, placeholder=" …").replace(". ", ".")


def _draw_kind(axes: Any, spots: list[Spot]) -> None:
    """Draw all layers of one kind: a point a block, with a bar down to the least where a block has several."""
    blocks = [spot.block for spot in spots]
    marked = len(blocks) < _MANY_BLOCKS
    for scheme in SCHEMES:
        mean = [_drawable(spot.mean, scheme) for spot in spots]
        style = {"color": COLORS[scheme], "linestyle": _DASHES[scheme], "linewidth": 1.5}
        axes.plot(
            blocks, mean, marker=_MARKERS[scheme] if marked else None, markersize=5, label=LABELS[scheme], **style
        )
        if any(spot.count > 1 for spot in spots):
            axes.fill_between(
                blocks,
                [_drawable(spot.least, scheme) for spot in spots],
                mean,
                color=COLORS[scheme],
                alpha=0.25,
                linewidth=0,
            )


def _drawable(sqnr: Mapping[str, float], scheme: str) -> float:
    return sqnr[scheme] if math.isfinite(sqnr[scheme]) else math.nan


def _steps(
    axes: Any, histogram: Histogram, color: str, *, divisor: float = 1, dash: str = "-", label: str = ""
) -> None:
    """Draw a histogram as a share of the whole per 1/16 octave, which its bins are wide on average."""
    bins = histogram.bins()
    if not bins:
        return
    edges = [lower / divisor for lower, _, _ in bins] + [bins[-1][1] / divisor]
    heights = [count / histogram.total / math.log2(upper / lower) / 16 for lower, upper, count in bins]
    axes.stairs(heights, edges, fill=True, color=color, alpha=0.15)
    axes.stairs(heights, edges, color=color, linestyle=dash, linewidth=1.5, label=label or None)


def _stems(axes: Any, counts: Any, color: str) -> None:
    """Draw how often each FP8 magnitude occurs; zero has no place on a logarithmic axis, and the title tells it."""
    total = int(counts.sum())
    values = [(value, count / total) for value, count in fp8_values(counts) if value > 0 and not math.isnan(value)]
    if values:
        places, heights = zip(*values, strict=True)
        axes.vlines(places, 0, heights, color=color, linewidth=1.5)
        axes.plot(places, heights, "o", color=color, markersize=3.5)


def _binary_ticks(axes: Any) -> None:
    """Label a logarithmic axis with plain numbers, at powers of two and, where these are few, between."""
    from matplotlib.ticker import FuncFormatter, LogLocator  # noqa: PLC0415

    low, high = axes.get_xlim()
    octaves = math.log2(high / low)
    between = (1.0, 1.25, 1.5, 1.75) if octaves < 2.5 else (1.0, 1.5) if octaves < 5 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(base=2, subs=between, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _position: f"{x:.3g}" if x < 1000 else f"{x:,.0f}"))


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter  # noqa: PLC0415

    return PercentFormatter(xmax=1, decimals=None)


def _share(fraction: float) -> str:
    """Render a fraction in percent; 0 only where it is 0."""
    if 0 < fraction < 0.0001:
        return "< 0.01%"
    return f"{100 * fraction:.3g}%"
