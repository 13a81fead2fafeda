"""Reading the JSON files of a checkpoint, which may hold anything."""

import json
import stat
from pathlib import Path
from typing import Any

from convert_w4a8.errors import ConvertError

_MAX_JSON_BYTES = 500_000_000
_MAX_JSON_MARKS = 5_000_000
"""Brackets, braces and commas: an index has a comma for each tensor."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ConvertError: the file is missing, not UTF-8, not JSON, or not an object.

    """
    try:
        status = path.stat()
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)) or status.st_size > _MAX_JSON_BYTES:
            raise ConvertError(str(path), "is not a JSON file", "download or write the file again")
        raw = path.read_bytes()
        if sum(map(raw.count, (b"[", b"{", b","))) > _MAX_JSON_MARKS:  # parsing takes some 100 bytes for each
            raise ConvertError(str(path), "is not a checkpoint's JSON file", "download or write the file again")
        value = json.loads(raw.decode("utf-8"), parse_constant=_constant)
    except OSError as error:
        raise ConvertError(str(path), f"cannot be read ({error.strerror})", "check the checkpoint directory") from error
    except (ValueError, RecursionError) as error:
        raise ConvertError(str(path), f"is not valid JSON ({error})", "download or write the file again") from error
    if not isinstance(value, dict):
        raise ConvertError(str(path), "does not hold a JSON object", "download or write the file again")
    return value


def _constant(name: str) -> float:
    """Read what is no JSON, but written by Python: infinities, as some models' settings are, but not NaN."""
    if name == "NaN":
        raise ValueError("it holds NaN")
    return float(name)
