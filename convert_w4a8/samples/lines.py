"""Calibration files, line by line: what a line holds is checked here, before a tokenizer sees it."""

import gzip
import json
import math
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from convert_w4a8.errors import ConvertError
from convert_w4a8.text import human_bytes

MAX_LINE = 1 << 26
"""Bytes of a line; a million tokens are some 5 MB."""
_CONTENTS = ("messages", "text", "input_ids")
ROLES = ("system", "developer", "user", "assistant", "model", "tool", "function", "ipython", "observation")
_MEND = "mend the line, or leave it out"
_COLUMNS = "a line is a JSON object with messages (and tools), text or input_ids, and perhaps a loss_mask"


@dataclass(frozen=True)
class Record:
    """What one line, or one document of a text file, holds: exactly one of messages, text and token ids."""

    origin: str
    messages: list[dict[str, Any]] | None = None
    """Each with a role of `ROLES`. Contents are strings; arguments of tool calls are objects, as vLLM makes them."""
    tools: list[dict[str, Any]] | None = None
    text: str | None = None
    input_ids: list[int] | None = None
    loss_mask: list[int] | None = None
    """1: the token counts; 0: it is masked. As llm-compressor's datasets have it (`use_loss_mask`)."""


def read_records(paths: Iterable[Path]) -> Iterator[Record]:
    """Yield what files hold, in their order: JSON lines, also of *.gz; *.txt holds documents with NULs between.

    Raises:
        ConvertError: a file cannot be read, or a line is not as it should be; the subject says which one.

    """
    for path in paths:
        try:
            with _open(path) as file:
                yield from _documents(path, file) if ".txt" in path.suffixes[-2:] else _lines(path, file)
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConvertError(str(path), f"cannot be read ({reason})", "check the file that --data names") from error


def _open(path: Path) -> IO[bytes]:
    """Open a file, or what a pipe delivers."""
    if stat.S_ISDIR(path.stat().st_mode):
        raise ConvertError(str(path), "is a directory", "name files of JSON lines")
    return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _documents(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """Yield the documents of a text file."""
    raw = file.read(MAX_LINE * 16 + 1)
    if len(raw) > MAX_LINE * 16:
        raise ConvertError(str(path), f"is larger than {human_bytes(MAX_LINE * 16)}", "cut it into several files")
    for number, part in enumerate(raw.split(b"\0"), 1):
        origin = f"{path} document {number}"
        text = _decoded(origin, part)
        if text.strip():
            yield Record(origin, text=text)


def _lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """Yield the lines of a JSON lines file."""
    for origin, found in _objects(path, file, _COLUMNS):
        yield _record(origin, found)


def read_objects(
    path: Path, columns: str, refused: Callable[[ConvertError], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield where each line of a JSON lines file stands, and the object that it is; blank ones are left out.

    columns: what a line should be, for messages. refused: called with what is wrong with a line that cannot be read;
    None: that is raised. Raises ConvertError where the file, or a line, cannot be read.
    """
    try:
        with _open(path) as file:
            yield from _objects(path, file, columns, refused)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConvertError(str(path), f"cannot be read ({reason})", "check the name of the file") from error


def _objects(
    path: Path, file: IO[bytes], columns: str, refused: Callable[[ConvertError], None] | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        origin = f"{path} line {number}"
        if len(raw) > MAX_LINE:
            raise ConvertError(origin, f"is longer than {human_bytes(MAX_LINE)}", "is it JSON lines? " + columns)
        if raw.strip():
            try:
                found = _parsed(origin, _decoded(origin, raw).rstrip("\r\n"), columns)
            except ConvertError as error:
                if refused is None:
                    raise
                refused(error)
            else:
                yield origin, found


def _decoded(origin: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8 (byte {error.start + 1}: 0x{raw[error.start]:02x})"
        raise ConvertError(origin, reason, "write the file as UTF-8") from error


def _parsed(origin: str, line: str, columns: str) -> dict[str, Any]:
    """Read one line as an object of JSON, strictly."""
    try:
        found = json.loads(line, parse_constant=_constant, object_pairs_hook=_object, parse_float=_float)
        line.encode() if "\\u" not in line else json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ConvertError(origin, "has half of a surrogate pair (\\ud800 … \\udfff)", _MEND) from error
    except json.JSONDecodeError as error:
        raise ConvertError(origin, f"is not JSON (column {error.colno}: {error.msg})", _MEND) from error
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise ConvertError(origin, f"is not JSON ({reason})", _MEND) from error
    if not isinstance(found, dict):
        raise ConvertError(origin, f"is {a_json(found)}, not an object", columns)
    return found


def _record(origin: str, found: dict[str, Any]) -> Record:
    columns = {name: found[name] for name in (*_CONTENTS, "tools", "loss_mask") if found.get(name) is not None}
    have = [name for name in _CONTENTS if name in columns]
    if len(have) != 1:
        what = f"has {' and '.join(have)}" if have else f"has none of {', '.join(_CONTENTS)}"
        raise ConvertError(origin, what, f"{_COLUMNS}; exactly one of the first three")
    if columns.get("tools") and have != ["messages"]:
        raise ConvertError(origin, f"has tools beside {have[0]}", "tools belong to messages")
    return Record(
        origin,
        messages=parse_messages(origin, columns["messages"]) if "messages" in columns else None,
        tools=parse_tools(origin, columns.get("tools")),
        text=_string(origin, "text", columns["text"]) if "text" in columns else None,
        input_ids=_integers(origin, "input_ids", columns["input_ids"]) if "input_ids" in columns else None,
        loss_mask=_mask(origin, columns["loss_mask"]) if "loss_mask" in columns else None,
    )


def _constant(name: str) -> float:
    raise ValueError(f"it holds {name}")


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError("it holds a number that is too large")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found


def a_json(value: Any) -> str:
    """Say what a JSON value is."""
    names = {bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if value is None else names.get(type(value), "an object")


def _string(origin: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ConvertError(origin, f"{name} is {a_json(value)}, not a string", _MEND)
    if not value:
        raise ConvertError(origin, f"{name} is empty", _MEND)
    return value


def _integers(origin: str, name: str, value: Any) -> list[int]:
    if not isinstance(value, list):
        raise ConvertError(origin, f"{name} is {a_json(value)}, not a list of whole numbers", _MEND)
    if not value:
        raise ConvertError(origin, f"{name} is empty", _MEND)
    for place, number in enumerate(value):
        if type(number) is not int:
            shown = number if isinstance(number, float) else a_json(number)
            raise ConvertError(origin, f"{name}[{place}] is {shown}, not a whole number", _MEND)
    return value


def _mask(origin: str, value: Any) -> list[int]:
    numbers = _integers(origin, "loss_mask", value)
    wrong = next((n for n in numbers if n not in {0, 1}), None)
    if wrong is not None:
        raise ConvertError(origin, f"loss_mask holds {wrong}", "1 for a token that counts, 0 for a masked one")
    return numbers


def parse_tools(origin: str, value: Any) -> list[dict[str, Any]] | None:
    """Check tools; an empty list is none, as for vLLM."""
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ConvertError(origin, "tools is not a list of objects", "write tools as for the chat template, as JSON")
    return value


def parse_messages(origin: str, value: Any) -> list[dict[str, Any]]:
    """Check messages and bring them into the form in which vLLM hands them to the chat template."""
    if not isinstance(value, list):
        raise ConvertError(origin, f"messages is {a_json(value)}, not a list of objects", _MEND)
    if not value:
        raise ConvertError(origin, "messages is empty", _MEND)
    return [_message(origin, f"messages[{place}]", message) for place, message in enumerate(value)]


def _message(origin: str, name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConvertError(origin, f"{name} is {a_json(value)}, not an object", _MEND)
    message = {key: item for key, item in value.items() if item is not None}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role) if isinstance(role, str) else a_json(role)
        what = "has no role" if role is None else f"has the role {shown}"
        raise ConvertError(origin, f"{name} {what}", f"roles are {', '.join(ROLES)}")
    if "content" in message:
        message["content"] = _content(origin, f"{name}.content", message["content"])
    for key in ("reasoning_content", "reasoning", "thinking"):
        if key in message and not isinstance(message[key], str):
            raise ConvertError(origin, f"{name}.{key} is {a_json(message[key])}, not a string", _MEND)
    calls = message.pop("tool_calls", [])
    if not isinstance(calls, list):
        raise ConvertError(origin, f"{name}.tool_calls is {a_json(calls)}, not a list", _MEND)
    if calls:
        message["tool_calls"] = [_call(origin, f"{name}.tool_calls[{n}]", call) for n, call in enumerate(calls)]
    if not {"content", "tool_calls", "reasoning_content", "reasoning", "thinking"} & message.keys():
        raise ConvertError(origin, f"{name} has neither content nor tool_calls", _MEND)
    message.setdefault("content", "")  # as vLLM gives it to the template
    return message


def _content(origin: str, name: str, value: Any) -> str:
    """Return a content as a string; parts are joined by newlines, as vLLM does (`content_format="string"`)."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ConvertError(origin, f"{name} is {a_json(value)}, not a string", _MEND)
    texts = []
    for place, part in enumerate(value):
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") != "text"):
            raise ConvertError(origin, f"{name}[{place}] is no text", "leave the line out; only text can be used")
        texts.append(text)
    return "\n".join(texts)


def _call(origin: str, name: str, value: Any) -> dict[str, Any]:
    """Check a tool call. Arguments become an object, an empty one where they are none, as with vLLM."""
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ConvertError(origin, f"{name} is no call of a function by name", _MEND)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = {}
    arguments = arguments if isinstance(arguments, dict) else {}
    return {**value, "function": {**function, "arguments": arguments}}
