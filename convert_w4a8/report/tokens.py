"""Calibration data shown: what the tokens are, which of them count, and one sample coloured by both.

Colours are Okabe and Ito's, which the colour-blind tell apart; masked tokens are pale.
"""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from convert_w4a8.report.drawing import new_figure, png, style
from convert_w4a8.samples.sample import REASONS, Sample, SampleSet, TokenKind
from convert_w4a8.samples.tokenizer import Tokenizer
from convert_w4a8.text import counted, printable

_COLORS = {
    TokenKind.TEXT: "#555555",
    TokenKind.TEMPLATE: "#F0E442",
    TokenKind.SYSTEM: "#E69F00",
    TokenKind.TOOLS: "#CC79A7",
    TokenKind.USER: "#0072B2",
    TokenKind.ASSISTANT: "#009E73",
    TokenKind.TOOL: "#56B4E9",
}
NAMES = {
    TokenKind.TEXT: "text",
    TokenKind.TEMPLATE: "chat template",
    TokenKind.SYSTEM: "system prompt",
    TokenKind.TOOLS: "tools",
    TokenKind.USER: "user",
    TokenKind.ASSISTANT: "assistant",
    TokenKind.TOOL: "results of tools",
}
_PALE = 0.22
"""How much of its colour a masked token keeps."""
_COLUMNS, _ROWS = 160, 100
"""Tokens of a picture."""
_CELL = 6
"""Pixels of a token, one of them a gap."""
_LONG = 160
"""Tokens of a stretch of one kind that are shown in full; of a longer one, the first and the last."""
_STRETCHES = 400
_CSS = """
.tokens { white-space: pre-wrap; overflow-wrap: anywhere; font: 12.5px/1.7 ui-monospace, Menlo, Consolas, monospace;
  border: 1px solid #dde2e8; padding: 0.6rem 0.8rem; max-height: 40rem; overflow-y: auto; }
.tokens span, .token-legend span { border-radius: 3px; padding: 1px 2px; }
.tokens span.masked { color: #6b7480; text-decoration: line-through; text-decoration-thickness: 1px; }
.tokens i { color: #55606e; }
.token-legend span { margin-right: 0.7rem; }
"""


def example(samples: SampleSet) -> Sample:
    """Return the sample to show: the first one with the most kinds of tokens, masked and not."""
    return max(samples.samples, key=lambda sample: len(np.unique(sample.kinds.astype(int) * 2 + sample.kept)))


def as_rows(samples: SampleSet) -> Iterator[tuple[str, ...]]:
    """Yield the counts as cells of HEADER, for each kind of token that occurs and in all."""
    for kind, row in zip(TokenKind, samples.counts.tolist(), strict=True):
        if sum(row):
            why = ", ".join(f"{reason} {number:,}" for reason, number in zip(REASONS, row[1:], strict=True) if number)
            yield NAMES[kind], f"{sum(row):,}", f"{row[0]:,}", f"{sum(row[1:]):,}", why
    yield "all", f"{samples.seen:,}", f"{samples.kept:,}", f"{samples.seen - samples.kept:,}", ""


HEADER = ("tokens", "seen", "kept", "masked", "by")


def summary(samples: SampleSet) -> str:
    """Say in a line or more what the samples are."""
    longest = max(map(len, samples.samples))
    lines = [f"{counted(len(samples.samples), 'sample')} of up to {longest:,} tokens, {samples.tokens:,} in all"]
    if samples.wholly_masked:
        lines.append(f"{counted(samples.wholly_masked, 'sample')} more are wholly masked, and not used")
    if samples.cut:
        lines.append(f"{counted(samples.cut, 'sample')} lost the end to the limits")
    return "\n".join(lines)


@dataclass(frozen=True)
class _Stretch:
    """Neighbouring tokens of one kind, all kept or masked for one reason."""

    start: int
    end: int
    kind: TokenKind
    reason: int
    """As in `Sample.masked_by`."""


def _stretches(sample: Sample) -> Iterator[_Stretch]:
    """Yield the stretches of a sample in their order."""
    both = sample.kinds.astype(np.int64) * (1 + len(REASONS)) + sample.masked_by
    starts = [0, *(np.flatnonzero(both[1:] != both[:-1]) + 1).tolist()]
    for start, end in zip(starts, [*starts[1:], len(sample)], strict=True):
        yield _Stretch(start, end, TokenKind(int(sample.kinds[start])), int(sample.masked_by[start]))


def fragment(samples: SampleSet, tokenizer: Tokenizer) -> str:
    """Return what belongs into an HTML page: the counts, and the text of one sample, coloured.

    It has a style of its own, and nothing of the data but as text.
    """
    sample = example(samples)
    head = "".join(f"<th>{cell}</th>" for cell in HEADER)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>\n" for row in as_rows(samples))
    stretches = list(_stretches(sample))
    shown = "".join(_shown(sample, tokenizer, stretch) for stretch in stretches[:_STRETCHES])
    if len(stretches) > _STRETCHES:
        shown += f"<i> … {len(sample) - stretches[_STRETCHES].start:,} more tokens</i>"
    kinds = sorted({stretch.kind for stretch in stretches})
    legend = "".join(f'<span style="background:{_background(kind, 0)}">{NAMES[kind]}</span>' for kind in kinds)
    return (
        f"<style>{_CSS}</style>\n"
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>\n'
        f'<p class="token-legend">{_text(sample.origin)}, {len(sample):,} tokens: {legend}'
        '<span class="masked">struck out and pale: masked</span></p>\n'
        f'<div class="tokens">{shown}</div>\n'
    )


def page(samples: SampleSet, tokenizer: Tokenizer) -> str:
    """Return `fragment` as an HTML page that needs nothing else."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Calibration data</title>\n'
        "<style>body { font: 16px/1.55 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }\n"
        "th, td { padding: 0.3rem 0.9rem; border-bottom: 1px solid #e8ebef; text-align: right; }\n"
        "th:first-child, td:first-child, th:last-child, td:last-child { text-align: left; }</style>\n"
        f"</head>\n<body>\n<h1>Calibration data</h1>\n{fragment(samples, tokenizer)}</body>\n</html>\n"
    )


def _shown(sample: Sample, tokenizer: Tokenizer, stretch: _Stretch) -> str:
    """Return a stretch as a span, its middle left out if it is long."""
    tokens = sample.tokens[stretch.start : stretch.end].tolist()
    parts = [tokens] if len(tokens) <= _LONG + _LONG // 4 else [tokens[: _LONG * 3 // 4], tokens[-_LONG // 4 :]]
    left_out = len(tokens) - sum(map(len, parts))
    text = f"<i> … {left_out:,} tokens … </i>".join(_text(tokenizer.decode(part)) for part in parts)
    reason = f", masked: {REASONS[stretch.reason - 1]}" if stretch.reason else ""
    masked = ' class="masked"' if stretch.reason else ""
    title = f"{NAMES[stretch.kind]}{reason}; {len(tokens):,} tokens"
    return f'<span{masked} style="background:{_background(stretch.kind, stretch.reason)}" title="{title}">{text}</span>'


def _text(text: str) -> str:
    """Return what the data hold as text of the page, with its lines: no tags, no control characters."""
    return "\n".join("\t".join(html.escape(printable(part)) for part in line.split("\t")) for line in text.split("\n"))


def _background(kind: TokenKind, reason: int) -> str:
    """Return the colour behind a stretch as CSS."""
    red, green, blue = _rgb(kind)
    return f"rgba({red},{green},{blue},{0.12 if reason else 0.42})"


def _rgb(kind: TokenKind) -> tuple[int, int, int]:
    digits = _COLORS[kind]
    red, green, blue = (int(digits[place : place + 2], 16) for place in (1, 3, 5))
    return red, green, blue


def draw(samples: SampleSet) -> bytes:
    """Return a PNG: one sample, a cell for each token in reading order, and how many of each kind count in all samples.

    Raises:
        ConvertError: matplotlib is not installed.

    """
    with style():
        sample = example(samples)
        heights = (0.4 + 0.064 * _rows(sample), 0.4 + 0.32 * int((samples.counts.sum(1) > 0).sum()))
        figure = new_figure(sum(heights) + 0.9)
        upper, lower = figure.subplots(2, 1, height_ratios=heights)
        _draw_sample(upper, sample)
        _draw_counts(lower, samples)
        return png(figure)


def _rows(sample: Sample) -> int:
    return min(_ROWS, -(-len(sample) // _COLUMNS))


def _draw_sample(axes: Any, sample: Sample) -> None:
    """Draw a cell for each token."""
    rows = _rows(sample)
    tokens = min(len(sample), rows * _COLUMNS)
    palette = np.array([_rgb(kind) for kind in TokenKind], np.float64)
    colors = palette[sample.kinds[:tokens]]
    colors[~sample.kept[:tokens]] = 255 - _PALE * (255 - colors[~sample.kept[:tokens]])
    cells = np.full((rows * _COLUMNS, 3), 255.0)
    cells[:tokens] = colors
    image = cells.reshape(rows, _COLUMNS, 3).repeat(_CELL, 0).repeat(_CELL, 1)
    image[::_CELL], image[:, ::_CELL] = 255, 255
    axes.imshow(
        image.astype(np.uint8), aspect="auto", interpolation="nearest", extent=(0, _COLUMNS, rows * _COLUMNS, 0)
    )
    part = "" if tokens == len(sample) else f", the first {tokens:,}"
    title = f"{printable(sample.origin)}: {len(sample):,} tokens{part}, {_COLUMNS} a row; masked ones are pale"
    axes.set_title(title, parse_math=False)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("token")


def _draw_counts(axes: Any, samples: SampleSet) -> None:
    """Draw a bar for each kind: tokens that count, and pale those that do not."""
    kinds = [kind for kind in TokenKind if samples.counts[kind].sum()]
    kept = [int(samples.counts[kind, 0]) for kind in kinds]
    masked = [int(samples.counts[kind, 1:].sum()) for kind in kinds]
    names, colors = [NAMES[kind] for kind in kinds], [_COLORS[kind] for kind in kinds]
    pale = [tuple((255 - _PALE * (255 - value)) / 255 for value in _rgb(kind)) for kind in kinds]
    places = range(len(names))
    axes.barh(places, kept, color=colors, tick_label=names)
    axes.barh(places, masked, left=kept, color=pale)
    for place, one, other in zip(places, kept, masked, strict=True):
        label = f" {one:,} kept" + (f", {other:,} masked" if other else "")
        axes.annotate(label, (one + other, place), va="center", fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.set_title(f"All {len(samples.samples) + samples.wholly_masked:,} samples: {samples.seen:,} tokens")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(visible=False, axis="y")
