"""What can be chosen about a training."""

from dataclasses import dataclass

from convert_w4a8.distillation.linear import Preset


@dataclass(frozen=True)
class Rates:
    """Step sizes of Adam at their highest.

    entries: of table entries, in units of their spacing on the E4M3 grid. scale: of the logarithms of channel scales.
    other: of norms and biases, in units of their root mean square. weight: of latent weights, likewise.
    """

    entries: float
    scale: float
    other: float
    weight: float = 0.0


RATES = {
    Preset.TABLES: Rates(entries=0.03, scale=3e-4, other=1e-3),
    Preset.WEIGHTS: Rates(entries=0.02, scale=3e-4, other=1e-3, weight=3e-3),
}
"""Near what was best in the sweep in docs/explanation/distillation.md."""


TOP_K = 64
"""Logits of each token that are stored of a teacher, if nothing else is said."""


@dataclass(frozen=True)
class DistillOptions:
    """steps: of training, at most. batch_tokens: tokens of a step, with padding. rate: a factor of `RATES`.

    warmup: the part of all steps in which the rates rise; then they fall to zero as a cosine does.
    every: steps between two measurements on held-out samples. patience: how many of these in a row may be no better
    before the training ends; 0: any number. recompute: compute blocks a second time in the backward pass instead of
    keeping what they computed. towards: where latent weights begin (`LutLinear`). hidden_weight: of the difference of
    the blocks' outputs in the loss (`hidden.difference_of_hidden`), beside the divergence, whose weight is 1.
    """

    preset: Preset = Preset.TABLES
    steps: int = 300
    batch_tokens: int = 8192
    rate: float = 1.0
    warmup: float = 0.05
    every: int = 25
    patience: int = 0
    towards: float = 0.0
    recompute: bool = False
    seed: int = 0
    hidden_weight: float = 0.0
