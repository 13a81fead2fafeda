"""What the student is to predict: targets for a batch, whoever computes them.

A target is of the C tokens of a batch whose predictions count, in the order of `batch.counts.flatten()`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from convert_w4a8.distillation.data import Batch
from convert_w4a8.distillation.graphs import Passes
from convert_w4a8.distillation.hidden import block_outputs
from convert_w4a8.distillation.loss import counted, divergence
from convert_w4a8.distillation.machine import upload
from convert_w4a8.distillation.student import logits_of, vocabulary


class Target(Protocol):
    """What is to be predicted at C tokens."""

    @property
    def hidden(self) -> tuple[torch.Tensor, ...]:
        """The outputs of the teacher's blocks, each [C, H]; empty unless they were asked for."""

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the divergence of each token in nats, float32 [C], of the student's logits [C, V], with a gradient."""


class Teacher(Protocol):
    """Gives targets."""

    vocabulary: int
    """How many tokens it predicts."""

    def target(self, batch: Batch, device: torch.device, *, hidden: bool = False) -> Target:
        """Return what is to be predicted at a batch's tokens that count, on a device. hidden: blocks' outputs too."""


@dataclass(frozen=True)
class Logits:
    """All logits of the teacher, bfloat16 [C, V]."""

    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()

    def divergence(self, logits: torch.Tensor) -> torch.Tensor:
        """Return KL(teacher ‖ student) over the whole vocabulary."""
        return divergence(logits, self.logits)


class LiveTeacher:
    """A model that runs beside the student, on a device of its own or the same."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.vocabulary = vocabulary(model)
        self._device = next(model.parameters()).device
        self._passes = Passes(model, (), self._device)

    @torch.no_grad()
    def target(self, batch: Batch, device: torch.device, *, hidden: bool = False) -> Logits:
        """Return all logits."""
        ids = upload(batch.ids, self._device)
        if not hidden:
            return Logits(counted(self._passes.forward(ids), batch.counts).to(device))
        with block_outputs(self.model) as outputs:
            logits = logits_of(self.model, ids)
        first, *rest = (counted(each, batch.counts).to(device) for each in (logits, *outputs))
        return Logits(first, tuple(rest))
