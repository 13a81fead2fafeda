"""One line an architecture, of all that the zoo says of it."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from zoo.rows import MODES, RIGHT

_UNSTABLE = re.compile(r"/\S*/zoo-\w+/|The available parameters.*?(?=\[\w+\.py|$)|\{'.*?(?=\[\w+\.py|$)")
"""What differs from run to run: temporary directories, and sets in any order."""
_REASON = 200
"""Characters of a reason in a table."""


def summarize(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each architecture, in the order of their names, with a cell for each output format."""
    architectures: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        architectures.setdefault(row["architecture"], []).append(row)
    return [_line(name, architectures[name]) for name in sorted(architectures)]


def _line(name: str, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    cells = {
        column_of(output_format, scales): _cell(
            [row for row in rows if not row["format"] or (row["format"], row["scales"]) == (output_format, scales)]
        )
        for output_format, scales in MODES
    }
    reasons = dict.fromkeys(
        f"{row['status']}: {_plain(row['reason'])}" for row in rows if row["status"] != RIGHT and row["reason"]
    )
    options = sorted({row["options"] for row in rows if row["options"]})
    said = [*(f"with `{option}`" for option in options), *list(reasons)[:2]]
    why = {"why": "; ".join(said)} if said else {}
    return {"architecture": name, "layers": max(row["layers"] for row in rows), **cells, **why}


def column_of(output_format: str, scales: str) -> str:
    """Return the key of a cell."""
    return f"{output_format}-{scales}".replace("-", "_")


def _cell(rows: list[Mapping[str, Any]]) -> str:
    """Return the status that all rows have, or each with the versions of vLLM and the ranks that have it."""
    where: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        where.setdefault(row["status"], []).append(row)
    if len(where) == 1:
        return next(iter(where))
    return ", ".join(f"{status} ({_places(some, rows)})" for status, some in where.items())


def _places(some: list[Mapping[str, Any]], rows: list[Mapping[str, Any]]) -> str:
    for key, name in (("vllm", "{}"), ("tp", "TP {}")):
        values = {row[key] for row in some}
        if all((row in some) == (row[key] in values) for row in rows):
            return ", ".join(name.format(value) for value in sorted(values))
    return ", ".join(f"{row['vllm']} TP {row['tp']}" for row in some)


def _plain(reason: str) -> str:
    """Return a reason that is as long as a table's cell may be, without what Markdown would read."""
    reason = _UNSTABLE.sub("", reason)
    text = re.sub(r"[|<>*_`]", lambda found: f"\\{found[0]}", reason)
    return text if len(text) <= _REASON else f"{text[:_REASON].rstrip(chr(92))} …"
