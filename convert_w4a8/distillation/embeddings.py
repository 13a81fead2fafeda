"""Embeddings and lm_head, trained like norms: values in float32, used and written in BF16."""

from functools import partial
from typing import Any

import torch
from torch import nn

EMBEDDINGS = "--embeddings"
_AT_ONCE = 1 << 27
"""Numbers of the matrix that says which token is where."""


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the weights of embeddings and lm_head, the same where they are tied; make their gradient a product."""
    found: Any = model
    inputs, outputs = found.get_input_embeddings(), found.get_output_embeddings()
    if type(inputs) is nn.Embedding:  # one that does more, as Gemma's, keeps torch's own gradient
        found.get_input_embeddings().forward = partial(_look_up, inputs)
    weights: list[Any] = [module.weight for module in (inputs, outputs) if isinstance(module, nn.Embedding | nn.Linear)]
    return weights


def _look_up(module: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
    rows: torch.Tensor = _LookUp.apply(module.weight, ids)  # type: ignore[no-untyped-call]
    return rows


class _LookUp(torch.autograd.Function):
    """Rows by numbers. The gradient is a product, so its sums have a fixed order, and a CUDA graph can hold them."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(weight)
        return weight[ids]

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (ids,) = ctx.saved_tensors
        flat, upstream = ids.flatten(), gradient.flatten(0, -2)
        step = max(1, _AT_ONCE // max(1, len(flat)))
        parts = [
            (torch.arange(first, min(first + step, ctx.rows), device=ids.device)[:, None] == flat).to(upstream.dtype)
            @ upstream
            for first in range(0, ctx.rows, step)
        ]
        return torch.cat(parts), None
