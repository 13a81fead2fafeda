"""The parts of pages that need nothing else: style, tables, notes."""

import html
from collections.abc import Iterable, Sequence

from convert_w4a8.text import printable

CSS = """
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; color: #1c2430;
  background: #fff; max-width: 62rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; margin-bottom: 0.2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.6rem; border-bottom: 1px solid #dde2e8; padding-bottom: 0.25rem; }
p.lead, figcaption, .note { color: #55606e; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.9rem; border-bottom: 1px solid #e8ebef; text-align: right; white-space: nowrap; }
th { font-weight: 600; color: #55606e; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.strong td { font-weight: 600; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; }
figcaption, .note { font-size: 0.9rem; max-width: 50rem; }
summary { cursor: pointer; }
p, figcaption { overflow-wrap: anywhere; }
@media (max-width: 45rem) {
  body { margin: 1rem auto; padding: 0 0.9rem; }
  th, td { padding: 0.3rem 0.5rem; }
  .scroll img { max-width: none; width: 44rem; }
}
"""


def document(title: str, body: str, style: str = "") -> str:
    """Return an HTML document. body: HTML; style: CSS beyond the common one."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def escape(text: str) -> str:
    """Render what a file may say as text of the page: no tags, no control characters."""
    return html.escape(printable(text))


def table(header: Sequence[str], rows: Iterable[Sequence[str]], strong: int | None = None) -> str:
    """Render a table whose first column is text; `strong` is the row to set off."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = ""
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="strong">{cells}</tr>\n' if index == strong else f"<tr>{cells}</tr>\n"
    return f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'


def note(text: str) -> str:
    """Render a line in small print."""
    return f'<p class="note">{escape(text)}</p>'
