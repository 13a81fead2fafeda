"""How far the student's predictions are from the teacher's: KL(teacher ‖ student) at temperature 1, all logits."""

from typing import Any

import torch

from convert_w4a8.devices import training
from convert_w4a8.distillation.machine import upload


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return Σ p·(log p − log q) of each token in nats, float32 [T], of logits [T, V]; with a gradient to `student`.

    The gradient by the logits is q − p. It is computed with the value, and held in the student's dtype, so that no
    copies of all logits in float32 are.
    """
    found: torch.Tensor = _Divergence.apply(student, teacher)  # type: ignore[no-untyped-call]
    return found


def counted(logits: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the logits [C, V], or other outputs, of those tokens of [B, T, V] that count, bool [B, T] on the CPU.

    Where the counts are known on the host nothing waits for the device, and the gradient is gathered, not scattered:
    the same bytes from run to run.
    """
    rows = counts.flatten().nonzero()[:, 0]
    back = torch.full((counts.numel(),), -1)
    back[rows] = torch.arange(len(rows))
    found: torch.Tensor = _Counted.apply(  # type: ignore[no-untyped-call]
        logits.flatten(0, 1), upload(rows, logits.device), upload(back, logits.device)
    )
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        values, gradient = training(student.device).divergence(student, teacher, with_gradient=ctx.needs_input_grad[0])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, rows: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(back)
        return logits.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        found = upstream.index_select(0, back.clamp(min=0))
        return found.mul_((back >= 0)[:, None].to(found.dtype)), None, None
