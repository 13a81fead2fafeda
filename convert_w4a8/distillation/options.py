"""What can be chosen about a training."""

import math
from dataclasses import asdict, dataclass

from convert_w4a8.distillation.linear import Preset


@dataclass(frozen=True)
class Rates:
    """Step sizes of Adam at their highest.

    entries: of table entries, in units of their spacing on the E4M3 grid. scale: of the logarithms of channel scales.
    other: of norms and biases, in units of their root mean square. weight, embedding: of latent weights, and of
    embeddings and lm_head, likewise.
    """

    entries: float
    scale: float
    other: float
    weight: float = 0.0
    embedding: float = 0.0


RATES = {
    Preset.TABLES: Rates(entries=0.011, scale=1e-4, other=2e-4, embedding=2e-4),
    Preset.WEIGHTS: Rates(entries=0.007, scale=1e-4, other=2e-4, weight=2.5e-3, embedding=8e-4),
}
"""Of a training of `_STEPS` steps; docs/explanation/distillation.md has what others do."""
_STEPS = 1000
_MOST = 2.0
"""Times `RATES` that a step may be, in a short training."""


def rates_for(preset: Preset, steps: int) -> Rates:
    """Return the rates for so many steps.

    What gradients have of noise moves a value by rate·√steps; how far it may go by that does not depend on the steps.
    """
    factor = min((_STEPS / steps) ** 0.5, _MOST)
    return Rates(**{name: rate * factor for name, rate in asdict(RATES[preset]).items()})


_LONG, _DAMPING = 2000, 0.5


def damping_for(steps: int) -> float:
    """Return how stiff springs are in a training of so many steps: they gain nothing in a short one."""
    return _DAMPING if steps > _LONG else 0.0


TOP_K = 64
"""Logits of each token that are stored of a teacher, if nothing else is said."""
_LEAST = {"steps": 1, "batch_tokens": 1, "every": 1, "patience": 0, "seed": 0, "warmup": 0, "hidden_weight": 0}


@dataclass(frozen=True)
class DistillOptions:
    """steps: of training, at most. batch_tokens: tokens of a step, with padding. rate: a factor of `rates_for`.

    warmup: the part of all steps in which the rates rise; then they fall to zero as a cosine does.
    every: steps between two measurements on held-out samples. patience: how many of these in a row may be no better
    before the training ends; 0: any number. recompute: compute blocks a second time in the backward pass instead of
    keeping what they computed. towards: where latent weights begin (`LutLinear`). hidden_weight: of the difference of
    the blocks' outputs in the loss (`hidden.difference_of_hidden`), beside the divergence, whose weight is 1.
    embeddings: train these and lm_head too. damping: how stiff the springs are that draw values to what they are
    rounded to: of the preset `tables` in units of the curvature, half-way (`curvature.stiffness`); else at the end
    (`damping.stiffness`). 0: there are none; None: `damping_for`.
    """

    preset: Preset = Preset.TABLES
    steps: int = 1000
    batch_tokens: int = 16384
    rate: float = 1.0
    warmup: float = 0.05
    every: int = 50
    patience: int = 0
    towards: float = 0.0
    recompute: bool = False
    seed: int = 0
    hidden_weight: float = 0.0
    embeddings: bool = False
    damping: float | None = None

    @property
    def springs_of_curvature(self) -> bool:
        """Whether springs are those of the curvature (`curvature`)."""
        return bool(self.damping) and self.preset is Preset.TABLES

    @property
    def springs(self) -> str:
        """Which springs there are, for people."""
        if not self.damping:
            return "none"
        return f"damping {self.damping:g}{', of the curvature' if self.springs_of_curvature else ''}"

    def __post_init__(self) -> None:
        """Take the preset as a string too.

        Raises ValueError for one that there is not, numbers that are none or too small, and what the preset has no
        use for.
        """
        object.__setattr__(self, "preset", Preset(self.preset))
        if self.damping is None:
            object.__setattr__(self, "damping", damping_for(self.steps))
        for name in ("rate", "warmup", "towards", "hidden_weight", "damping"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} is not a finite number")
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, not {least} or more")
        if not self.rate > 0:
            raise ValueError(f"rate is {self.rate}, not more than 0")
        if self.damping is not None and self.damping < 0:
            raise ValueError("damping is less than 0: springs would push values away")
        if self.towards and self.preset is not Preset.WEIGHTS:
            raise ValueError("towards goes with the preset weights: there are no latent weights to begin anywhere")


def check_choices(
    *,
    gpus: int = 1,
    replicate: bool = False,
    teacher_device: object = None,
    teacher_logits: object = None,
    top_k: int | None = None,
) -> None:
    """Raise ValueError where of choices that were made, beside `DistillOptions`, one would have no effect.

    teacher_device, teacher_logits, top_k: None where nothing was said.
    """
    if gpus < 1:
        raise ValueError(f"--gpus is {gpus}, not 1 or more")
    if replicate and gpus == 1:
        raise ValueError("--replicate goes with --gpus")
    if gpus > 1 and teacher_device is not None:
        raise ValueError("--teacher-device does not go with --gpus: the teacher is on all of them too")
    if top_k is not None and teacher_logits is None:
        raise ValueError("--top-k goes with --teacher-logits")
    if top_k is not None and top_k < 0:
        raise ValueError(f"--top-k is {top_k}, not 0 or more")
