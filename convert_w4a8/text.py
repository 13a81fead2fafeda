"""Numbers as people read them: sizes, counts, aligned tables."""

import re
from collections.abc import Iterable, Sequence

_UNITS = ("B", "kB", "MB", "GB", "TB")


_LONGEST = 600
LISTED = 6
"""Names that are listed."""


def printable(text: str) -> str:
    """Return what a file says as one line that a terminal shows as it is: the rest escaped, and cut where it is long.

    Escape sequences, newlines, other controls and changes of writing direction could forge lines or hide what they say.
    """
    if not text.isprintable():
        text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 2 * _LONGEST])
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} … {text[-_LONGEST // 2 :]}"


def human_bytes(nbytes: float) -> str:
    """Render a size in powers of 1000, three digits: 25.7 MB."""
    for unit in _UNITS:
        if nbytes < 999.5 or unit == _UNITS[-1]:
            break
        nbytes /= 1000
    return f"{nbytes:.3g} {unit}"


def human_seconds(seconds: float) -> str:
    """Render a time: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def counted(number: int, noun: str) -> str:
    """Render a count with its noun: 1 layer, 1,024 layers."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def shortened(names: Sequence[str], count: int | None = None, listed: int = LISTED) -> str:
    """Render the first names that a file says, and how many more there are; `count`: of all, where these are some."""
    count, first = len(names) if count is None else count, names[:listed]
    more = f" and {count - len(first):,} more" if count > len(first) else ""
    return ", ".join(map(printable, first)) + more


def markdown_code(name: str) -> str:
    """Render a name from a checkpoint, which may hold anything, as code within a Markdown table."""
    return "`" + re.sub(r"[`|]", "?", printable(name)) + "`"


def markdown_cell(text: str) -> str:
    """Render words, which may quote what a file says, within a Markdown table."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], alignment: str) -> str:
    """Render a Markdown table; alignment: a letter for each column, l or r."""
    rules = ["---:" if side == "r" else "---" for side in alignment]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rules, *rows])


def table(rows: Iterable[Sequence[str]], header: Sequence[str]) -> str:
    """Render aligned columns, the first to the left and the others to the right; cells may be what a file says."""
    lines = [tuple(header), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def render(line: Sequence[str]) -> str:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([render(lines[0]), "  ".join("-" * width for width in widths), *map(render, lines[1:])])
