"""The experts of a block as transformers 5 holds them: one tensor for each projection of all."""

from collections.abc import Iterator

import torch
from torch import nn


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a block."""
    return isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) and hasattr(module, "_apply_gate")


def is_usual(module: nn.Module) -> bool:
    """Whether experts are down(act(gate(x)) · up(x)), without biases, and their tensors [E, outputs, inputs]."""
    return bool(
        getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not getattr(module, "is_transposed", True)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "has_post_expert_norm", False)
    )


def routed(index: torch.Tensor, experts: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield (expert, its tokens, which of their choices it is) for index int64 [M, top k]."""
    order = index.flatten().argsort(stable=True)
    counts = torch.bincount(index.flatten(), minlength=experts).tolist()
    start = 0
    for expert, count in enumerate(counts[:experts]):
        slots = order[start : start + count]
        start += count
        if count:
            yield expert, slots // index.shape[1], slots % index.shape[1]
