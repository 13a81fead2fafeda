"""Marks in the strings of a chat: characters for private use, one for each string.

Once a template has rendered them, they tell what came from where.
"""

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from convert_w4a8.samples.sample import TokenKind

Messages = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None
TOOLS = -1
"""The group of the tools' strings; those of a message are a group by its number."""
REASONING = ("reasoning_content", "reasoning", "thinking")
_KINDS = {
    **dict.fromkeys(("system", "developer"), TokenKind.SYSTEM),
    "user": TokenKind.USER,
    **dict.fromkeys(("assistant", "model"), TokenKind.ASSISTANT),
}
"""Role → kind."""
_PLANES = (0xF0000, 0x100000)
"""Unicode's two supplementary planes for private use; marks are of one that the chat does not use."""
_MARKS = 0xFFFE
"""Characters of a plane for private use."""
_WORD_ENDS = re.compile(r"(?<=\s)(?=\S)|(?<=\S)(?=\s)")


def kind_of(role: str) -> TokenKind:
    """Return what the contents of a role's messages are; those of the roles not named here are results of tools."""
    return _KINDS.get(role, TokenKind.TOOL)


def free_plane(text: str) -> int | None:
    """Return the first code point of a plane of which a text uses no character; None if it uses both."""
    for plane in _PLANES:
        if re.search(f"[{chr(plane)}-{chr(plane + _MARKS - 1)}]", text) is None:
            return plane
    return None


def literals(template: str) -> re.Pattern[str] | None:
    """Return a pattern for the strings that a template may look for in contents, such as `</think>`."""
    import jinja2  # noqa: PLC0415

    found = set()
    try:
        for _, kind, value in jinja2.Environment().lex(template):  # noqa: S701 - nothing is rendered
            if kind == "string":
                found.add(value[1:-1].encode("ascii", "backslashreplace").decode("unicode-escape").strip())
    except (jinja2.TemplateError, UnicodeError):
        return None
    words = sorted((word for word in found if not word.isalnum() and word), key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, words))) if words else None


@dataclass
class Marker:
    """Puts marks into the strings of a chat, and remembers which string each mark stands for.

    In a string with a literal of the template, no mark is where the template may look: not at an end with white space
    or a literal, nor between the two. Such marks hold where a template trims or cuts contents, but do not tell whose
    the white space at the ends is. careful: so in every string.
    """

    base: int
    literals: re.Pattern[str] | None
    careful: bool
    alike: bool
    """Whether equal messages get the same marks. A template may compare messages, with the last question, say; but then
    those of equal neighbours cannot be told apart."""
    escaped: bool = False
    """Whether the template may escape what is in JSON, and so a mark: then nothing of tools and arguments bears one."""
    group: int = 0
    kind: TokenKind = TokenKind.TEMPLATE
    rank: int = 0
    """Of the next strings; see `ranks`."""
    groups: list[int] = field(default_factory=list)
    """Of each mark."""
    kinds: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    """In which order the strings of a message follow each other. A string that comes once more, as the name of a tool
    with its result, has a lower one than the string before it, and what lies between is not the message's."""
    ends: list[tuple[str, str]] = field(default_factory=list)
    """What of each marked string lies before its first and after its last mark."""

    def start(self, group: int, kind: TokenKind) -> None:
        """Say whose the next strings are."""
        self.group, self.kind, self.rank = group, kind, 0

    def anew(self) -> "Marker":
        """Return a marker like this one that has marked nothing yet."""
        return Marker(self.base, self.literals, self.careful, self.alike, self.escaped)

    def __call__(self, text: str) -> str:
        """Return a string with marks in it."""
        places = self._places(text) if len(self.groups) < _MARKS else []
        if not places:
            return text
        mark = chr(self.base + len(self.groups))
        self.groups.append(self.group)
        self.kinds.append(self.kind)
        self.ranks.append(self.rank)
        self.ends.append((text[: places[0]], text[places[-1] :]))
        return mark.join(text[a:b] for a, b in itertools.pairwise([0, *places, len(text)]))

    def _places(self, text: str) -> list[int]:
        """Return where in a string marks go: at its ends, and between white space, literals and other text."""
        if not text:
            return []
        spans = [m.span() for m in self.literals.finditer(text)] if self.literals else []
        inside = {place for start, end in spans for place in range(start + 1, end)}
        starts, ends = {start for start, _ in spans}, {end for _, end in spans}
        words = {m.start() for m in _WORD_ENDS.finditer(text)}
        borders = sorted(((words | starts | ends) - inside) | {0, len(text)})
        if not (spans or self.careful):
            return borders
        watched_before = ends | {0} | {place for place in borders if text[place - 1 : place].isspace()}
        watched_after = starts | {len(text)} | {place for place in borders if text[place : place + 1].isspace()}
        return [place for place in borders if place not in watched_before or place not in watched_after]


def mark_messages(marker: Marker, messages: Messages) -> Messages:
    """Return messages with marks in their contents, their reasoning and their calls of tools."""
    found: Messages = []
    for number, message in enumerate(messages):
        marker.start(number, kind_of(message["role"]))
        earlier = messages.index(message) if marker.alike else number
        found.append(_mark_message(marker, message) if earlier == number else copy.deepcopy(found[earlier]))
    return found


def _mark_message(marker: Marker, message: dict[str, Any]) -> dict[str, Any]:
    marked = copy.deepcopy(message)
    for key in (*REASONING, "content"):
        if isinstance(marked.get(key), str):
            marked[key] = marker(marked[key])
        elif key in marked:
            marked[key] = [{**part, "text": marker(part["text"])} for part in marked[key]]
        marker.rank += 1
    for call in marked.get("tool_calls", ()):
        function = call["function"]
        function["name"] = marker(function["name"])
        marker.rank += 1
        if not marker.escaped:
            function["arguments"] = _map_strings(marker, function["arguments"])
        marker.rank += 1
    return marked


def _map_strings(change: Callable[[str], str], value: Any) -> Any:
    """Change every string of a JSON value but the keys."""
    if isinstance(value, dict):
        return {key: _map_strings(change, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(change, item) for item in value]
    return change(value) if isinstance(value, str) else value


def mark_tools(marker: Marker, tools: Tools) -> Tools:
    """Mark the descriptions: templates compare types, and may compare names."""
    marker.start(TOOLS, TokenKind.TOOLS)
    if marker.escaped:
        return tools

    def descriptions(value: Any) -> Any:
        if isinstance(value, list):
            return [descriptions(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: marker(item) if key == "description" and isinstance(item, str) else descriptions(item)
            for key, item in value.items()
        }

    marked: Tools = descriptions(tools)
    return marked


@dataclass(frozen=True)
class Marked:
    """A rendering with its marks taken out, and where they stood."""

    text: str
    places: npt.NDArray[np.int64]
    """[marks]: before which character of the text each mark stood."""
    marks: npt.NDArray[np.int64]
    """[marks]: its number."""


def without_marks(marker: Marker, rendered: str) -> Marked:
    """Take the marks out of a rendering."""
    codes = np.frombuffer(rendered.encode("utf-32-le"), np.uint32).astype(np.int64)
    is_mark = (codes >= marker.base) & (codes < marker.base + len(marker.groups))
    text = codes[~is_mark].astype("<u4").tobytes().decode("utf-32-le")
    return Marked(text, np.cumsum(~is_mark, dtype=np.int64)[is_mark], codes[is_mark] - marker.base)


@dataclass(frozen=True)
class Run:
    """A stretch of text of one group, from its first mark to its last one."""

    group: int
    kind: int
    start: int
    end: int


def runs_of(marker: Marker, found: Marked) -> list[Run]:
    """Return the runs of a rendering, in their order. What lies between two marks of one message is the message's."""
    groups = np.array(marker.groups, np.int64)[found.marks]
    ranks = np.array(marker.ranks, np.int64)[found.marks]
    if not len(groups):
        return []
    another = (groups[1:] != groups[:-1]) | (ranks[1:] < ranks[:-1])
    begins = np.flatnonzero(np.concatenate(([True], another)))
    ends = np.concatenate((begins[1:], [len(groups)])) - 1
    runs = []
    for first, last in zip(begins.tolist(), ends.tolist(), strict=True):
        before, after = marker.ends[found.marks[first]][0], marker.ends[found.marks[last]][1]
        start, end = int(found.places[first]), int(found.places[last])
        start -= common_suffix(found.text[:start][-len(before) :] if before else "", before, whole=True)
        end += common_prefix(found.text[end : end + len(after)], after, whole=True)
        runs.append(Run(int(groups[first]), marker.kinds[found.marks[first]], start, end))
    return runs


def common_prefix(one: str, other: str, *, whole: bool = False) -> int:
    """Return how long the beginning is that two strings share; whole: without white space at its end."""
    length = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return len(one[:length].rstrip()) if whole else length


def common_suffix(one: str, other: str, *, whole: bool = False) -> int:
    """Return how long the end is that two strings share; whole: without white space at its beginning."""
    return common_prefix(one[::-1], other[::-1], whole=whole)
