"""What each character of a rendered chat is, found through the chat template itself, whichever it is.

The chat is rendered twice: as it is, and with marks in its strings. Where both differ in nothing but the marks, these
say which characters came from which message, however the template trims, joins or cuts contents. Tools are what a
rendering without them lacks; a system prompt that the template writes by itself is what goes when the chat has its own.
"""

import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from convert_w4a8.errors import ConvertError
from convert_w4a8.samples.marks import (
    TOOLS,
    Marked,
    Marker,
    Messages,
    Run,
    Tools,
    common_prefix,
    common_suffix,
    free_plane,
    kind_of,
    literals,
    mark_messages,
    mark_tools,
    runs_of,
    without_marks,
)
from convert_w4a8.samples.sample import TokenKind
from convert_w4a8.samples.tokenizer import Tokenizer, first_line

_MEND = "mend the line, or leave it out"
Kinds = npt.NDArray[np.uint8]
"""`TokenKind` of each character, [characters]."""


@dataclass(frozen=True)
class Rendered:
    """A chat as text, and what each of its characters is."""

    text: str
    kinds: Kinds | None
    """None where the template hides what comes from where."""


def render(tokenizer: Tokenizer, messages: Messages, tools: Tools, origin: str) -> Rendered:
    """Render a chat with the model's template.

    messages: as `read_records` yields them, with contents as strings. Of a template that knows lists of parts only, as
    some for images do, they are one part each; vLLM detects that too (`content_format="openai"`).

    Raises:
        ConvertError: there is no template, it refuses the chat, or it leaves out what is said in it.

    """
    if not getattr(tokenizer, "chat_template", None):
        remedy = "give the data as text or input_ids, or add the model's chat_template.jinja"
        raise ConvertError(origin, "has messages, but the model has no chat template", remedy)
    refusal: Exception | None = None
    for form in (messages, _in_parts(messages)):
        try:
            text = _render(tokenizer, form, tools)
        except Exception as error:  # noqa: BLE001 - a template is a program, and raises what it likes
            refusal = refusal or error
            continue
        kinds = _kinds(tokenizer, form, tools, text)
        if kinds is None or _says_all(messages, kinds):
            return Rendered(text, kinds)
    if refusal is not None:
        raise ConvertError(origin, f"the chat template refuses it ({first_line(refusal)})", _MEND) from refusal
    raise ConvertError(origin, "the chat template leaves out what is said in it", "compare the line with the template")


def _in_parts(messages: Messages) -> Messages:
    """Return messages whose contents are lists of one part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if message.get("content") else message
        for message in messages
    ]


def _says_all(messages: Messages, kinds: Kinds) -> bool:
    """Whether a rendering has something of what the user says; without a user, of what anybody says."""
    said = {kind_of(message["role"]) for message in messages if message.get("content", "").strip()}
    wanted = said & {TokenKind.USER} or said
    return not wanted or any((kinds == kind).any() for kind in wanted)


def _render(tokenizer: Tokenizer, messages: Messages, tools: Tools) -> str:
    """Render a chat as text, in transformers' sandbox."""
    rendered = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    if not isinstance(rendered, str) or not rendered:
        raise ValueError("it gives no text")
    return rendered


def _kinds(tokenizer: Tokenizer, messages: Messages, tools: Tools, text: str) -> Kinds | None:
    """Return what each character of a rendered chat is, or None."""
    plane = free_plane(text)
    if plane is None:
        return None
    words = literals(str(tokenizer.get_chat_template(tools=tools)))
    for escaped, alike, careful in itertools.product((False, True), repeat=3):
        marker = Marker(plane, words, careful, alike, escaped)
        found = _render_marked(tokenizer, marker, messages, tools)
        if found is not None and found.text == text:
            return _kinds_of(tokenizer, marker, messages, tools, found)
    return None


def _render_marked(tokenizer: Tokenizer, marker: Marker, messages: Messages, tools: Tools) -> Marked | None:
    """Render a chat with marks; None where the template refuses it."""
    try:
        rendered = _render(tokenizer, mark_messages(marker, messages), mark_tools(marker, tools))
    except Exception:  # noqa: BLE001 - see `render`
        return None
    return without_marks(marker, rendered)


def _kinds_of(tokenizer: Tokenizer, marker: Marker, messages: Messages, tools: Tools, found: Marked) -> Kinds:
    """Return what each character is, from a rendering with marks."""
    kinds = np.full(len(found.text), TokenKind.TEMPLATE, np.uint8)
    runs = runs_of(marker, found)
    for run in runs:
        kinds[run.start : run.end] = run.kind
    _fill_arguments(found.text, messages, runs, kinds)
    _fill_unmarked(tokenizer, marker, messages, tools, found, kinds)
    of_messages = [run for run in runs if run.group != TOOLS]
    if tools:
        other = marker.anew()
        without = _render_marked(tokenizer, other, messages, None) or _render_marked(tokenizer, other, messages, [])
        if without is not None:
            _fill_tools(found.text, of_messages, without.text, runs_of(other, without), kinds)
    if messages[0]["role"] not in ("system", "developer") and of_messages:
        other = marker.anew()
        prompted = [{"role": "system", "content": "x"}, *messages]
        extra = _render_marked(tokenizer, other, prompted, tools)
        if extra is not None:
            _fill_prompt(found.text[: of_messages[0].start], extra.text, runs_of(other, extra), kinds)
    return kinds


def _fill_arguments(text: str, messages: Messages, runs: list[Run], kinds: Kinds) -> None:
    """Assign the arguments of tool calls to the end, where they end with a number, say, which bears no mark."""
    for run, following in itertools.zip_longest(runs, runs[1:]):
        limit = following.start if following else len(text)
        calls: list[dict[str, Any]] = messages[run.group].get("tool_calls", []) if run.group != TOOLS else []
        place = run.start
        for call in calls:
            written = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            start = text.find(written, place, limit)
            if start >= 0:
                place = start + len(written)
        kinds[run.start : place] = run.kind


def _fill_unmarked(
    tokenizer: Tokenizer, marker: Marker, messages: Messages, tools: Tools, found: Marked, kinds: Kinds
) -> None:
    """Assign the arguments of calls up to their end in forms other than JSON, too: numbers bear no marks.

    The end is where a rendering has more in which every call has one more argument. Each call has a mark at its name.
    """
    longer = [_with_argument(message) for message in messages]
    extra = _render_marked(tokenizer, marker.anew(), longer, tools) if longer != messages else None
    if extra is None or not len(found.marks) or extra.marks.tolist() != found.marks.tolist():
        return
    ends, other_ends = ([*x.places[1:].tolist(), len(x.text)] for x in (found, extra))
    bounds = zip(found.places.tolist(), ends, extra.places.tolist(), other_ends, strict=True)
    for mark, (start, end, other_start, other_end) in zip(found.marks.tolist(), bounds, strict=True):
        group, more = marker.groups[mark], other_end - other_start - (end - start)
        if more > 0 and group != TOOLS and messages[group].get("tool_calls"):
            first, last = _inserted(extra.text[other_start:other_end], found.text[start:end])
            if last - first == more:
                kinds[start : start + first] = marker.kinds[mark]


def _with_argument(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message whose calls have one more argument, the last one also where they are sorted."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        name = max(["zz", *(f"{key}z" for key in arguments)])
        calls.append({**call, "function": {**call["function"], "arguments": {**arguments, name: 0}}})
    return {**message, "tool_calls": calls}


def _fill_tools(text: str, runs: list[Run], other: str, other_runs: list[Run], kinds: Kinds) -> None:
    """Assign to the tools what the template writes between contents because of them.

    other: the rendering without tools.
    """
    if [run.group for run in runs] != [run.group for run in other_runs]:
        return
    for start, piece, other_piece in zip(*_between(text, runs), _between(other, other_runs)[1], strict=True):
        first, last = _inserted(piece, other_piece)
        part = kinds[start + first : start + last]
        part[part == TokenKind.TEMPLATE] = TokenKind.TOOLS


def _between(text: str, runs: list[Run]) -> tuple[list[int], list[str]]:
    """Return what lies before, between and after runs: where each begins, and the texts."""
    starts = [0, *(run.end for run in runs)]
    ends = [*(run.start for run in runs), len(text)]
    return starts, [text[a:b] for a, b in zip(starts, ends, strict=True)]


def _inserted(text: str, other: str) -> tuple[int, int]:
    """Return where in a text that lies which the other one lacks.

    It may begin at several places, as `b` + `ab` in `abab`: at the last one that cuts no word and no special token.
    """
    first = latest = common_prefix(text, other)
    rest = common_suffix(text[first:], other[first:])
    length = len(text) - rest - first
    while length and first + rest == len(other):  # the other one lacks it, and has nothing instead
        if not first or text[first - 1].isspace() or text[first].isspace() or text[first] in "<[":
            return first, first + length
        if text[first - 1] != text[first + length - 1]:
            break
        first, rest = first - 1, rest + 1
    return latest, latest + length


def _fill_prompt(before: str, other: str, other_runs: list[Run], kinds: Kinds) -> None:
    """Assign to the system prompt what stands where that of a chat which has one stands.

    before: the rendering up to its first message. other: that of the chat with a system prompt, which is message 0.
    """
    own = [run for run in other_runs if run.group == 0]
    after = [run for run in other_runs if run.group > 0]
    if not own or not after or own[-1].end > after[0].start:
        return
    first = common_prefix(before, other[: own[0].start])
    last = len(before) - common_suffix(before[first:], other[own[-1].end : after[0].start])
    part = kinds[first:last]
    part[part == TokenKind.TEMPLATE] = TokenKind.SYSTEM
