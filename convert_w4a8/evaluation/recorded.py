"""Answers that a log has: what came, and how long it took."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from convert_w4a8.evaluation.answer import Answer, Side
from convert_w4a8.evaluation.stream import ODD, Parts
from convert_w4a8.text import printable

_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")


def status(line: Mapping[str, Any]) -> int | None:
    """Return the HTTP status of a line; the last, where a proxy tried several servers. None: there was no answer."""
    value = line.get("status", 200 if "body" in line else None)
    found = _NUMBER.findall(str(value))
    number = float(found[-1]) if found and not line.get("error") else 0.0
    return int(number) if 100 <= number < 1000 else None


def seconds(value: Any) -> float | None:
    """Return a time: a number, or nginx's way to write one ("0.1, 0.2" of two servers, "-" of none)."""
    if isinstance(value, bool):
        return None
    found = [str(value)] if isinstance(value, int | float) else _NUMBER.findall(str(value))
    total = sum(map(float, found))
    return total if found and 0 <= total < math.inf else None


def recorded(side: Side, name: str, line: Mapping[str, Any]) -> Answer:
    """Return the answer of a line. `body`: a response or its JSON, or the stream of events as text."""
    found = status(line)
    if found is None or found >= 300:
        failure = line.get("error") or ("no answer" if found is None else f"status {found}")
        kind = "dead" if found is None else f"{found // 100}xx"
        return Answer(side, name, 0, failure=printable(f"{kind}: {failure}, as the log says")[:300])
    took = seconds(line.get("seconds"))
    first = seconds(line.get("first_token_seconds"))
    parts = Parts(Answer(side, name, 0))
    try:
        for chunk in _chunks(line["body"]):
            if not hasattr(chunk, "choices"):
                said = getattr(getattr(chunk, "error", None), "message", "it is none of completions")
                return Answer(side, name, 0, failure=printable(f"refused: {said}")[:300])
            parts.take(chunk, took)
    except ODD as error:
        return Answer(side, name, 0, failure=printable(f"truncated: no response in the log ({error})")[:300])
    if parts.unfinished:
        return Answer(side, name, 0, failure=f"truncated: {parts.unfinished}, as the log says")
    return replace(parts.whole(), first_token=first, last_token=took)


def _chunks(body: Any) -> Iterator[Any]:
    """Yield the chunks of a stream, or the one response."""
    text = body if isinstance(body, str) else json.dumps(body)
    events = re.findall(r"^data:[ \t]*(.*?)\r?$", text, re.MULTILINE)
    for event in events or [text]:
        if event.strip() != "[DONE]":
            yield json.loads(event, object_hook=lambda found: SimpleNamespace(**found))
