"""How the divergence bends along each entry of the tables, and springs that are as stiff as that.

A gradient that passes rounding is that where an entry e is rounded to, not that where its own value r is. To first
order the gradient at r, with all others as they are rounded, is g + h·(r − e), h the second derivative of the
divergence: a spring between r and e, as stiff as h. With it r comes to rest where the divergence is least along this
entry, and is rounded to the better of the two numbers beside it; without, it is drawn to the edge between them and
goes to and fro.

h is the Gauss-Newton one: the divergence is that of two distributions, so h = B·E[ĝ²], ĝ the gradient of
−(1/B)·Σ log q(y) over B tokens, y drawn from the student's own q (Liu et al. 2023, "Sophia", algorithm 2).
"""

import torch

from convert_w4a8.distillation.damping import MOST
from convert_w4a8.distillation.linear import LutLinear
from convert_w4a8.distillation.tables import round_to_e4m3
from convert_w4a8.kernels.training.reference import LOGITS_AT_ONCE

LOOK = 10
"""Steps of training from one look at the curvature to the next."""
_NEW = 0.01
"""The part of what is known that is new with each look, of the hundredth and later ones."""
_RATIO = 4.0
"""How much stiffer springs are at the end of a training than in its middle, and there than at its beginning."""
_LEAST = 1e-12


def stiffness(damping: float, done: float) -> float:
    """Return how stiff springs are in units of the curvature: `damping` in the middle, a quarter at first, 4 at last.

    done: the part of the training that is done. Loose springs let entries go; stiff ones keep noise from moving them.
    """
    return damping * float(_RATIO ** (2 * min(1.0, done) - 1))


@torch.no_grad()
def sampled(logits: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the gradient of −(1/B)·Σ log q(y) by logits [B, V], in their dtype, y drawn from q = softmax(logits)."""
    chance = torch.Generator(logits.device).manual_seed(seed % (1 << 64))  # apart from those of CUDA graphs
    gradient = torch.empty_like(logits)
    rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
    for part, to in zip(torch.split(logits, rows), torch.split(gradient, rows), strict=True):
        found = part.float().softmax(-1)
        # As torch.multinomial draws one, which raises where a number is none: the loss says that, in one line.
        token = (found / torch.empty_like(found).exponential_(generator=chance)).argmax(-1, keepdim=True)
        found.scatter_add_(1, token, torch.full_like(token, -1, dtype=found.dtype))
        to.copy_(found.div_(len(logits)))
    return gradient


@torch.no_grad()
def note(known: torch.Tensor, gradient: torch.Tensor, tokens: int, looks: int) -> None:
    """Add a look to the curvature that is known, float32 [N, G, 8]: the mean of few, a moving one of many.

    gradient: ĝ by the entries. tokens: B. looks: how many there were, this one included.
    """
    known.lerp_(gradient.square().mul_(tokens), max(1 / looks, _NEW))


@torch.no_grad()
def pull(layer: LutLinear, known: torch.Tensor, size: torch.Tensor, part: float) -> None:
    """Draw the entries of a layer towards the E4M3 numbers that they are rounded to.

    known: their curvature. size: what Adam divides gradients by, before `part`, which has the rate, stiffness and
    Adam's correction for the first steps.
    """
    nearest = (round_to_e4m3(layer.start + layer.entries * layer.step) - layer.start).div_(layer.step)
    layer.entries.lerp_(nearest, (known * part).div_(size + _LEAST).clamp_(max=MOST))
