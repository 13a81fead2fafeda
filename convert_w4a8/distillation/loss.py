"""How far the student's predictions are from the teacher's: KL(teacher ‖ student) at temperature 1, all logits."""

from typing import Any

import torch

LOGITS_AT_ONCE = 1 << 25
"""Logits in float32 at a time: 128 MiB, and some times that for what is computed from them."""


def divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return Σ p·(log p − log q) of each token in nats, float32 [T], of logits [T, V]; with a gradient to `student`.

    The gradient by the logits is q − p. It is computed with the value, and held in the student's dtype, so that no
    copies of all logits in float32 are.
    """
    found: torch.Tensor = _Divergence.apply(student, teacher)  # type: ignore[no-untyped-call]
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        step = max(1, LOGITS_AT_ONCE // student.shape[-1])
        values = []
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        for start in range(0, len(student), step):
            part = slice(start, start + step)
            ours, theirs = student[part].float().log_softmax(-1), teacher[part].float().log_softmax(-1)
            p = theirs.exp()
            values.append((p * (theirs - ours)).sum(-1))
            if gradient is not None:
                gradient[part] = ours.exp_().sub_(p)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(values) if values else student.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None
