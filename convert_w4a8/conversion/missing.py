"""Layers that one part of a model lacks, and others like it have.

Whether all weights were loaded vLLM asks only where a model is not quantized (`DefaultModelLoader.load_weights`): half
of a merged layer, or an expert, would be served as whatever the memory held.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import natural_key
from convert_w4a8.conversion.blocks import REMEDY, is_llama, lacking_of_blocks, lacking_of_llamas, listed
from convert_w4a8.errors import Problem
from convert_w4a8.sources.base import LayerSpec
from convert_w4a8.text import shortened

Parts = Mapping[str, set[str]]
"""What has layers → the last parts of their names."""

_NUMBER = re.compile(r"\d+")
_EXPERT = re.compile(r"^(?P<experts>.+\.experts)\.(?P<number>\d{1,6})$")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_SETS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"), _ATTENTION)
"""Layers of which a part of a model has what others of its kind have or, where it is of another kind, none."""
_OTHERWISE = {"qkv_proj", "gate_up_proj", "query_key_value", "W_pack", "q_a_proj", "kv_b_proj", "kv_a_proj_with_mqa"}
"""Layers that stand for some of a set, merged or compressed."""
_SHARED = ({"v_proj"}, {"k_proj", "v_proj"})
"""Some models take keys for values, or compute both once for several blocks. None has values without keys."""
_SHARES = (re.compile(r"k_eq_v"), re.compile(r"kv_shared"))
"""Settings that say so, of each."""


@dataclass(frozen=True)
class _Incomplete:
    """A part that has some layers of a set, and which it lacks that others of its kind have.

    is_other: whether it has layers that these have not, and so may be made otherwise on purpose.
    """

    part: str
    lacking: set[str]
    is_other: bool


def parts_of(checkpoint: Checkpoint, specs: Iterable[LayerSpec]) -> Parts:
    """Return what has layers, in natural order."""
    modules = {name.rpartition(".")[0] for name in checkpoint.tensors if not name.endswith(".bias")}
    found: dict[str, set[str]] = {}
    for module in sorted(modules | {spec.name for spec in specs}, key=natural_key):
        part, _, leaf = module.rpartition(".")
        found.setdefault(part, set()).add(leaf)
    return found


def missing_problems(parts: Parts, config: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield layers without which a part of the model would be served wrongly."""
    strict = is_llama(config)
    found: dict[str, set[str]] = lacking_of_llamas(_modules(parts)) if strict else {}
    for odd in _incomplete(parts):
        if strict or not (odd.is_other or odd.lacking in _SHARED):
            found[odd.part] = found.get(odd.part, set()) | odd.lacking
    for part, leaves in found.items():
        yield Problem(part, f"has no {listed(leaves)}, which others like it have", REMEDY)
    for experts, numbers in _experts(parts).items():
        missing = [number for number in range(max(numbers)) if number not in numbers]
        if missing:
            yield Problem(experts, f"has no {shortened(list(map(str, missing)))}, but a {max(numbers)}", REMEDY)


def missing_warnings(parts: Parts, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield layers that may be missing, and that some models do without."""
    incomplete = list(_incomplete(parts))
    lacking = {odd.part: odd.lacking for odd in incomplete}
    if not is_llama(config):
        whole = {part: leaves for part, leaves in lacking_of_blocks(_modules(parts)).items() if part not in lacking}
        for missing, names in _by_lacking(whole):
            yield f"no {missing} in {shortened(names)}, which most others have: wrong, unless the model is made so"
    others = {odd.part: odd.lacking for odd in incomplete if odd.is_other and odd.lacking not in _SHARED}
    for missing, names in _by_lacking(others):
        yield f"no {missing} in {shortened(names)}, which others have: wrong, unless these are layers of another kind"
    meant = [leaves for leaves, setting in zip(_SHARED, _SHARES, strict=True) if _says(config, setting)]
    shared = {part: leaves for part, leaves in lacking.items() if leaves in _SHARED and leaves not in meant}
    for missing, names in _by_lacking(shared):
        yield f"no {missing} in {shortened(names)}, which others have: wrong, unless the model shares keys and values"
    experts = _experts(parts)
    most: dict[str, int] = {}
    for name, numbers in experts.items():
        most[_kind(name)] = max(most.get(_kind(name), 0), max(numbers) + 1)
    few = [name for name, numbers in experts.items() if max(numbers) + 1 < most[_kind(name)]]
    if few:
        said = f"{len(experts[few[0]])} experts, others {most[_kind(few[0])]}"
        yield f"{shortened(few)}: {said}: wrong, unless the model says so"
    if _needs_lm_head(config) and "lm_head" not in parts.get("", ()):
        yield "no lm_head, and tie_word_embeddings = false: wrong, unless only hidden states are used"


def _modules(parts: Parts) -> list[str]:
    return [f"{part}.{leaf}" if part else leaf for part, leaves in parts.items() for leaf in leaves]


def _incomplete(parts: Parts) -> Iterator[_Incomplete]:
    """Yield the parts that lack layers of a set."""
    for whole in _SETS:
        by_kind: dict[str, dict[str, frozenset[str]]] = {}
        for part, leaves in parts.items():
            if not leaves.isdisjoint(whole) and leaves.isdisjoint(_OTHERWISE):
                by_kind.setdefault(_kind(part), {})[part] = frozenset(leaves)
        for alike in by_kind.values():
            sorts = frozenset(alike.values())  # few, of many experts
            known = frozenset().union(*sorts).intersection(whole)
            for part, own in alike.items():
                if lacking := known - own:
                    others = frozenset().union(*(other for other in sorts if other & lacking))
                    yield _Incomplete(part, set(lacking), is_other=not own <= others)


def _experts(parts: Iterable[str]) -> dict[str, set[int]]:
    """Return the modules of experts, and the numbers of those that are there."""
    found: dict[str, set[int]] = {}
    for part in parts:
        match = _EXPERT.match(part)
        if match is not None:
            found.setdefault(match["experts"], set()).add(int(match["number"]))
    return found


def _by_lacking(found: Mapping[str, set[str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield what is lacking, in words, and all parts that lack it."""
    for leaves in dict.fromkeys(map(listed, found.values())):
        yield leaves, [part for part, lacking in found.items() if listed(lacking) == leaves]


def _says(config: Mapping[str, Any], key: re.Pattern[str]) -> bool:
    """Whether a configuration or a part of it has a setting that is not 0."""
    return any(
        _says(value, key) if isinstance(value, Mapping) else bool(value) and key.search(name) is not None
        for name, value in config.items()
    )


def _needs_lm_head(config: Mapping[str, Any]) -> bool:
    is_causal = is_llama(config) and all(name.endswith("ForCausalLM") for name in config["architectures"])
    return is_causal and config.get("tie_word_embeddings") is False


def _kind(name: str) -> str:
    return _NUMBER.sub("N", name)
