"""Prompts of an evaluation: a JSON lines file, checked line by line before anything is asked."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.checks import Check, parse_check
from convert_w4a8.samples.lines import a_json, parse_messages, parse_tools, read_objects

COLUMNS = ("id", "prompt", "messages", "tools", "reference", "checks", "tags", "max_tokens")
_SHAPE = "a line is a JSON object with prompt or messages, and perhaps tools, reference, checks, tags, max_tokens, id"
_MEND = "mend the line, or leave it out"


@dataclass(frozen=True)
class Prompt:
    """One prompt: exactly one of `prompt` (plain text, continued as it is) and `messages` (a chat).

    extra: what else a logged request asks for (`stop`, `response_format`, …), sent as it is.
    """

    id: str
    prompt: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    checks: tuple[Check, ...]
    tags: tuple[str, ...]
    max_tokens: int | None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether there are checks beside those that the request itself asks for."""
        return not all(check.derived for check in self.checks)

    @cached_property
    def shown(self) -> str:
        """The prompt as people read it."""
        if self.messages is None:
            return self.prompt or ""
        return "\n\n".join(f"[{message['role']}] {_said(message)}" for message in self.messages)


@dataclass(frozen=True)
class Prompts:
    """All prompts of a file, and a SHA-256 of what was asked and checked."""

    prompts: tuple[Prompt, ...]
    digest: str


def read_prompts(path: Path) -> Prompts:
    """Read a prompts file.

    Raises:
        ConvertError: it cannot be read, holds nothing, or a line is not as it should be; the subject names the line.

    """
    found: list[Prompt] = []
    origins: dict[str, str] = {}
    same: dict[str, str] = {}
    digest = hashlib.sha256()
    for number, (origin, line) in enumerate(read_objects(path, _SHAPE), 1):
        odd = sorted(line.keys() - set(COLUMNS))
        if odd:
            raise ConvertError(origin, f"has {odd[0]!r}, which is not known", _SHAPE)
        prompt = make_prompt(origin, str(number), line)
        if prompt.id in origins:
            raise ConvertError(
                origin, f"has the id {prompt.id!r}, as {origins[prompt.id]} has", "give every line its own id"
            )
        asked = json.dumps([prompt.prompt, prompt.messages, prompt.tools], sort_keys=True)
        if asked in same:
            remedy = "leave it out, put its checks into that line, or ask for --samples"
            raise ConvertError(origin, f"asks the same as {same[asked]}, which tells nothing more", remedy)
        origins[prompt.id] = same[asked] = origin
        found.append(prompt)
        digest.update(json.dumps(line, sort_keys=True).encode() + b"\n")
    if not found:
        raise ConvertError(str(path), "holds no prompts", _SHAPE)
    return Prompts(tuple(found), digest.hexdigest())


def make_prompt(
    origin: str, name: str, line: Mapping[str, Any], extra: Mapping[str, Any] | None = None, *, as_asked: bool = False
) -> Prompt:
    """Return the prompt that an object of `COLUMNS` is.

    name: its id, unless it says. extra: as in `Prompt`. as_asked: leave messages as they are, which may hold images.
    Raises ConvertError where it is not as it should be.
    """
    line = {key: value for key, value in line.items() if value is not None}
    have = [key for key in ("prompt", "messages") if key in line]
    if len(have) != 1:
        raise ConvertError(
            origin, "has both prompt and messages" if have else "has neither prompt nor messages", _SHAPE
        )
    if line.get("tools") and "messages" not in line:
        raise ConvertError(origin, "has tools beside prompt", "tools belong to messages")
    references = _references(origin, line.get("reference"))
    checks = _list(origin, "checks", line.get("checks", []))
    parsed = tuple(parse_check(origin, f"checks[{n}]", check, references) for n, check in enumerate(checks))
    if references and not parsed:
        parsed = (parse_check(origin, "reference", {"type": "rouge_l"}, references),)
    return Prompt(
        id=_text(origin, "id", line["id"]) if "id" in line else name,
        prompt=_text(origin, "prompt", line["prompt"]) if "prompt" in line else None,
        messages=(_as_asked if as_asked else parse_messages)(origin, line["messages"]) if "messages" in line else None,
        tools=parse_tools(origin, line.get("tools")),
        checks=parsed,
        tags=tuple(dict.fromkeys(_text(origin, "tags", tag) for tag in _list(origin, "tags", line.get("tags", [])))),
        max_tokens=_count(origin, line["max_tokens"]) if "max_tokens" in line else None,
        extra=extra or {},
    )


def _as_asked(origin: str, value: Any) -> list[dict[str, Any]]:
    """Check no more of messages than what is needed to send and to show them."""
    whole = isinstance(value, list) and value and all(isinstance(message, dict) for message in value)
    if not whole or not all(isinstance(message.get("role"), str) for message in value):
        raise ConvertError(origin, "messages is not a list of objects with a role", _MEND)
    lists = [message.get("tool_calls") or [] for message in value]
    if not all(isinstance(calls, list) for calls in lists):
        raise ConvertError(origin, "a message has tool_calls that are no list", _MEND)
    calls = [call for calls in lists for call in calls]
    if not all(isinstance(call, dict) and isinstance(call.get("function"), dict) for call in calls):
        raise ConvertError(origin, "a message has a tool call that is none of a function", _MEND)
    return list(value)


def _references(origin: str, value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    return tuple(_text(origin, "reference", item) for item in (value if isinstance(value, list) else [value]))


def _text(origin: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConvertError(origin, f"{name} is {a_json(value)}, not a string", _MEND)
    if not value.strip():
        raise ConvertError(origin, f"{name} is empty", _MEND)
    return value


def _list(origin: str, name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ConvertError(origin, f"{name} is {a_json(value)}, not a list", _MEND)
    return value


def _count(origin: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        shown = value if isinstance(value, int | float) and not isinstance(value, bool) else a_json(value)
        raise ConvertError(origin, f"max_tokens is {shown}, not a whole number from 1", _MEND)
    return value


def _said(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [content]
    texts = [_shown(part) for part in parts]
    calls = [_called(call["function"]) for call in message.get("tool_calls") or []]
    return "\n".join([text for text in texts if text] + calls)


def _shown(part: Any) -> str:
    """Return a part of a content: its text, or what kind it is."""
    if not isinstance(part, dict):
        return str(part)
    text = part.get("text")
    return text if isinstance(text, str) else f"[{part.get('type', 'part')}]"


def _called(function: dict[str, Any]) -> str:
    arguments = function.get("arguments")
    shown = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f"{function.get('name', '')}({shown})"
