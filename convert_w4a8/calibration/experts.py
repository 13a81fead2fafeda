"""What calibration runs of the experts of a block, as transformers 5 holds them."""

from collections import OrderedDict
from collections.abc import Callable
from copy import copy

import torch
from torch import nn
from torch.nn.functional import linear

from convert_w4a8.errors import ConvertError
from convert_w4a8.experts import is_usual, routed

Weights = Callable[[int], tuple[torch.Tensor, torch.Tensor]]
"""The weights of an expert: gate and up [2·I, H], down [H, I], in the dtype that is computed in."""
Rounding = Callable[[torch.Tensor], torch.Tensor]
"""What happens to the inputs of a linear layer: rounding to FP8, or nothing."""


def check_experts(name: str, module: nn.Module) -> None:
    """Raise ConvertError for experts that are laid out otherwise than here."""
    if not is_usual(module):
        raise ConvertError(
            name, "has experts with biases, or in another order, which calibration does not follow", "leave out --data"
        )


def stored_weights(module: nn.Module, dtype: torch.dtype) -> Weights:
    """Return the weights that a module holds."""
    return lambda expert: (module.gate_up_proj[expert].to(dtype), module.down_proj[expert].to(dtype))  # type: ignore[index]


def without_weights(module: nn.Module) -> nn.Module:
    """Return what a module computes beside products with its weights, so that it can be sent elsewhere."""
    found = copy(module)
    vars(found).update(_parameters={}, _forward_pre_hooks=OrderedDict())
    vars(found).pop("forward", None)
    return found


def down_inputs(module: nn.Module, x: torch.Tensor, gate_up: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Return the inputs [M, I] of an expert's down projection for its inputs x [M, H]."""
    found: torch.Tensor = module._apply_gate(linear(rounding(x), gate_up))  # type: ignore[operator]  # noqa: SLF001
    return found


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
