"""Requests of production, from logs: drawn, to be asked again or with the answers that they got, and how they went.

A line is an object for one request and one side; lines with the same `id` are the same request on the two sides. What
nginx writes of requests that it mirrors has no answers; what a client or a proxy writes may have them (`body`).
"""

import hashlib
import heapq
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.answer import SIDES, Answer, Side
from convert_w4a8.evaluation.checks import parse_check
from convert_w4a8.evaluation.library import library
from convert_w4a8.evaluation.prompts import Prompt, Prompts, make_prompt
from convert_w4a8.evaluation.recorded import recorded, seconds, status
from convert_w4a8.samples.lines import a_json, read_objects
from convert_w4a8.text import counted

_SHAPE = "a line is a JSON object with id, side, path, status, seconds and request, and perhaps body"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed", "n", "best_of", "use_beam_search", "length_penalty")
_TRANSPORT = (
    "model",
    "stream",
    "stream_options",
    "user",
    "metadata",
    "store",
    "service_tier",
    "priority",
    "request_id",
)
_SHOWN = ("logprobs", "top_logprobs", "prompt_logprobs", "echo", "return_token_ids", "return_tokens_as_token_ids")
_OURS = ("messages", "prompt", "tools", "max_tokens", "max_completion_tokens")
_NOT_SENT = frozenset((*_SAMPLING, *_TRANSPORT, *_SHOWN, *_OURS))
"""What is not sent again as it was: how answers are sampled is the same for all requests, and how they are sent."""
_BUSY = (408, 429, 499)
"""Statuses that say nothing against a request: it took too long, there were too many, the client went."""
_SAME = ("messages", "prompt", "tools", "tool_choice", "response_format")
Lines = dict[str, dict[str, Any]]
"""What a log says of one request, by side; "" where a line names none."""


@dataclass
class Production:
    """How the requests of one side went. seconds: that whole answers took.

    failed: no answer, or status 5xx; of the candidate also 3xx, and 4xx but for `_BUSY`, where the baseline answered.
    """

    requests: int = 0
    failed: int = 0
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Logs:
    """What was drawn. answers: those of the log, where they were wanted. notes: what was left out, in words.

    lost, won: how many requests only the baseline answered, and only the candidate.
    """

    prompts: Prompts
    answers: tuple[Answer, ...]
    production: Mapping[Side, Production]
    lost: int
    won: int
    notes: tuple[str, ...]


class _Draw:
    """The `number` requests whose names have the least hashes: random, and the same ones each time."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._heap: list[tuple[int, str]] = []
        self.lines: dict[str, Lines] = {}

    def add(self, name: str, side: str, line: dict[str, Any]) -> None:
        """Keep a line of a request, if that is among them so far."""
        if name in self.lines:
            self.lines[name].setdefault(side, line)
            return
        rank = -int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:16])
        if len(self._heap) < self._number:
            heapq.heappush(self._heap, (rank, name))
        elif rank > self._heap[0][0]:
            _, last = heapq.heapreplace(self._heap, (rank, name))
            self.lines.pop(last, None)
        else:
            return
        self.lines[name] = {side: line}


@dataclass
class _Reading:
    """What is gathered from all files."""

    draw: _Draw
    answered: bool
    production: dict[Side, Production] = field(default_factory=lambda: {side: Production() for side in SIDES})
    went: dict[str, dict[str, int | None]] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def leave_out(self, what: str, origin: str) -> None:
        """Count what is not compared, and remember where it was first."""
        self.left_out[what] += 1
        self.first.setdefault(what, origin)

    def unreadable(self, error: ConvertError) -> None:
        """Count a line that is no object of JSON."""
        self.leave_out("not readable", f"{error.problem.subject} {error.problem.reason}")

    def take(self, origin: str, line: dict[str, Any]) -> None:
        """Take a line."""
        side = line.get("side")
        name = str(line.get("id", "")) if type(line.get("id")) in (str, int) else ""
        name = name or origin
        if side not in (*SIDES, None):
            self.leave_out("a side that is neither baseline nor candidate", origin)
            return
        found, told = status(line), bool(line.keys() & {"status", "error", "body"})
        if side is not None and told:
            self._went(side, name, line, found)
        if found is not None and 400 <= found < 500 and found not in _BUSY and side != "candidate":
            self.refused.add(name)
        if self.answered and "body" not in line and not (told and (found is None or found >= 300)):
            self.leave_out("no answer (body)", origin)
            return
        request = _request(line)
        if isinstance(request, str):
            self.leave_out(request, origin)
            return
        kept = {
            key: line[key]
            for key in ("checks", "reference", "tags", *(_ANSWER if self.answered else ()))
            if key in line
        }
        self.draw.add(name, side or "", {**kept, "request": request, "origin": origin})

    def _went(self, side: Side, name: str, line: dict[str, Any], found: int | None) -> None:
        production, took = self.production[side], seconds(line.get("seconds"))
        failed = found is None or found >= 500
        production.requests += 1
        production.failed += failed
        if took is not None and found is not None and found < 300:
            production.seconds.append(took)
        if found not in _BUSY:
            self.went.setdefault(name, {})[side] = found

    def notes(self) -> Iterator[str]:
        """Yield what was left out, in words."""
        for what, number in self.left_out.items():
            yield f"logs: {counted(number, 'line')} left out: {what} (the first: {self.first[what]})"


_ANSWER = ("body", "status", "seconds", "first_token_seconds", "error")


def read_logs(paths: Sequence[Path], number: int, *, answered: bool) -> Logs:
    """Draw requests from logs. number: how many at most; answered: only those with answers of both sides.

    Raises:
        ConvertError: a file cannot be read, nothing in them can be compared, or the extra `evaluate` is not installed.

    """
    library("jsonschema", "jsonschema")  # no check of a request is left out for want of it
    reading = _Reading(_Draw(number), answered)
    for path in paths:
        for origin, line in read_objects(path, _SHAPE, reading.unreadable):
            reading.take(origin, line)
    prompts: dict[str, Prompt] = {}
    answers: list[Answer] = []
    digest = hashlib.sha256()
    for name, lines in sorted(reading.draw.lines.items()):
        if name in reading.refused:
            reading.leave_out("refused in production (4xx)", name)
            continue
        merged = _merged(lines)
        if answered and not all(side in lines for side in SIDES):
            reading.leave_out("an answer of one side only", merged["origin"])
            continue
        if all(side in lines for side in SIDES) and _asked(lines["baseline"]) != _asked(lines["candidate"]):
            reading.leave_out("another request on the other side", merged["origin"])
            continue
        try:
            prompt = _prompt(name, merged)
        except ConvertError as error:
            reading.leave_out("cannot be asked again", f"{error.problem.subject} {error.problem.reason}")
            continue
        got = [recorded(side, name, lines[side]) for side in SIDES] if answered else []
        if got and got[0].failure:
            reading.leave_out("not answered in production", f"{merged['origin']}: {got[0].failure}")
            continue
        said = [prompt.prompt, prompt.messages, prompt.tools, prompt.extra, prompt.max_tokens]
        asked = json.dumps([*said, merged.get("checks"), merged.get("reference")], sort_keys=True)
        if asked in prompts:
            reading.leave_out("the same as another one", merged["origin"])
            continue
        prompts[asked] = prompt
        answers += got
        digest.update(asked.encode() + b"\n" + json.dumps([answer.as_dict() for answer in got]).encode() + b"\n")
    notes = tuple(reading.notes())
    if not prompts:
        first = notes[0] if notes else "they are empty"
        raise ConvertError(", ".join(map(str, paths)), f"nothing in them can be compared ({first})", _SHAPE)
    found = Prompts(tuple(prompts.values()), digest.hexdigest())
    both = [(went["baseline"], went["candidate"]) for went in reading.went.values() if len(went) == len(SIDES)]
    lost = sum(_answered(before) and not _answered(after) for before, after in both)
    won = sum(_answered(after) and (before is None or before >= 500) for before, after in both)
    refused = sum(_answered(before) and after is not None and 300 <= after < 500 for before, after in both)
    reading.production["candidate"].failed += refused
    return Logs(found, tuple(answers), reading.production, lost, won, notes)


def _answered(found: int | None) -> bool:
    return found is not None and found < 300


def _request(line: Mapping[str, Any]) -> dict[str, Any] | str:
    """Return the request of a line, or what is wrong with it."""
    path, found = line.get("path"), line.get("request")
    if isinstance(path, str) and not re.search(r"/(chat/)?completions/?(\?.*)?$", path):
        return "of another path than completions"
    if found in (None, "", "-"):
        return "no request"
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            return "a request that is no JSON"
    if not isinstance(found, dict) or ("messages" in found) == ("prompt" in found):
        return "a request that is none of completions"
    return found


def _asked(line: Mapping[str, Any]) -> list[Any]:
    """Return what must be the same on both sides, so that their answers are of one request."""
    return [line["request"].get(key) or None for key in _SAME]


def _merged(lines: Lines) -> dict[str, Any]:
    """Return one line of a request: what the baseline's says, and what only the other ones say."""
    merged: dict[str, Any] = {}
    for side in ("candidate", "", "baseline"):
        line = lines.get(side, {})
        merged = {**merged, **line, "request": {**merged.get("request", {}), **line.get("request", {})}}
    return merged


def _prompt(name: str, line: Mapping[str, Any]) -> Prompt:
    request, origin = line["request"], line["origin"]
    own = line.get("checks") or ([{"type": "rouge_l"}] if line.get("reference") else [])
    if not isinstance(own, list):
        raise ConvertError(origin, f"checks is {a_json(own)}, not a list", "mend the line, or leave it out")
    derived = _derived(request)
    most = request.get("max_completion_tokens") or request.get("max_tokens")
    columns = {
        "id": name,
        **{key: request[key] for key in ("messages", "prompt", "tools") if key in request},
        "reference": line.get("reference"),
        "checks": [*derived, *own],
        "tags": line.get("tags"),
        "max_tokens": most,
    }
    extra = {key: value for key, value in request.items() if key not in _NOT_SENT}
    found = make_prompt(origin, name, columns, extra, as_asked=True)
    marked = tuple(replace(check, derived=place < len(derived)) for place, check in enumerate(found.checks))
    return replace(found, checks=marked)


def _derived(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the checks that a request itself asks for: JSON as a schema wants it, calls of its tools."""
    wanted: list[dict[str, Any]] = []
    form = request.get("response_format")
    form = form if isinstance(form, dict) else {}
    if form.get("type") == "json_object":
        wanted.append({"type": "json", "schema": {"type": "object"}})
    elif form.get("type") == "json_schema":
        named = form.get("json_schema")
        wanted.append({"type": "json", "schema": named.get("schema", True) if isinstance(named, dict) else True})
    if request.get("tools"):
        wanted.append({"type": "valid_calls", "tools": request["tools"]})
    return [check for check in wanted if _can_be_checked(check)]


def _can_be_checked(check: dict[str, Any]) -> bool:
    try:
        parse_check("", "", check, ())
    except ConvertError:
        return False
    return True
