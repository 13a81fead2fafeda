"""What training a layer computes beside matrix products, in torch, on any device.

Codes are unsigned, u = v + 8, uint8 [N, K]; entries are E4M3 numbers in float32 [N, G, 8], G = K/128.
"""

import torch

from convert_w4a8.fp8 import quantize_tokens, to_e4m3
from convert_w4a8.linear import GROUP_SIZE

_ZERO = 8
"""The code that is 0."""
LOGITS_AT_ONCE = 1 << 25
"""Logits in float32 at a time: 128 MiB, and some times that for what is computed from them."""

MOST = 0.5
"""Of its way to where it is drawn that a value goes at once."""
LEAST_ROOT = 1e-12
"""What is added to the root of a moment that something is divided by."""


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize bfloat16 [M, K] by token (`fp8.quantize_tokens`): float8_e4m3fn, the same in bfloat16, scales [M, 1]."""
    tokens, scale = quantize_tokens(x)
    return tokens, tokens.bfloat16(), scale


def widen(tokens: torch.Tensor) -> torch.Tensor:
    """Return numbers of float8_e4m3fn in bfloat16, which holds them exactly."""
    return tokens.bfloat16()


def scale_outputs(sums: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor) -> torch.Tensor:
    """Return bf16(s·(C·sums)), bfloat16 [M, N], of float32 [M, N]; scales float32 [M, 1] and [N]."""
    return (token_scale * (channel_scale * sums)).bfloat16()


def scale_gradients(
    gradient: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return bf16(gradient·C) and bf16(gradient·s) of bfloat16 [M, N]: what the other products are made of."""
    return (gradient * channel_scale).bfloat16(), (gradient * token_scale).bfloat16()


def by_code(entries: torch.Tensor) -> torch.Tensor:
    """Return what the 16 codes of each table mean, [N, G, 16]."""
    return torch.cat((entries, torch.zeros_like(entries[..., :1]), -entries[..., 1:].flip(-1)), dim=-1)


def look_up(entries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return entries by codes, bfloat16 [N, K], which holds E4M3 numbers exactly."""
    grouped = codes.view(*entries.shape[:2], GROUP_SIZE)
    return by_code(entries.bfloat16()).gather(-1, grouped.long()).flatten(1)


def choose(weights: torch.Tensor, factor: torch.Tensor, entries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the codes of the values nearest to weights·factor, and these values, bfloat16 [N, K].

    weights: float32 [N, K]. factor: float32 [N]. Of equal values the lowest code is taken for a weight that is none
    larger; ties go to the lower value.
    """
    levels, order = by_code(entries).sort(dim=-1, stable=True)
    middles = (levels[..., 1:] + levels[..., :-1]) / 2
    grouped = (weights * factor[:, None]).view(*entries.shape[:2], GROUP_SIZE)
    found = torch.searchsorted(middles.flatten(0, 1).contiguous(), grouped.flatten(0, 1).contiguous())
    found = found.view(grouped.shape)
    return order.gather(-1, found).to(torch.uint8).flatten(1), levels.gather(-1, found).bfloat16().flatten(1)


def sum_by_entry(gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the gradient of entries, float32 [N, G, 8], from that of looked-up weights, float32 [N, K].

    An entry is the sum of its weights, with their signs. No atomic additions: the same bytes from run to run on a GPU.
    """
    grouped = gradient.view(gradient.shape[0], -1, GROUP_SIZE)
    codes = codes.view(grouped.shape)
    sums = [torch.where(codes == code, grouped, 0.0).sum(-1) for code in range(2 * _ZERO) if code != _ZERO]
    negative, positive = sums[:_ZERO], sums[_ZERO:]
    # Entry j stands for the code j − 8, and from 1 on, with its sign changed, for 8 − j.
    return torch.stack([negative[0], *(negative[j] - positive[_ZERO - 1 - j] for j in range(1, _ZERO))], dim=-1)


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, *, with_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return Σ p·(log p − log q) of each token, float32 [T], of logits [T, V], and its gradient by the student's.

    The gradient, q − p, is in the student's dtype; it is computed some tokens at a time, so that no copies of all
    logits in float32 are.
    """
    step = max(1, LOGITS_AT_ONCE // student.shape[-1])
    values = [student.new_zeros(0, dtype=torch.float32)]
    gradient = torch.empty_like(student) if with_gradient else None
    for start in range(0, len(student), step):
        part = slice(start, start + step)
        ours, theirs = student[part].float().log_softmax(-1), teacher[part].float().log_softmax(-1)
        p = theirs.exp()
        values.append((p * (theirs - ours)).masked_fill_(p == 0, 0.0).sum(-1))  # the limit of p·log p, not 0·∞
        if gradient is not None:
            gradient[part] = ours.exp_().sub_(p)
    return torch.cat(values), gradient


def adam(
    value: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    rounded: torch.Tensor | None,
    numbers: torch.Tensor,
) -> None:
    """Take a step of Adam (Kingma and Ba, 2015), in place.

    value, first, second: float32. rounded: bfloat16, a copy of `value`, or None. numbers: float32 [5] on the device:
    the step's size, 1 − β₁, 1 − β₂, 1/√(1 − β₂ᵗ), ε; the size has 1/(1 − β₁ᵗ) in it.
    """
    size, of_first, of_second, correction, epsilon = numbers.unbind()
    gradient = gradient.float()
    first.add_((gradient - first) * of_first)
    second.add_((gradient.square() - second) * of_second)
    value.sub_(size * first / (second.sqrt() * correction + epsilon))
    if rounded is not None:
        rounded.copy_(value)


def pull(
    entries: torch.Tensor,
    start: torch.Tensor,
    step: torch.Tensor,
    known: torch.Tensor,
    second: torch.Tensor,
    part: float,
) -> None:
    """Draw entries towards the E4M3 numbers that they are rounded to, in place, a part known·part/√second of the way.

    All float32 of one shape. entries: r − `start` in units of `step`. At most `MOST` of the way.
    """
    rounded = to_e4m3(start + entries * step).float()
    way = (known * part).div_(second.sqrt().add_(LEAST_ROOT)).clamp_(max=MOST)
    entries.add_(rounded.sub_(start).div_(step).sub_(entries).mul_(way))
