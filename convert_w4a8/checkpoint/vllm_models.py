"""What vLLM's models do that names do not tell: tensors that their loaders change, layers that they call otherwise."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Touched:
    """Layers whose tensors a model's loader changes, by the last parts of their names, in formats that cannot bear it.

    without: parts of names of layers that only look alike.
    """

    architectures: frozenset[str]
    leaves: frozenset[str]
    formats: frozenset[str]
    reason: str
    without: frozenset[str] = frozenset()


_TOUCHED = (
    # Llama4ForCausalLM.permute_qk_weight_for_rotary takes dimension 0 of `weight`, `weight_packed` and `weight_scale`
    # to be N, and leaves all others alone. With [N, K/8] and [N, K/128] that is right.
    _Touched(
        architectures=frozenset({"Llama4ForCausalLM", "Llama4ForConditionalGeneration", "llama4", "llama4_text"}),
        leaves=frozenset({"q_proj", "k_proj"}),
        formats=frozenset({"lut"}),
        reason="vLLM's Llama 4 reorders its rows as it loads it, which only --format compressed-tensors can bear",
        without=frozenset({"vision_model"}),
    ),
)


_CALLED_OTHERWISE: tuple[tuple[frozenset[str], re.Pattern[str], str], ...] = (
    (
        frozenset({"granitemoehybrid", "falcon_h1", "jamba", "zamba2"}),
        re.compile(r"(?:\.mamba_decoder)?\.mamba(?=\.)"),
        ".mixer",
    ),
    (frozenset({"falcon_h1"}), re.compile(r"\.self_attn(?=\.)"), ""),
    (frozenset({"minimax_m2"}), re.compile(r"\.block_sparse_moe(?=\.)"), ".mlp"),
    (frozenset({"exaone"}), re.compile(r"^transformer(?=\.)"), "model"),
)
"""Model types whose layers have another name where vLLM asks whether they are quantized (`prefix`) than where it loads
them, which no mapper of vLLM's says."""


def also_called(models: Collection[str], modules: Iterable[str]) -> set[str]:
    """Return the other names under which vLLM's model asks for some modules; `models` is what `model_names` returns."""
    rules = [(pattern, new) for types, pattern, new in _CALLED_OTHERWISE if not types.isdisjoint(models)]
    return {other for module in modules for pattern, new in rules if (other := pattern.sub(new, module)) != module}


def model_names(config: Mapping[str, Any]) -> set[str]:
    """Return the architectures and model types that a configuration names, those of its parts too."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    found = {str(part["model_type"]) for part in parts if "model_type" in part}
    for part in parts:
        architectures = part.get("architectures")
        found.update(map(str, architectures) if isinstance(architectures, list) else ())
    return found


def touched_by_loader(models: Collection[str], module: str, output_format: str) -> str | None:
    """Return why a layer cannot be in a format: vLLM's model changes its tensors as it loads them. None if it can.

    models: architectures and model types of the checkpoint (`model_names`).
    """
    parts = module.split(".")
    for touched in _TOUCHED:
        if (
            output_format in touched.formats
            and parts[-1] in touched.leaves
            and not touched.architectures.isdisjoint(models)
            and touched.without.isdisjoint(parts)
        ):
            return touched.reason
    return None
