"""What the experts of a mixture compute on the LUT layout, in torch."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch.nn import functional

from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.kernels.gemm import reference

ACTIVATIONS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
}
"""What is applied to the gate, by vLLM's names."""


def activate(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """Return activation(gate) · up, all bfloat16, rounded after each of the two steps as vLLM's kernels do."""
    return (ACTIVATIONS[activation](gate.float()).bfloat16().float() * up.float()).bfloat16()


def experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: tuple[torch.Tensor, ...],
    down: tuple[torch.Tensor, ...],
    expert_map: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """Do what `grouped.experts` does, by the tables of all groups."""
    local = topk_ids.long()
    if expert_map is not None:
        local = torch.where(local < 0, -1, expert_map.long()[local])
    total = torch.zeros(x.shape, dtype=torch.float32)
    for choice in range(topk_ids.shape[1]):
        for expert in range(len(gate_up[0])):
            chosen = (local[:, choice] == expert).nonzero().flatten()
            if not len(chosen):
                continue
            first, second = (tuple(tensor[expert] for tensor in layer[:3]) for layer in (gate_up, down))
            gate, up = reference.gemm(*quantize_tokens(x[chosen]), *first).chunk(2, dim=-1)
            result = reference.gemm(*quantize_tokens(activate(gate, up, activation)), *second)
            total[chosen] += topk_weights[chosen, choice, None] * result.float()
    return total.bfloat16()
