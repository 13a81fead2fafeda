"""The figures of a conversion, as they are kept as a baseline and compared with one."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.json_file import read_json
from convert_w4a8.errors import ConvertError, Problem

VERSION = 2
_MOST_DB = 10_000
"""Beyond any SQNR, −1000 for NaN weights included."""
UNKNOWN = "unknown"
"""The scales of an output that does not record how they were chosen."""


@dataclass(frozen=True)
class LayerFigures:
    """What is compared of one converted layer.

    codes_kept: as `linear.kept_groups` says. sqnr_db: None where nothing was lost.
    """

    out_features: int
    in_features: int
    codes_kept: bool
    sqnr_db: float | None


@dataclass(frozen=True)
class Figures:
    """A conversion as it is compared and kept as a baseline. Sizes in bytes of tensors.

    sample: only one layer of each kind was converted.
    """

    source: str
    format: str
    scales: str
    sample: bool
    bytes_in: int
    bytes_out: int
    layers: Mapping[str, LayerFigures]
    dequantized: tuple[str, ...]


def compare(now: Figures, baseline: Figures, tolerance_db: float) -> tuple[tuple[Problem, ...], tuple[str, ...]]:
    """Return what is worse than in a baseline or not comparable with it, and what is better."""
    problems = []
    for key in ("source", "format", "scales", "sample", "bytes_in", "bytes_out"):
        ours, theirs = getattr(now, key), getattr(baseline, key)
        if ours != theirs and UNKNOWN not in (ours, theirs):
            problems.append(_regression(key, f"is {ours}, in the baseline {theirs}"))
    absent, added = baseline.layers.keys() - now.layers.keys(), now.layers.keys() - baseline.layers.keys()
    problems += [_regression(module, "is in the baseline, but was not converted") for module in sorted(absent)]
    problems += [_regression(module, "was converted, but is not in the baseline") for module in sorted(added)]
    notes = []
    for module in sorted(now.layers.keys() & baseline.layers.keys()):
        ours, theirs = now.layers[module], baseline.layers[module]
        shapes = [(layer.out_features, layer.in_features) for layer in (ours, theirs)]
        if shapes[0] != shapes[1]:
            problems.append(_regression(module, f"is {shapes[0]}, in the baseline {shapes[1]}"))
        if theirs.codes_kept and not ours.codes_kept:
            problems.append(_regression(module, "has new INT4 codes, in the baseline those of the source"))
        elif ours.codes_kept and not theirs.codes_kept:
            notes.append(f"{module}: keeps its INT4 codes, in the baseline they are new")
        gain = _gain(ours.sqnr_db, theirs.sqnr_db)
        if not gain >= -tolerance_db:
            problems.append(_regression(module, f"SQNR is {_db(ours.sqnr_db)}, in the baseline {_db(theirs.sqnr_db)}"))
        elif gain > tolerance_db:
            notes.append(f"{module}: SQNR is {_db(ours.sqnr_db)}, in the baseline {_db(theirs.sqnr_db)}")
    return tuple(problems), tuple(notes)


def _regression(subject: str, reason: str) -> Problem:
    return Problem(subject, reason, "if that is meant, write the baseline again")


def _gain(ours: float | None, theirs: float | None) -> float:
    return 0.0 if ours == theirs else (math.inf if ours is None else ours) - (math.inf if theirs is None else theirs)


def _db(value: float | None) -> str:
    return "without loss" if value is None else f"{value:.2f} dB"


def read_baseline(path: Path) -> Figures:
    """Read what `--write-baseline` wrote.

    Raises:
        ConvertError: it is something else.

    """
    document = read_json(path)
    wrong = ConvertError(str(path), f"is not a version {VERSION} baseline", "write it again with --write-baseline")
    version = document.pop("w4a8_check", None)
    if version not in (1, VERSION):
        raise wrong
    try:
        layers = {str(module): _layer(figures, version) for module, figures in document.pop("layers").items()}
        dequantized = document.pop("dequantized")
        found = Figures(layers=layers, dequantized=tuple(dequantized), **document)
    except (KeyError, TypeError, AttributeError) as error:
        raise wrong from error
    if not isinstance(dequantized, list) or not _is_sound(found):
        raise wrong
    return found


def _is_sound(figures: Figures) -> bool:
    """Whether all values are what their types say: a baseline may be any file."""
    words = (figures.source, figures.format, figures.scales, *figures.dequantized)
    sizes = [figures.bytes_in, figures.bytes_out]
    sizes += [size for layer in figures.layers.values() for size in (layer.out_features, layer.in_features)]
    flags = [figures.sample, *(layer.codes_kept for layer in figures.layers.values())]
    errors = [layer.sqnr_db for layer in figures.layers.values() if layer.sqnr_db is not None]
    return (
        all(isinstance(word, str) for word in words)
        and all(type(size) is int and 0 <= size < 2**63 for size in sizes)
        and all(isinstance(flag, bool) for flag in flags)
        and all(type(error) in (int, float) and abs(error) <= _MOST_DB for error in errors)
    )


def _layer(figures: dict[str, Any], version: int) -> LayerFigures:
    if version == 1:  # called it `exact`
        figures = {"codes_kept" if key == "exact" else key: value for key, value in figures.items()}
    return LayerFigures(**figures)


def baseline_dict(figures: Figures) -> dict[str, Any]:
    """Return the baseline document."""
    return {"w4a8_check": VERSION, **asdict(figures)}
