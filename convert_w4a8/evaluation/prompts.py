"""Prompts of an evaluation: a JSON lines file, checked line by line before anything is asked."""

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.checks import Check, parse_check
from convert_w4a8.samples.lines import a_json, parse_messages, parse_tools, read_objects

_COLUMNS = ("id", "prompt", "messages", "tools", "reference", "checks", "tags", "max_tokens")
_SHAPE = "a line is a JSON object with prompt or messages, and perhaps tools, reference, checks, tags, max_tokens, id"
_MEND = "mend the line, or leave it out"


@dataclass(frozen=True)
class Prompt:
    """One prompt: exactly one of `prompt` (plain text, continued as it is) and `messages` (a chat)."""

    id: str
    prompt: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    checks: tuple[Check, ...]
    tags: tuple[str, ...]
    max_tokens: int | None

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
    by_id: dict[str, Prompt] = field(repr=False)


def read_prompts(path: Path) -> Prompts:
    """Read a prompts file.

    Raises:
        ConvertError: it cannot be read, holds nothing, or a line is not as it should be; the subject names the line.

    """
    found: list[Prompt] = []
    origins: dict[str, str] = {}
    digest = hashlib.sha256()
    for number, (origin, line) in enumerate(read_objects(path, _SHAPE), 1):
        prompt = _prompt(origin, number, line)
        if prompt.id in origins:
            raise ConvertError(
                origin, f"has the id {prompt.id!r}, as {origins[prompt.id]} has", "give every line its own id"
            )
        origins[prompt.id] = origin
        found.append(prompt)
        digest.update(json.dumps(line, sort_keys=True).encode() + b"\n")
    if not found:
        raise ConvertError(str(path), "holds no prompts", _SHAPE)
    return Prompts(tuple(found), digest.hexdigest(), {prompt.id: prompt for prompt in found})


def _prompt(origin: str, number: int, line: dict[str, Any]) -> Prompt:
    odd = sorted(line.keys() - set(_COLUMNS))
    if odd:
        raise ConvertError(origin, f"has {odd[0]!r}, which is not known", _SHAPE)
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
        id=_text(origin, "id", line["id"]) if "id" in line else str(number),
        prompt=_text(origin, "prompt", line["prompt"]) if "prompt" in line else None,
        messages=parse_messages(origin, line["messages"]) if "messages" in line else None,
        tools=parse_tools(origin, line.get("tools")),
        checks=parsed,
        tags=tuple(dict.fromkeys(_text(origin, "tags", tag) for tag in _list(origin, "tags", line.get("tags", [])))),
        max_tokens=_count(origin, line["max_tokens"]) if "max_tokens" in line else None,
    )


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
    calls = [
        f"{call['function']['name']}({json.dumps(call['function']['arguments'])})"
        for call in message.get("tool_calls", [])
    ]
    return "\n".join([text for text in (message.get("content", ""),) if text] + calls)
