"""The experts of a block as transformers 5 holds them: one tensor for each projection of all."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.functional import linear

from convert_w4a8.errors import ConvertError

Weights = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""The weights of an expert: gate and up [2·I, H], down [H, I], in the dtype that is computed in."""
Rounding = Callable[[torch.Tensor], torch.Tensor]
"""What happens to the inputs of a linear layer: rounding to FP8, or nothing."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a block."""
    return isinstance(getattr(module, "gate_up_proj", None), nn.Parameter) and hasattr(module, "_apply_gate")


def check_experts(name: str, module: nn.Module) -> None:
    """Raise ConvertError for experts that are laid out otherwise than here."""
    usual = (
        getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not getattr(module, "is_transposed", True)
        and not getattr(module, "has_bias", True)
        and not getattr(module, "has_post_expert_norm", False)
    )
    if not usual:
        raise ConvertError(
            name, "has experts with biases, or in another order, which calibration does not follow", "leave out --data"
        )


def stored_weights(module: nn.Module, dtype: torch.dtype) -> Weights:
    """Return the weights that a module holds."""
    return lambda expert: (module.gate_up_proj[expert].to(dtype), module.down_proj[expert].to(dtype))  # type: ignore[index]


def down_inputs(module: nn.Module, x: torch.Tensor, gate_up: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Return the inputs [M, I] of an expert's down projection for its inputs x [M, H]."""
    found: torch.Tensor = module._apply_gate(linear(rounding(x), gate_up))  # type: ignore[operator]  # noqa: SLF001
    return found


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


def run_experts(
    module: nn.Module, x: torch.Tensor, index: torch.Tensor, factors: torch.Tensor, weights: Weights, rounding: Rounding
) -> torch.Tensor:
    """Return what the experts make of x [M, H]: Σ factor · down(act(gate(x)) · up(x)) over each token's experts."""
    found = torch.zeros_like(x)
    for expert, tokens, choices in routed(index, module.num_experts):  # type: ignore[arg-type]
        gate_up, down = weights(expert)
        inner = down_inputs(module, x[tokens], gate_up, rounding)
        outer = linear(rounding(inner), down) * factors[tokens, choices, None]
        found.index_add_(0, tokens, outer.to(found.dtype))
    return found
