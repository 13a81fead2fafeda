"""Ratings of a person who saw both answers without knowing which is whose: the file that the page of --out writes."""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from convert_w4a8.errors import ConvertError

_VALUES = {"baseline": (1.0, 0.0), "candidate": (0.0, 1.0), "both": (1.0, 1.0), "neither": (0.0, 0.0)}
_REMEDY = "rate again in the page evaluation.html of --out, and download the file"


@dataclass(frozen=True)
class Rating:
    """One more check of a prompt, by a person: whether each side's answer passes, 1 or 0."""

    baseline: float
    candidate: float


def read_ratings(path: Path, digest: str, pairs: Collection[tuple[str, int]]) -> Mapping[tuple[str, int], Rating]:
    """Return ratings by prompt and sample. digest: of the answers that they must be of. pairs: what can be rated.

    Raises:
        ConvertError: the file cannot be read, is none of ratings, or of other answers.

    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        answers, entries = found["answers"], found["ratings"]
        rated = [((entry["prompt"], entry["sample"]), Rating(*_VALUES[entry["preferred"]])) for entry in entries]
        ratings = dict(rated)
    except OSError as error:
        raise ConvertError(
            str(path), f"cannot be read ({error.strerror})", "check the file that --ratings names"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConvertError(str(path), f"is no file of ratings ({error!r})", _REMEDY) from error
    if answers != digest:
        raise ConvertError(str(path), "rates other answers than those of --out", _REMEDY)
    if len(ratings) < len(rated):
        raise ConvertError(str(path), "rates a pair of answers twice", _REMEDY)
    if odd := next((pair for pair in ratings if pair not in pairs), None):
        raise ConvertError(str(path), f"rates prompt {odd[0]!r}, sample {odd[1]!r}, which was not asked", _REMEDY)
    return ratings
