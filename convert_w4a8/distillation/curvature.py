"""How the divergence bends along each entry of the tables, and springs that are as stiff as that.

A gradient that passes rounding is that where an entry e is rounded to, not that where its own value r is. To first
order the gradient at r, with all others as they are rounded, is g + h·(r − e), h the second derivative of the
divergence: a spring between r and e, as stiff as h. With it r comes to rest where the divergence is least along this
entry, and is rounded to the better of the two numbers beside it; without, it is drawn to the edge between them and
goes to and fro.

h is the Gauss-Newton one: the divergence is that of two distributions, so h = B·E[ĝ²], ĝ the gradient of
−(1/B)·Σ log q(y) over B tokens, y drawn from the student's own q (Liu et al. 2023, "Sophia", algorithm 2).
"""

from collections.abc import Mapping

import numpy as np
import torch

from convert_w4a8.devices import training
from convert_w4a8.distillation.linear import LutLinear, Own
from convert_w4a8.kernels.training.reference import LOGITS_AT_ONCE

LOOK = 10
"""Steps of training from one look at the curvature to the next."""
_NEW = 0.01
"""The part of what is known that is new with each look, of the hundredth and later ones."""
_RATIO = 4.0
"""How much stiffer springs are at the end of a training than in its middle, and there than at its beginning."""
_LOOKS = "looks"


def stiffness(damping: float, done: float) -> float:
    """Return how stiff springs are in units of the curvature: `damping` in the middle, a quarter at first, 4 at last.

    done: the part of the training that is done. Loose springs let entries go; stiff ones keep noise from moving them.
    """
    return damping * float(_RATIO ** (2 * min(1.0, done) - 1))


@torch.no_grad()
def sampled(logits: torch.Tensor, *seed: int) -> torch.Tensor:
    """Return the gradient of −(1/B)·Σ log q(y) by logits [B, V], in their dtype, y drawn from q = softmax(logits).

    seed: numbers that are not negative, of which the first is that of the training; others give other draws.
    """
    first, *rest = seed
    (number,) = np.random.SeedSequence(first, spawn_key=rest).generate_state(1)
    chance = torch.Generator(logits.device)  # apart from those of CUDA graphs
    chance.manual_seed(int(number))  # 32 bits: all that torch takes on a CPU
    gradient = torch.empty_like(logits)
    rows = max(1, LOGITS_AT_ONCE // logits.shape[1])
    for part, to in zip(torch.split(logits, rows), torch.split(gradient, rows), strict=True):
        found = part.float().softmax(-1)
        # As torch.multinomial draws one, which raises where a number is none: the loss says that, in one line.
        token = (found / torch.empty_like(found).exponential_(generator=chance)).argmax(-1, keepdim=True)
        found.scatter_add_(1, token, torch.full_like(token, -1, dtype=found.dtype))
        to.copy_(found.div_(len(logits)))
    return gradient


class Curvature:
    """What is known of the curvature along the entries of each layer, and the springs.

    entries: trained entries of layers, float32 [N, G, 8], or this process's rows of them; as these is what is known.
    """

    def __init__(self, entries: Mapping[str, torch.Tensor]) -> None:
        self.known = {name: torch.zeros_like(values) for name, values in entries.items()}
        self._looks = dict.fromkeys(entries, 0)

    @torch.no_grad()
    def note(self, name: str, gradient: torch.Tensor, tokens: int) -> None:
        """Add a look at a layer to what is known of it: the mean of few looks, a moving one of many.

        gradient: ĝ by the entries. tokens: B. An expert without tokens in a batch has no look at that.
        """
        self._looks[name] += 1
        self.known[name].lerp_(gradient.square().mul_(tokens), max(1 / self._looks[name], _NEW))

    @torch.no_grad()
    def pull(self, name: str, layer: LutLinear, second: torch.Tensor, part: float, own: Own) -> None:
        """Draw the entries of a layer towards the E4M3 numbers that they are rounded to.

        second: Adam's moment, whose root it divides gradients by. part: of h/√second that is the part of the way: it
        has the rate, the stiffness and Adam's correction for the first steps. own: returns what this process has of a
        tensor of the layer.
        """
        entries, start, step = own(layer.entries), own(layer.start), own(layer.step)
        training(entries.device).pull(entries, start, step, self.known[name], second, part)

    def state(self) -> dict[str, torch.Tensor]:
        """Return copies of what is known and int64 [layers], how many looks that is of each, on the CPU."""
        looks = torch.tensor(list(self._looks.values()))
        return {_LOOKS: looks} | {f"curvature.{name}": known.cpu().clone() for name, known in self.known.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Know what a `state` says."""
        self._looks = dict(zip(self._looks, state[_LOOKS].tolist(), strict=True))
        for name, known in self.known.items():
            known.copy_(state[f"curvature.{name}"])
