"""The architectures of the zoo, and what makes a tiny model of each load."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """A model type of transformers.

    settings: what replaces the sizes of `sizes`; a mapping goes into a configuration's part of that name.
    saved: keys that are put into the saved config.json.
    renames: (pattern, replacement) of tensors' names, where published checkpoints have others than transformers saves.
    split_experts: whether the tool that quantizes writes fused experts [E, K, N] as one layer each.
    """

    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    saved: Mapping[str, Any] = field(default_factory=dict)
    renames: tuple[tuple[str, str], ...] = ()
    split_experts: bool = False


_SIGLIP = (
    (r"vision_tower\.(embeddings|encoder|post_layernorm|pre_layrnorm|head)(?=\.)", r"vision_tower.vision_model.\1"),
)

_SPECIAL: dict[str, dict[str, Any]] = {
    "gemma3": {"renames": _SIGLIP},
    "llama4": {"split_experts": True},
}

_TYPES = """
llama qwen2 qwen3 gemma3_text gemma3 phi3 mixtral qwen3_moe deepseek_v3 llama4 granitemoehybrid glm4v gpt_neox falcon
"""

ARCHITECTURES: dict[str, Architecture] = {
    model_type: Architecture(model_type, **_SPECIAL.get(model_type, {})) for model_type in _TYPES.split()
}
