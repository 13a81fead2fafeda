"""Experts that compute as the W4A8 kernel does, and that can be trained, in the place of transformers' experts."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from convert_w4a8.checkpoint.names import in_transformers
from convert_w4a8.distillation.linear import LutLinear
from convert_w4a8.errors import ConvertError
from convert_w4a8.experts import is_experts, is_usual, routed

_PARTS = ("gate_proj", "up_proj", "down_proj")
_STACKS = ("gate_up_proj", "down_proj")


class LutExperts(nn.Module):
    """Stands for the experts of a block: for each expert gate and up of I × H, down of H × I.

    Each token goes to its experts' layers, whose outputs are in BF16; their sum, weighted by the router, is in float32
    and rounded once, as vLLM's `moe_unpermute` does it.
    """

    def __init__(self, module: nn.Module, experts: list[dict[str, LutLinear]]) -> None:
        """Take the place of `module`, which loses its weights."""
        super().__init__()
        for stack in _STACKS:
            delattr(module, stack)
        self.act = module
        self.experts = nn.ModuleList(nn.ModuleDict(dict(parts)) for parts in experts)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return [M, H] for tokens [M, H], the experts of each and their weights [M, top k]."""
        found = torch.zeros_like(hidden_states, dtype=torch.float32)
        act: Any = self.act
        for number, tokens, choices in routed(top_k_index, len(self.experts)):
            expert: Any = self.experts[number]
            x = hidden_states[tokens]
            inner = act._apply_gate(torch.cat((expert["gate_proj"](x), expert["up_proj"](x)), dim=-1))  # noqa: SLF001
            outer = expert["down_proj"](inner).float() * top_k_weights[tokens, choices, None].float()
            found = found.index_add(0, tokens, outer)
        return found.to(hidden_states.dtype)


def place_experts(model: nn.Module, layers: Mapping[str, LutLinear]) -> set[str]:
    """Put layers that are projections of experts into a model of transformers; return their names.

    layers: by their names in the checkpoint.

    Raises:
        ConvertError: experts of a block are laid out otherwise, or not all of them are quantized.

    """
    stacks: dict[str, dict[int, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    for name in layers:
        above, _, part = in_transformers(name).rpartition(".")
        experts, _, number = above.rpartition(".")
        if part in _PARTS and number.isdecimal():
            stacks[experts][int(number)][part] = name
    placed: set[str] = set()
    for experts, names in stacks.items():
        above, _, leaf = experts.rpartition(".")
        try:
            module = model.get_submodule(experts)
        except AttributeError:
            continue
        if not is_experts(module):
            continue
        count: int = module.num_experts  # type: ignore[assignment]
        if not is_usual(module) or any(set(names[number]) != set(_PARTS) for number in range(count)):
            reason = "has experts with biases or in another order, or not all of them are quantized"
            raise ConvertError(experts, f"{reason}: that is not trained", "leave this model as it is")
        parts = [{part: layers[names[number][part]] for part in _PARTS} for number in range(count)]
        setattr(model.get_submodule(above), leaf, LutExperts(module, parts))
        placed |= {name for number in range(count) for name in names[number].values()}
    return placed
