"""Embeddings and lm_head, trained like norms: values in float32, used and written in BF16."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.errors import ConvertError

OPTION = "--embeddings"
_AT_ONCE = 1 << 27
"""Numbers of the matrix that says which token is where."""


def trained_embeddings(model: nn.Module, checkpoint: Checkpoint) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield embeddings and lm_head, one parameter where they are tied, with their names in the checkpoint.

    Raises:
        ConvertError: neither is in BF16.

    """
    found: Any = model
    inputs, outputs = found.get_input_embeddings(), found.get_output_embeddings()
    ours = {id(module.weight) for module in (inputs, outputs) if isinstance(module, nn.Embedding | nn.Linear)}
    some = False
    for name, parameter in model.named_parameters():
        info = checkpoint.tensors.get(name)
        if id(parameter) in ours and info is not None and info.dtype == "BF16":
            some = True
            yield name, parameter
    if not some:
        reason = "has no embeddings in BF16 to train"
        raise ConvertError(str(checkpoint.root), reason, f"leave out {OPTION}")
    if type(inputs) is nn.Embedding:  # one that does more, as Gemma's, keeps torch's own gradient
        found.get_input_embeddings().forward = partial(_look_up, inputs)


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
