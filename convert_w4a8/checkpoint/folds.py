"""Where a scale of a layer's input channels can go: into the norm or the linear layer that makes its inputs.

Weights times s and inputs over s give the same outputs. Places are known by the names of modules, as Llama and what
came after it have them. Names promise nothing: whoever scales has to see that the block's outputs stay what they were.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "qkv_proj", "q_a_proj", "kv_a_proj_with_mqa"})
_LINEAR_ATTENTION = "in_proj"
_MLP = frozenset({"gate_proj", "up_proj", "gate_up_proj", "w1", "w3", "gate", "router", "shared_expert_gate"})
_BEFORE_MLP = ("pre_feedforward_layernorm", "post_attention_layernorm")
_PAIRS = {"o_proj": "v_proj", "down_proj": "up_proj", "w2": "w3"}
"""A linear layer → the one beside it that its inputs are linear in."""

LEAST, MOST = 2.0**-8, 2.0**3
"""What the other side of scaled inputs is multiplied by: scales are from 1/8 to 256."""


@dataclass(frozen=True)
class Fold:
    """What makes inputs, and all linear layers that get them, by the names of modules.

    is_norm: whether a norm makes them; otherwise a linear layer does, in its output channels.
    """

    origin: str
    consumers: tuple[str, ...]
    is_norm: bool


def find_folds(block: str, modules: Collection[str]) -> list[Fold]:
    """Return the places of a decoder block, norms first.

    block: what the modules' names begin with, up to a dot; may be empty. modules: those that have a weight.
    """
    inside = {module.removeprefix(block): module for module in modules if module.startswith(block)}
    attention, mlp = [], []
    for name in sorted(inside):
        parts = name.split(".")
        if len(parts) < 2:
            continue
        if "attn" in parts[0] or "attention" in parts[0]:
            if len(parts) == 2 and (parts[1] in _ATTENTION or parts[1].startswith(_LINEAR_ATTENTION)):
                attention.append(inside[name])
        elif parts[-1] in _MLP:
            mlp.append(inside[name])
    found = []
    second = next((norm for norm in _BEFORE_MLP if norm in inside), None)
    first = [*attention, *(mlp if second is None else ())]
    # What chooses which tokens are attended to (DeepSeek's indexer) reads the norm as well.
    chooses = any("index" in part for name in inside for part in name.split(".")[1:])
    if "input_layernorm" in inside and first and not chooses:
        found.append(Fold(inside["input_layernorm"], tuple(first), is_norm=True))
    if second is not None and mlp:
        found.append(Fold(inside[second], tuple(mlp), is_norm=True))
    for name in sorted(inside):
        parent, _, leaf = name.rpartition(".")
        origin = inside.get(f"{parent}.{_PAIRS[leaf]}") if leaf in _PAIRS else None
        if origin is not None:
            found.append(Fold(origin, (inside[name],), is_norm=False))
    return found


def origin_channels(n: int, k: int, head_dim: int | None) -> torch.Tensor | None:
    """Return of which output channel of the origin, of N = n, each of k inputs is made, int64 [k]; None if unknown.

    Value heads of head_dim channels are repeated, each for as many query heads as follow one another.
    """
    if n == k:
        return torch.arange(k)
    if not head_dim or n % head_dim or k % n:
        return None
    channels = torch.arange(n).view(-1, 1, head_dim)
    return channels.expand(-1, k // n, -1).reshape(-1)


def powers_of_two(ratio: torch.Tensor) -> bool:
    """Whether all elements of a ratio are powers of two from LEAST to MOST."""
    mantissa, _ = torch.frexp(ratio)
    return bool((mantissa == 0.5).all() & (ratio >= LEAST).all() & (ratio <= MOST).all())
