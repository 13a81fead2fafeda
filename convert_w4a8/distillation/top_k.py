"""The divergence from a teacher of whose predictions only the likeliest tokens are known, and the rest as one.

With p of the teacher, q of the student, K the teacher's k likeliest tokens at a place, and p_R = Σ p, q_R = Σ q over
all others,

    D = Σ_{i in K} p_i·(log p_i − log q_i) + p_R·(log p_R − log q_R)

is the divergence of the two once all others are one token. It is never above KL(p ‖ q), by the log sum inequality
(Cover and Thomas, Elements of Information Theory, theorem 2.7.1), and equals it where the student shares out the rest
as the teacher does; with k = V always. No probability is renormalized, so D = 0 only where p_i = q_i for all of K.

Its gradient by the student's logits is q_i − p_i in K, and q_j − p_R·q_j/q_R elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from convert_w4a8.kernels.training.reference import LOGITS_AT_ONCE


@dataclass(frozen=True)
class TopK:
    """The teacher's predictions at C tokens.

    tokens: int64 [C, k], different ones. logits: [C, k], theirs. rest: float32 [C], the logarithm of the sum of the
    exponentials of all other logits, −∞ if there are none.
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    rest: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()

    @classmethod
    def of(cls, logits: torch.Tensor, k: int) -> "TopK":
        """Return what is known of logits [C, V] when the k likeliest are."""
        top = logits.topk(min(k, logits.shape[-1]), dim=-1)
        rest = [logits.new_zeros(0, dtype=torch.float32)]
        for part in _parts(logits):
            others = logits[part].float().scatter(-1, top.indices[part], -torch.inf)
            rest.append(others.logsumexp(-1))
        return cls(top.indices, top.values, torch.cat(rest))

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the divergence of each token in nats, float32 [C], of logits [C, V]; with a gradient."""
        found: torch.Tensor = _Divergence.apply(logits, self)  # type: ignore[no-untyped-call]
        return found

    def part(self, tokens: slice) -> "TopK":
        """Return that of some of the tokens."""
        return TopK(self.tokens[tokens], self.logits[tokens], self.rest[tokens])


class _Divergence(torch.autograd.Function):
    """The gradient is computed with the value, some tokens at a time, and held in the dtype of the logits."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: TopK) -> torch.Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        values = [student.new_zeros(0, dtype=torch.float32)]
        for part in _parts(student):
            value, by_logits = _value_and_gradient(student[part].float(), teacher.part(part), gradient is not None)
            values.append(value)
            if gradient is not None and by_logits is not None:
                gradient[part] = by_logits
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None].to(gradient.dtype), None


def _parts(logits: torch.Tensor) -> Iterator[slice]:
    """Yield the tokens of logits [C, V], as many at a time as there is room for in float32."""
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def _value_and_gradient(
    student: torch.Tensor,
    teacher: TopK,
    wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return D [C] of logits float32 [C, V], and its gradient [C, V] if that is wanted."""
    top = teacher.logits.float()
    theirs = torch.logaddexp(top.logsumexp(-1), teacher.rest)
    log_p, log_p_rest = top - theirs[:, None], teacher.rest - theirs
    total = student.logsumexp(-1)
    rest = student.scatter(-1, teacher.tokens, -torch.inf).logsumexp(-1)
    log_q = student.gather(-1, teacher.tokens) - total[:, None]
    p, p_rest = log_p.exp(), log_p_rest.exp()
    of_rest = torch.where(p_rest > 0, p_rest * (log_p_rest - (rest - total)), 0.0)
    value = (p * (log_p - log_q)).masked_fill_(p == 0, 0.0).sum(-1) + of_rest
    if not wanted:
        return value, None
    # Elsewhere p_R·q_j/q_R is p_R·exp(z_j − rest); where there is no elsewhere, all is written over.
    within = torch.where(p_rest > 0, log_p_rest - rest, -torch.inf)
    gradient = (student - total[:, None]).exp().sub_((student + within[:, None]).exp())
    return value, gradient.scatter_(-1, teacher.tokens, log_q.exp() - p)
