"""Two texts side by side, with what differs marked, as HTML."""

import html
import re
from difflib import SequenceMatcher

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_MOST = 4000
"""Words of a text that are compared one by one; of longer ones everything after the first difference is marked."""


def marked(before: str, after: str) -> tuple[str, str]:
    """Return both texts as HTML; what only one has is in <mark> there."""
    words = [_WORDS.findall(text) for text in (before, after)]
    if max(map(len, words)) > _MOST:
        same = next((n for n, (a, b) in enumerate(zip(*words, strict=False)) if a != b), min(map(len, words)))
        left, right = (_plain(found[:same]) + _mark(found[same:]) for found in words)
        return left, right
    left, right = "", ""
    for kind, a, b, c, d in SequenceMatcher(None, words[0], words[1], autojunk=False).get_opcodes():
        show = _plain if kind == "equal" else _mark
        left += show(words[0][a:b])
        right += show(words[1][c:d])
    return left, right


def visible(text: str) -> str:
    """Return a text of many lines as HTML: controls and changes of writing direction are escaped, but for newlines."""
    shown = "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)
    return html.escape(shown)


def _plain(words: list[str]) -> str:
    return visible("".join(words))


def _mark(words: list[str]) -> str:
    return f"<mark>{_plain(words)}</mark>" if words else ""
