"""Files that are given for a baseline and are none, or have been edited."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from convert_w4a8.errors import ConvertError
from convert_w4a8.regression.baseline import Figures, LayerFigures, baseline_dict, read_baseline

LAYER = LayerFigures(256, 512, codes_kept=True, sqnr_db=30.5)
FIGURES = Figures("gptq", "lut", "search", False, 1000, 1100, {"q_proj": LAYER}, ("lm_head",))
VALUES: tuple[Any, ...] = (10**400, -1, 0.5, float("inf"), "4", "", [], [4], {}, {"a": 1}, True, None)
KEYS = ("source", "format", "scales", "sample", "bytes_in", "bytes_out", "layers", "dequantized")


def read(tmp_path: Path, change: Callable[[Any], object]) -> Figures:
    """Read a baseline after a change."""
    document = json.loads(json.dumps(baseline_dict(FIGURES)))
    change(document)
    (tmp_path / "b.json").write_text(json.dumps(document))
    return read_baseline(tmp_path / "b.json")


def set_value(keys: list[str], value: object, document: Any) -> None:
    """Set the value that some keys lead to."""
    for key in keys[:-1]:
        document = document[key]
    document[keys[-1]] = value


def fits(value: object, like: object) -> bool:
    """Whether a value could stand in the place of another."""
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(like, bool)
    if isinstance(like, int):
        return isinstance(value, int) and 0 <= value < 2**63
    return type(value) is type(like) and not isinstance(value, list | dict)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    """Also of a layer that lost nothing, and of NaN weights."""
    assert read(tmp_path, lambda _: None) == FIGURES
    for error in (None, -1000.0, 30):
        found = read(tmp_path, partial(set_value, ["layers", "q_proj", "sqnr_db"], error))
        assert found.layers["q_proj"] == replace(LAYER, sqnr_db=error)


@pytest.mark.parametrize("key", KEYS)
def test_values_of_another_kind_are_refused(key: str, tmp_path: Path) -> None:
    """Numbers without end, strings, lists: whatever could not be compared or printed."""
    for value in VALUES:
        if key in ("layers", "dequantized") and value in ([], {}, ""):
            continue  # no layers
        if not fits(value, getattr(FIGURES, key)):
            with pytest.raises(ConvertError, match="is not a version 2 baseline"):
                read(tmp_path, partial(set_value, [key], value))


@pytest.mark.parametrize("key", ["out_features", "in_features", "codes_kept", "sqnr_db"])
def test_figures_of_a_layer_of_another_kind_are_refused(key: str, tmp_path: Path) -> None:
    """The same within a layer."""
    for value in VALUES:
        like = getattr(LAYER, key)
        if (key == "sqnr_db" and value in (None, -1, 0.5)) or fits(value, like):
            continue
        with pytest.raises(ConvertError, match="is not a version 2 baseline"):
            read(tmp_path, partial(set_value, ["layers", "q_proj", key], value))
