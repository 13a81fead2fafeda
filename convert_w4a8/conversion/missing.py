"""Layers that one part of a model lacks, and others like it have.

Whether all weights were loaded vLLM asks only where a model is not quantized (`DefaultModelLoader.load_weights`): half
of a merged layer, or an expert, would be served as whatever the memory held.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import natural_key
from convert_w4a8.errors import Problem
from convert_w4a8.sources.base import LayerSpec
from convert_w4a8.text import shortened

_NUMBER = re.compile(r"\d+")
_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d{1,6})$")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SETS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), _ATTENTION)
"""Layers of which a part of a model has all or, where it is of another kind, none."""
_SHARED = {"k_proj", "v_proj"}
"""Some models compute these once for several blocks, or take keys for values."""
_SHARES = re.compile(r"k_eq_v|kv_shared")
"""Settings that say so."""
_REMEDY = "download or write the checkpoint again: vLLM would serve it with what the memory held"


def missing_problems(checkpoint: Checkpoint, specs: Iterable[LayerSpec]) -> Iterator[Problem]:
    """Yield layers without which a part of the model would be served wrongly."""
    parts = _parts(checkpoint, specs)
    for part, leaves in _incomplete(parts):
        if not leaves <= _SHARED:
            yield Problem(part, f"has no {_listed(leaves)}, which others like it have", _REMEDY)
    for experts, numbers in _experts(parts).items():
        missing = [number for number in range(max(numbers)) if number not in numbers]
        if missing:
            yield Problem(experts, f"has no {shortened(list(map(str, missing)))}, but a {max(numbers)}", _REMEDY)


def missing_warnings(checkpoint: Checkpoint, specs: Iterable[LayerSpec]) -> Iterator[str]:
    """Yield layers that may be missing, and that some models do without."""
    parts = _parts(checkpoint, specs)
    found: dict[str, list[str]] = {}
    for part, leaves in _incomplete(parts):
        if leaves <= _SHARED and not _says(checkpoint.config, _SHARES):
            found.setdefault(_listed(leaves), []).append(part)
    for missing, names in found.items():
        yield f"no {missing} in {shortened(names)}, which others have: wrong, unless the model shares keys and values"
    experts = _experts(parts)
    most: dict[str, int] = {}
    for name, numbers in experts.items():
        most[_kind(name)] = max(most.get(_kind(name), 0), max(numbers) + 1)
    few = [name for name, numbers in experts.items() if max(numbers) + 1 < most[_kind(name)]]
    if few:
        said = f"{len(experts[few[0]])} experts, others {most[_kind(few[0])]}"
        yield f"{shortened(few)}: {said}: wrong, unless the model says so"


def _parts(checkpoint: Checkpoint, specs: Iterable[LayerSpec]) -> dict[str, set[str]]:
    """Return what has layers → the last parts of their names."""
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors if not name.endswith(".bias")}
    found: dict[str, set[str]] = {}
    for module in sorted(modules | {spec.name for spec in specs}, key=natural_key):
        part, _, leaf = module.rpartition(".")
        found.setdefault(part, set()).add(leaf)
    return found


def _incomplete(parts: dict[str, set[str]]) -> Iterator[tuple[str, set[str]]]:
    """Yield each part that has some layers of a set, and which it lacks that others of its kind have."""
    for whole in _SETS:
        by_kind: dict[str, list[tuple[str, set[str]]]] = {}
        for part, leaves in parts.items():
            if not leaves.isdisjoint(whole):
                by_kind.setdefault(_kind(part), []).append((part, set(whole) - leaves))
        for alike in by_kind.values():
            odd = [(part, lacking) for part, lacking in alike if lacking]
            if len(odd) < len(alike):
                yield from odd


def _experts(parts: Iterable[str]) -> dict[str, set[int]]:
    """Return the modules of experts, and the numbers of those that are there."""
    found: dict[str, set[int]] = {}
    for part in parts:
        match = _EXPERT.match(part)
        if match is not None:
            found.setdefault(match["experts"], set()).add(int(match["number"]))
    return found


def _says(config: Mapping[str, Any], key: re.Pattern[str]) -> bool:
    """Whether a configuration or a part of it has a setting that is not 0."""
    return any(
        _says(value, key) if isinstance(value, Mapping) else bool(value) and key.search(name) is not None
        for name, value in config.items()
    )


def _kind(name: str) -> str:
    return _NUMBER.sub("N", name)


def _listed(leaves: Iterable[str]) -> str:
    return " and ".join(sorted(leaves))
