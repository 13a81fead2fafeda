"""Outputs with layers of several kinds, as compressed-tensors describes them: a config group for each kind.

A group's targets are to be matched alike by vLLM 0.25.1 and 0.33.0 (`find_matched_target` there). It looks for a layer
by its own name, for a merged one (qkv_proj) by the names of all its parts, for experts by `LAYER.experts.0.PROJECTION`,
in which 0.25.1 says gate_proj, up_proj and down_proj whatever the model calls them. A class name such as Linear, in
0.25.1 also a part of one, comes before the parts of a merged layer there, and after them in 0.33.0. So targets are
names, which a model's mapper renames, and patterns for experts; never a class.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert_w4a8.checkpoint.names import fusion_key, is_expert, natural_key

_BLOCKS = re.compile(r"(?:^|\.)((?:layers|h|blocks)\.\d+\..+)$")


@dataclass(frozen=True)
class ConfigGroup:
    """Layers of one kind that are carried over, by their names in the output.

    scheme: a config group of compressed-tensors but for its targets: format, weights, input_activations. Plain JSON.
    """

    scheme: Mapping[str, Any]
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Mixture:
    """The layers that are converted, by their names in the output, and those that are carried over."""

    converted: tuple[str, ...]
    carried: tuple[ConfigGroup, ...]

    def groups(self, converted: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the `config_groups`, that of the converted layers first; without them if it is None."""
        targets = targets_of([self.converted, *(group.modules for group in self.carried)])
        schemes = [converted, *(group.scheme for group in self.carried)]
        found = [
            {"targets": names, **scheme} for names, scheme in zip(targets, schemes, strict=True) if scheme is not None
        ]
        return {f"group_{i}": group for i, group in enumerate(found)}


def targets_of(kinds: Sequence[Collection[str]]) -> list[list[str]]:
    """Return for each kind of layers, given by their modules, the targets that stand for it and for no other kind."""
    stacks = [{fusion_key(module) for module in modules if is_expert(module)} for modules in kinds]
    found = []
    for i, (modules, layers) in enumerate(zip(kinds, stacks, strict=True)):
        others = {_within(layer) for j, stack in enumerate(stacks) if j != i for layer in stack}
        names = sorted((module for module in modules if not is_expert(module)), key=natural_key)
        experts = [_experts(layer, others) for layer in sorted(layers, key=natural_key)]
        # A mapper renames only names that have a dot.
        found.append([*(name if "." in name else rf"re:(?:.*\.)?{re.escape(name)}$" for name in names), *experts])
    return found


def _within(layer: str) -> str:
    """Return the name of a MoE layer from its block on: what comes before, a model may call otherwise."""
    match = _BLOCKS.search(layer)
    return match[1] if match else layer


def _experts(layer: str, others: Collection[str]) -> str:
    """Return a pattern for all experts of a MoE layer; `others` are layers (`_within`) that it must not match."""
    name = _within(layer)
    start = re.escape(layer) if name in others else rf"(?:.*\.)?{re.escape(name)}"
    return rf"re:{start}\.\d+\..*"
