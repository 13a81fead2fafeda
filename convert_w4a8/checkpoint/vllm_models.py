"""What vLLM's model code does with a layer of a model: asked by a config.json and a module's name.

The tables are in `vllm_loaders.py` and `vllm_layers.py`; docs/reference/vllm-models.md shows them.
"""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from convert_w4a8.checkpoint.vllm_layers import MERGED, UNQUANTIZED
from convert_w4a8.checkpoint.vllm_loaders import KEPT, TOUCHED, Touched

_DEPTH = 4
"""Configurations lie in one another: thinker_config.text_config. Deeper ones are nobody's."""


def touched_by_loader(config: Mapping[str, Any], module: str, target: str) -> str | None:
    """Return why vLLM's code for this model would load a converted layer wrongly, or None where it would not.

    module: its name in the checkpoint. target: the name of an output format.
    """
    row = loader_row(config, module, target)
    return None if row is None else row.reason


def loader_row(config: Mapping[str, Any], module: str, target: str, *, split: bool = False) -> Touched | None:
    """Return the row of the table that says what vLLM's code does to a converted layer, the worst first.

    split: ask for what is only wrong at tensor-parallel sizes above 1, instead.
    """
    for row in _touched(model_names(config)):
        if row.split is split and row.holds(module, target) and _has_settings(config, row.settings):
            return row
    return None


def kept_wrongly(config: Mapping[str, Any], module: str) -> str | None:
    """Return why a layer of this model must not be written in BF16 as [N, K], or None where it may be."""
    names = model_names(config)
    for row in KEPT:
        if names.intersection(row.models) and re.search(row.modules, module):
            return row.reason
    return None


def always_in_16_bits(config: Mapping[str, Any], module: str) -> bool:
    """Whether vLLM makes this layer without a quantization method, so that it can be served in BF16 only."""
    pattern = _unquantized(model_names(config))
    return pattern.search(module) is not None


def merged_with(config: Mapping[str, Any]) -> Mapping[str, str]:
    """Return what vLLM merges in this model beyond `names.merged_name`: end of a module's name → end of the merged one.

    Ends are parts of a dotted name; where several fit a module, the longest counts.
    """
    return _merged(model_names(config))


def merged_in(config: Mapping[str, Any], module: str) -> str | None:
    """Return the name of the layer into which vLLM merges a module by `merged_with`; None where it does not."""
    ends = merged_with(config)
    parts = module.split(".")
    for start in range(len(parts)):
        end = ".".join(parts[start:])
        if end in ends:
            return ".".join([*parts[:start], ends[end]])
    return None


def model_names(config: Mapping[str, Any]) -> frozenset[str]:
    """Return all `architectures` and `model_type` of a configuration and of those in it."""
    return frozenset(_names(config, _DEPTH))


def _names(config: Mapping[str, Any], depth: int) -> Iterator[str]:
    architectures = config.get("architectures")
    if isinstance(architectures, list):
        yield from (name for name in architectures if isinstance(name, str))
    if isinstance(config.get("model_type"), str):
        yield config["model_type"]
    if depth > 1:
        for value in config.values():
            if isinstance(value, Mapping):
                yield from _names(value, depth - 1)


def _has_settings(config: Mapping[str, Any], settings: tuple[str, ...]) -> bool:
    inner = config.get("text_config")
    places = (config, inner) if isinstance(inner, Mapping) else (config,)
    return not settings or any(place.get(key) == 1 for place in places for key in settings)


@lru_cache
def _touched(names: frozenset[str]) -> tuple[Touched, ...]:
    return tuple(row for row in TOUCHED if not row.models or names.intersection(row.models))


@lru_cache
def _unquantized(names: frozenset[str]) -> re.Pattern[str]:
    rows = (row for row in UNQUANTIZED if not row.models or names.intersection(row.models))
    return re.compile("|".join(f"(?:{row.modules})" for row in rows))


@lru_cache
def _merged(names: frozenset[str]) -> Mapping[str, str]:
    ends: dict[str, str] = {}
    for row in MERGED:
        if not row.models or names.intersection(row.models):
            ends |= dict.fromkeys(row.shards, row.name)
    return ends
