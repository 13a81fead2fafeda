"""Latencies of both sides as a picture within a page: what share of the answers took at most so long (SVG)."""

from collections.abc import Mapping

import numpy as np

from convert_w4a8.evaluation.answer import SIDES, Side
from convert_w4a8.evaluation.results import Measure
from convert_w4a8.report.page import escape

COLORS: Mapping[Side, str] = {"baseline": "#0072B2", "candidate": "#D55E00"}
"""Okabe and Ito's, which the colour-blind tell apart; the baseline's line is dashed too."""
_DASHES: Mapping[Side, str] = {"baseline": "6 4", "candidate": "none"}
_WIDTH, _HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 30, 40
_TICKS = 5
_SHOWN = 2.5
_PERCENT = (0, 50, 90, 99)


def latencies(title: str, measures: Mapping[Side, Measure], unit: str = "ms", factor: float = 1000.0) -> str:
    """Return an <svg>: the cumulative distribution of each side's values; empty where there are none.

    A few long ones do not squeeze the others: the axis ends at `_SHOWN` times the larger p90, and what the longest is
    is said below.
    """
    values = {side: np.sort(np.array(measures[side].values) * factor) for side in SIDES}
    if not any(len(found) for found in values.values()):
        return ""
    known = [found for found in values.values() if len(found)]
    largest = max(float(found[-1]) for found in known) or 1.0
    shown = min(largest, _SHOWN * max(float(np.percentile(found, 90)) for found in known) or largest)
    step = _nice(shown / _TICKS)
    end = step * np.ceil(shown / step)
    longest = ", ".join(f"{side} {values[side][-1]:,.0f}" for side in SIDES if len(values[side]))
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text x="{_LEFT}" y="16" class="plot-title">{escape(title)} in {unit}</text>',
    ]
    for percent in _PERCENT:
        y = _y(percent / 100)
        parts.append(f'<line x1="{_LEFT}" y1="{y:.1f}" x2="{_WIDTH - _RIGHT}" y2="{y:.1f}" class="grid"/>')
        if percent != 99:
            parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{percent} %</text>')
    parts += [
        f'<text x="{_x(tick / end):.1f}" y="{_HEIGHT - 18}" text-anchor="middle">{tick:,.6g}</text>'
        for tick in np.arange(0, end + step / 2, step)
    ]
    if largest > end:
        parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 4}" text-anchor="end">the longest: {longest}</text>')
    for place, side in enumerate(SIDES):
        if len(values[side]):
            parts.append(_line(side, values[side] / end))
        x = _WIDTH - _RIGHT - 230 + 120 * place
        parts.append(f'<line x1="{x}" y1="12" x2="{x + 26}" y2="12" {_stroke(side)}/>')
        parts.append(f'<text x="{x + 32}" y="16">{side}</text>')
    return "\n".join([*parts, "</svg>"])


def _line(side: Side, shares: "np.typing.NDArray[np.float64]") -> str:
    """Return a step line: up by one answer's share at each value."""
    heights = np.arange(len(shares) + 1) / len(shares)
    points = [f"{_x(0):.1f},{_y(0):.1f}"]
    for value, low, high in zip(shares, heights, heights[1:], strict=False):
        if value > 1:
            points.append(f"{_x(1):.1f},{_y(low):.1f}")
            break
        points += [f"{_x(value):.1f},{_y(low):.1f}", f"{_x(value):.1f},{_y(high):.1f}"]
    return f'<polyline points="{" ".join(points)}" fill="none" {_stroke(side)}/>'


def _stroke(side: Side) -> str:
    return f'stroke="{COLORS[side]}" stroke-width="2" stroke-dasharray="{_DASHES[side]}"'


def _x(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _y(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _nice(step: float) -> float:
    """Return the next number of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** np.floor(np.log10(step))
    return float(next(power * digit for digit in (1, 2, 5, 10) if power * digit >= step * (1 - 1e-9)))
