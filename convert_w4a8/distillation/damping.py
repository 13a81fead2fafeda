"""Springs between trained values and what they are rounded to, which grow stiff as a training goes on.

Gradients that pass rounding as if it were not there draw a value to the place where it is rounded the other way, and
there it goes to and fro: oscillation (Nagel et al. 2022, "Overcoming oscillations in quantization-aware training"). A
value that lies nearer to one side stays there with a spring that is stiff enough, and the others make up for what it
is rounded to. Springs are loose at first, so that values go where the loss wants them. Entries of the preset `tables`
have others (`curvature`).
"""

import torch

from convert_w4a8.devices import training
from convert_w4a8.distillation.linear import LutLinear, Own
from convert_w4a8.distillation.tables import round_to_e4m3
from convert_w4a8.kernels.training.reference import MOST

EVERY = 4
"""Steps of training from one pull to the next, which is so much stronger."""
_AT_FIRST = 0.02
"""Of their final stiffness."""
_CELL = 1 / 3
"""How far neighbouring values of a table are apart, about, in root mean squares of a layer's weights."""


def stiffness(damping: float, done: float) -> float:
    """Return how stiff springs are: `damping` at the end of a training, exponentially less before.

    done: the part of the training that is done. The unit: a value that is one distance of E4M3 numbers, or one cell of
    a code, away is drawn as fast as Adam moves one whose gradient has always the same sign.
    """
    return damping * float(_AT_FIRST ** (1 - min(1.0, done)))


@torch.no_grad()
def pull(layer: LutLinear, entries: float, weights: float, own: Own = lambda part: part) -> None:
    """Draw entries towards the E4M3 numbers that they are rounded to, and latent weights to the values of their codes.

    layer: with latent weights. entries, weights: the part of the way; at most half. own: returns what this process has
    of a tensor of the layer.
    """
    assert layer.weight is not None
    start, step, trained = own(layer.start), own(layer.step), own(layer.entries)
    rounded = round_to_e4m3(start + trained * step)
    latent, base = own(layer.weight), own(layer.channel_scale)
    factor = layer.unit * base / (base * own(layer.scale).exp())  # as in `LutLinear.operand`
    _, values = training(latent.device).choose(latent, factor, rounded)
    latent.lerp_(values.float().div_(factor[:, None]), min(MOST, weights / _CELL))
    trained.lerp_((rounded - start).div_(step), min(MOST, entries))
