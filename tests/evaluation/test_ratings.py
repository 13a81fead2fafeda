"""Files of ratings: what is read, and what is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.ratings import Rating, read_ratings

PAIRS = {("a", 0), ("a", 1), ("b", 0)}
ENTRY: dict[str, Any] = {"prompt": "a", "sample": 0, "preferred": "baseline"}


def test_what_was_preferred_passes(tmp_path: Path) -> None:
    """By prompt and sample."""
    others = [ENTRY | {"sample": 1, "preferred": "neither"}, ENTRY | {"prompt": "b", "preferred": "both"}]
    file = tmp_path / "ratings.json"
    file.write_text(json.dumps({"answers": "x", "ratings": [ENTRY, *others]}), encoding="utf-8")
    wanted = {("a", 0): Rating(1, 0), ("a", 1): Rating(0, 0), ("b", 0): Rating(1, 1)}
    assert read_ratings(file, "x", PAIRS) == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is no file of ratings"),
        ("[" * 100_000, "is no file of ratings"),
        ("[]", "is no file of ratings"),
        ({"answers": "x"}, "is no file of ratings"),
        ({"answers": "x", "ratings": {"a": 1}}, "is no file of ratings"),
        ({"answers": "x", "ratings": [ENTRY | {"preferred": "A"}]}, "is no file of ratings"),
        ({"answers": "x", "ratings": [ENTRY | {"preferred": ["a"]}]}, "is no file of ratings"),
        ({"answers": "x", "ratings": [ENTRY | {"prompt": ["a"]}]}, "is no file of ratings"),
        ({"answers": "x", "ratings": [ENTRY, ENTRY | {"preferred": "both"}]}, "rates a pair of answers twice"),
        ({"answers": "x", "ratings": [ENTRY | {"prompt": "c"}]}, "rates prompt 'c', sample 0, which was not asked"),
        ({"answers": "x", "ratings": [ENTRY | {"sample": 9}]}, "rates prompt 'a', sample 9, which was not asked"),
        ({"answers": "x", "ratings": [ENTRY | {"sample": "0"}]}, "which was not asked"),
        ('{"answers": "x", "ratings": [{"prompt": "a", "sample": 1e400, "preferred": "both"}]}', "was not asked"),
        ({"answers": "y", "ratings": []}, "rates other answers than those of --out"),
    ],
)
def test_what_is_refused(tmp_path: Path, content: Any, said: str) -> None:
    """Nothing that is rated is ignored."""
    file = tmp_path / "ratings.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    with pytest.raises(ConvertError, match=r"ratings\.json") as raised:
        read_ratings(file, "x", PAIRS)
    assert said in str(raised.value)
