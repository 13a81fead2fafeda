"""Which config group of compressed-tensors a module belongs to."""

from collections.abc import Mapping
from typing import Any

from convert_w4a8.checkpoint.names import is_embedding
from convert_w4a8.errors import ConvertError
from convert_w4a8.sources.checks import setting
from convert_w4a8.sources.patterns import matches as matches_pattern


def group_of(config: Mapping[str, Any], module: str) -> Mapping[str, Any]:
    """Return the config group that a module with quantized weights belongs to; it has a `weights` block.

    As in compressed-tensors, a target that names the module wins over a pattern, and a pattern over a class name;
    the class of a module with quantized weights is taken to be Linear, or Embedding where its name says so.

    Raises:
        ConvertError: there is none, or the groups are not what they should be.

    """
    best: tuple[int, Mapping[str, Any]] | None = None
    for name, group in setting(config, "config_groups", dict, {}).items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            continue
        for target in setting(group, "targets", list, [], f"quantization_config: {name}"):
            rank = _target_rank(str(target), module)
            if rank and (best is None or rank > best[0]):
                best = rank, group
    if best is None:
        raise ConvertError(module, "has quantized weights, but no config group targets it", "repair config_groups")
    return best[1]


def _target_rank(target: str, module: str) -> int:
    if target.startswith("re:"):
        return 2 if matches_pattern(target.removeprefix("re:"), module, "targets") else 0
    if target == module:
        return 3
    return 1 if target == "Linear" or (target == "Embedding" and is_embedding(module)) else 0
