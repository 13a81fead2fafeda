"""What the output tells vLLM not to take as quantized: names of modules, and patterns where names cannot say it.

vLLM compares its own module names with these entries. It renames the names as it renames tensors; it leaves patterns
alone. So a name is safest where vLLM's model has the checkpoint's modules, and a pattern is needed where it merges or
renames them by code.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from convert_w4a8.checkpoint.names import (
    find_stacked_mixtures,
    fusion_key,
    is_expert,
    linear_module,
    linear_modules,
    merged_names,
    mixture_of,
    natural_key,
    output_name,
    shards_of,
)
from convert_w4a8.checkpoint.safetensors_file import TensorSpec
from convert_w4a8.checkpoint.served_names import (
    PREFIX_PARTS,
    also_called,
    asked_names,
    expert_names,
    said_by_patterns,
    served_names,
)
from convert_w4a8.checkpoint.vllm_models import VllmModel
from convert_w4a8.errors import ConvertError, PlanError
from convert_w4a8.lut_format import PATTERN
from convert_w4a8.sources.patterns import Exclusion, find_exclusions, first_match

_SHARED = (
    frozenset({"blocks", "decoder", "encoder", "h", "layer", "layers", "model", "module", "transformer"}) | PREFIX_PARTS
)
"""Parts of names that different components of a model have: no component is told by them."""


def ignore_list(
    config: Mapping[str, Any],
    quantization_config: Mapping[str, Any],
    quantized: Collection[str],
    outputs: Iterable[TensorSpec],
    warnings: list[str],
) -> tuple[str, ...]:
    """Return the entries of the output's `ignore`: names in natural order, then patterns.

    config, quantization_config: the source's. quantized: the modules that are W4A8 or carried over in FP8, by their
    names in the output. outputs: the other tensors of the output. warnings: what the source excludes and the output
    cannot say is appended.
    """
    outputs = tuple(outputs)
    plain = {module for spec in outputs if (module := linear_module(spec)) and module not in quantized}
    stacked = find_stacked_mixtures((spec for spec in outputs if spec.dtype in ("BF16", "F32")), config)
    model = VllmModel.of(config)
    called = {*quantized, *also_called(model, quantized)}
    asked = asked_names(called)
    served = (*sorted(quantized), *sorted(served_names(called).difference(quantized)))  # the first match is shown
    components = find_components(plain, quantized)
    routers = _routers(plain, {*stacked, *filter(None, map(mixture_of, (*plain, *quantized)))})
    names = linear_modules(outputs) | _fused(plain) | _experts(plain, stacked, config)
    names |= set(routers.values())
    names = (names | also_called(model, names)) - asked
    # What the names may miss: vLLM's models have other modules there than the checkpoint.
    special = {module for module in plain if module in routers or any(root in components for root in _roots(module))}
    special |= {name for tensors in stacked.values() for name in tensors}
    patterns: dict[str, None] = {}
    for exclusion in find_exclusions(quantization_config):
        entry = _carried(exclusion, served, warnings)
        if entry is None:
            continue
        if not entry.startswith(PATTERN):
            # vLLM compares names of modules only: a class name has never excluded anything.
            names |= {output_name(entry, config)} if "." in entry else set()
        elif _adds(entry, special, _first_experts(plain - special)):
            patterns[entry] = None
    for name in sorted(said_by_patterns(model, names), key=natural_key):
        patterns[rf"{PATTERN}(?:.*\.)?{re.escape(name)}$"] = None
    for component in components.values():
        patterns[rf"{PATTERN}(?:.*\.)?{re.escape(component)}\."] = None
    return (*sorted(names, key=natural_key), *patterns)


def _fused(plain: Collection[str]) -> set[str]:
    """Return plain layers that vLLM merges, under names that their shards do not explain to it.

    Where shards are absent, such as a v_proj that is k_proj, and where not all models that merge them say so.
    """
    groups: dict[str, set[str]] = {}
    for module in plain:
        if len(shards_of(module)) > 1 and not is_expert(module):
            groups.setdefault(fusion_key(module), set()).add(module)
    found: set[str] = set()
    for name, modules in groups.items():
        shards = shards_of(next(iter(modules)))
        is_usual = name.endswith(("qkv_proj", "gate_up_proj")) and modules.issuperset(shards)
        if len(modules) > 1 and not is_usual:
            found.update((*merged_names(shards[0]), *shards))
    return found


def _experts(plain: Iterable[str], stacked: Iterable[str], config: Mapping[str, Any]) -> set[str]:
    """Return the names under which vLLM asks for plain experts whose tensors have others."""
    layers = {fusion_key(module) for module in plain if is_expert(module) and not module.endswith("_proj")}
    layers |= {f"{mixture}.experts" for mixture in stacked}
    # output_name knows modules, and an expert's projection is one.
    layers |= {output_name(f"{layer}.0.gate_proj", config).rsplit(".", 2)[0] for layer in layers}
    return {name for layer in layers for name in expert_names(layer)}


def _routers(plain: Iterable[str], mixtures: Collection[str]) -> dict[str, str]:
    """Return vLLM's names of the routers that are modules in modules in the checkpoint, such as `router.layer`."""
    found = {}
    for module in plain:
        mixture, _, router = module.rpartition(".")[0].rpartition(".")
        if mixture in mixtures and router in ("gate", "router"):
            found[module] = f"{mixture}.gate"
    return found


def _first_experts(modules: Iterable[str]) -> set[str]:
    """Return modules without the experts but the first of each layer, which stands for all."""
    return {module for module in modules if not is_expert(module) or ".experts.0." in module}


def _carried(exclusion: Exclusion, served: Collection[str], warnings: list[str]) -> str | None:
    """Return an entry that says what the source excludes; None and a warning if it would match what is quantized."""
    matched = None
    for entry in exclusion.entries:
        try:
            if not entry.startswith(PATTERN):
                matched = entry if entry in served else None
            else:
                matched = first_match(entry.removeprefix(PATTERN), served, exclusion.setting)
        except (ConvertError, PlanError) as error:
            warnings.append(f"{error}; what it excludes is listed by name only")
            return None
        if matched is None:
            return entry
    warnings.append(
        f"quantization_config: {exclusion.setting}: {exclusion.value!r} matches {matched} as well, which is quantized;"
        " what it excludes is listed by name only"
    )
    return None


def _adds(entry: str, special: Collection[str], ordinary: Collection[str]) -> bool:
    """Whether a pattern says more than names do: it matches what they may miss, or nothing that there is."""
    pattern = entry.removeprefix(PATTERN)
    return first_match(pattern, special, "ignore") is not None or first_match(pattern, ordinary, "ignore") is None


def find_components(plain: Iterable[str], converted: Collection[str]) -> dict[str, str]:
    """Return the parts of a model, such as a vision tower, in which nothing is quantized: module → its last part.

    Only such that the last part alone tells them, wherever vLLM puts them.
    """
    taken = {root for module in converted for root in _roots(module)}
    used = {part for name in asked_names(converted) for part in name.split(".")} | _SHARED
    found = {}
    for module in plain:
        root = next((root for root in _roots(module) if root not in taken and root != module), None)
        if root is not None and (part := root.rpartition(".")[2]) not in used:
            found[root] = part
    return dict(sorted(found.items()))


def _roots(module: str) -> Iterator[str]:
    """Yield the modules around a module, from the outside, as far as they are not numbered: `a`, `a.b` of `a.b.0.c`."""
    root = ""
    for part in module.split("."):
        if part.isdecimal():
            return
        root = f"{root}.{part}" if root else part
        yield root
