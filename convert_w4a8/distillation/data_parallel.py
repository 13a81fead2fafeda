"""A training whose batches several processes share, each of which computes some samples of each.

Losses are weighted so that the sum over processes is the mean over the tokens that count of the whole batch, as on one
device. Here each process has the whole of both models, and gradients are added up: on a GPU with its own CUDA graphs,
which is the fastest way for models that fit. In `sharded` each has a part.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from convert_w4a8.distillation.data import Batch
from convert_w4a8.distillation.graphs import Passes
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.processes import Place
from convert_w4a8.distillation.state import StateDirectory
from convert_w4a8.distillation.student import Student
from convert_w4a8.distillation.teacher import Teacher
from convert_w4a8.distillation.train import Trainer


class DataParallelTrainer(Trainer):
    """A `Trainer` whose batches and measurements the processes share."""

    def __init__(self, student: Student, teacher: Teacher, options: DistillOptions, place: Place) -> None:
        super().__init__(student, teacher, options, place.device)
        self._place, self._rank = place, place.rank

    def divergences(self, batch: Batch) -> torch.Tensor:
        """Return the divergence at each token of the whole batch that counts, float32 [C], in every process."""
        part, tokens = part_of(batch, self._place.rank, self._place.ranks)
        values = super().divergences(part)
        found = values.new_zeros(int(batch.counts.sum()))
        found[tokens] = values[: tokens.stop - tokens.start]
        dist.all_reduce(found)
        return found

    def _losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this process's part of the loss of a batch, and the mean divergence of the whole batch."""
        part, share = self._part(batch)
        loss, found = super()._losses(part)
        found = found.detach() * share
        dist.all_reduce(found)
        return loss * share, found

    def _part(self, batch: Batch) -> tuple[Batch, float]:
        """See `Trainer`."""
        part, tokens = part_of(batch, self._place.rank, self._place.ranks)
        return part, (tokens.stop - tokens.start) / int(batch.counts.sum())


class ReplicatedTrainer(DataParallelTrainer):
    """One that has the whole of both models, as every other process."""

    def __init__(self, student: Student, teacher: Teacher, options: DistillOptions, place: Place) -> None:
        super().__init__(student, teacher, options, place)
        self._passes: Any = _Added(self._passes, [one.parameter for one in self.trained.values()])


class _Added:
    """Passes whose gradients are those of all processes together, in float32."""

    def __init__(self, passes: Passes, parameters: list[torch.Tensor]) -> None:
        self._passes, self._parameters = passes, parameters

    def forward(self, ids: torch.Tensor, *, counts: bool = True) -> torch.Tensor:
        """See `Passes`."""
        return self._passes.forward(ids, counts=counts)

    @torch.no_grad()
    def backward(self) -> None:
        """See `Passes`; then add up the gradients."""
        self._passes.backward()
        add_up([one.grad for one in self._parameters if one.grad is not None])


@torch.no_grad()
def add_up(gradients: Sequence[torch.Tensor]) -> None:
    """Put in place of each gradient the sum of those of all processes, which is made in float32."""
    if not gradients:
        return
    flat = torch.cat([gradient.flatten().float() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view(gradient.shape))


class ReplicatedState(StateDirectory):
    """The state of a training that is the same in all processes: the first one keeps it."""

    def __init__(self, out: Any, place: Place) -> None:
        super().__init__(out)
        self._place = place

    @property
    def is_kept_here(self) -> bool:
        """See `StateDirectory`."""
        return self._place.is_first

    def save(self, step: int, notes: Any, tensors: Any) -> None:
        """Keep a state, whole or not at all, and forget those before it."""
        if self.is_kept_here:
            super().save(step, notes, tensors)
        dist.barrier()


def part_of(batch: Batch, rank: int, ranks: int) -> tuple[Batch, slice]:
    """Return the samples of a batch that a process computes, and which of the batch's tokens that count are theirs.

    With fewer samples than processes some have none: they compute one, of which no tokens are theirs, since all have to
    take part when blocks are brought together or gradients added up.
    """
    start, end = (len(batch.ids) * number // ranks for number in (rank, rank + 1))
    first = int(batch.counts[:start].sum())
    tokens = slice(first, first + int(batch.counts[start:end].sum()))
    if start == end:
        start, end = 0, 1
    samples = batch.samples[start:end]
    longest = max(map(len, samples), default=batch.ids.shape[1])
    return Batch(batch.ids[start:end, :longest], batch.counts[start:end, :longest], samples), tokens
