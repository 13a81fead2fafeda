"""One training from its first measurement to its last: on one device, or in one of several processes."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.distillation.data_parallel import ReplicatedTrainer
from convert_w4a8.distillation.hidden import check_blocks, sizes_of_blocks
from convert_w4a8.distillation.mix import TrainingData, by_tag, mixed, shares
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.processes import Place
from convert_w4a8.distillation.result import DistillResult, Domain, Point
from convert_w4a8.distillation.sharded import ShardedStudent, ShardedTrainer, shard, shard_student
from convert_w4a8.distillation.state import Saved, StateDirectory
from convert_w4a8.distillation.stored import StoredTeacher
from convert_w4a8.distillation.student import Student, check_vocabulary, load_student, load_teacher, vocabulary
from convert_w4a8.distillation.teacher import LiveTeacher, Teacher
from convert_w4a8.distillation.train import Trainer, difference, mean
from convert_w4a8.errors import ConvertError

_HOST = torch.device("cpu")
_SURE = 2.0
"""Standard errors by which the divergence of many held-out samples has to fall, or nothing is written; see `sure`."""


def sure(samples: int) -> float:
    """Return the standard errors, estimated from so many samples, that are as sure as `_SURE` known ones.

    The quantile of Student's t, by Fisher's expansion (Abramowitz and Stegun, 26.7.5).
    """
    if samples < 2:
        return math.inf
    z, n = _SURE, float(samples - 1)
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


@dataclass
class Kept:
    """The last step that is kept, as it is found out. steps: of the training."""

    steps: int
    step: int | None = None

    def note(self, error: KeyboardInterrupt) -> None:
        """Tell whoever interrupted."""
        if self.step is not None:
            error.add_note(f"step {self.step} of {self.steps} is kept; --resume continues from there")

    def last(self) -> int:
        """Return the step that a training which is done has kept."""
        assert self.step is not None
        return self.step


class Run:
    """One training."""

    def __init__(
        self,
        start: Checkpoint,
        teacher: Checkpoint,
        data: TrainingData,
        options: DistillOptions,
        device: torch.device,
        predictions: StoredTeacher | torch.device,
        state: StateDirectory,
        fingerprint_: Mapping[str, Any],
        kept: Kept,
    ) -> None:
        """Begin or continue. predictions: those of the teacher that are stored, or where it runs."""
        self._data, self._options, self._state, self._fingerprint = data, options, state, fingerprint_
        self._kept = kept
        saved = state.load(fingerprint_)
        self.student = self._load_student(start, teacher, device)
        self._top_k = 0
        if isinstance(predictions, StoredTeacher):
            target: Teacher = predictions
            self._top_k = predictions.top_k
        else:
            target = live = LiveTeacher(self._load_teacher(teacher, predictions))
            if options.hidden_weight:
                check_blocks(sizes_of_blocks(self.student.model), sizes_of_blocks(live.model))
        check_vocabulary(teacher, vocabulary(self.student.model), target.vocabulary)
        self._trainer = self._new_trainer(target, device)
        self._spent, self._tokens = 0.0, 0
        if saved is None:
            self._before = self._trainer.measure(data.held_out)
            self._curve = [Point(0, None, mean(self._before))]
            self._best, self._best_values = self._before.clone(), self._trainer.values()
            self._best_step = self._worse = 0
        else:
            with state.understood():
                self._continue(saved)
            self._keep(self._trainer.step)
        tags = by_tag(data.held_out)
        self.drops = {tag: mean(self._before[numbers]) for tag, numbers in tags.items()}
        self.shares = self._shares()
        self._batch = mixed(data.samples, self.shares, options)

    def _continue(self, saved: Saved) -> None:
        tensors, notes = saved.tensors, saved.notes
        self._before, self._best = tensors["before"], tensors["best"]
        self._best_values = {
            name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")
        }
        self._curve = [Point(*point) for point in notes["curve"]]
        self._best_step, self._worse = notes["best_step"], notes["worse"]
        self._spent, self._tokens = notes["seconds"], notes["tokens"]
        self._trainer.restore(tensors, notes["step"])

    def _load_student(self, start: Checkpoint, teacher: Checkpoint, device: torch.device) -> Student:
        options = self._options
        return load_student(start, teacher, options.preset, device, options.towards, embeddings=options.embeddings)

    def _load_teacher(self, teacher: Checkpoint, device: torch.device) -> nn.Module:
        return load_teacher(teacher, device)

    def _new_trainer(self, target: Teacher, device: torch.device) -> Trainer:
        return Trainer(self.student, target, self._options, device)

    def _keep(self, step: int) -> None:
        """Note that a step's state is on the disk."""
        self._kept.step = step

    def _shares(self) -> dict[str, float]:
        tags = list(by_tag(self._data.samples))
        if self._data.uniform:
            return {tag: 1 / len(tags) for tag in tags}
        drops = self.drops if self._data.drops is None else self._data.drops
        return shares({tag: drops[tag] for tag in tags})

    def _times(self) -> dict[str, float]:
        """Return how many times the text of each domain was trained on."""
        samples = self._data.samples
        return {
            tag: self._tokens * self.shares[tag] / sum(len(samples[number]) for number in numbers)
            for tag, numbers in by_tag(samples).items()
        }

    def train(self, progress: Callable[[int, float], None]) -> DistillResult:
        """Train to the end, leave the best values in the student, and return what came of it.

        Raises:
            ConvertError: no measurement was better than the first one.

        """
        options, trainer = self._options, self._trainer
        began = time.monotonic() - self._spent
        losses: list[float] = []
        while trainer.step < options.steps and not (options.patience and self._worse >= options.patience):
            batch = self._batch(trainer.step)
            loss = trainer.train(batch)
            if not math.isfinite(loss):
                reason = f"is {loss} at step {trainer.step}: the training does not converge"
                raise ConvertError("divergence", reason, "give a lower --rate")
            losses.append(loss)
            self._tokens += sum(map(len, batch.samples))
            progress(trainer.step, loss)
            if trainer.step % options.every == 0 or trainer.step == options.steps:
                self._measure(losses, time.monotonic() - began)
                losses = []
        seconds = time.monotonic() - began
        change, error = difference(self._best, self._before)
        if not change < -sure(len(self._best)) * error:
            reason = f"changed by {change:+.5f} ± {error:.5f} nats per token at best, which is no gain for sure"
            raise ConvertError(
                "divergence of held-out samples",
                f"{reason}; nothing was written",
                "give more data, more --steps, more --held-out, or a lower --rate",
            )
        trainer.set_values(self._best_values)
        domains = tuple(
            Domain(tag, self.shares.get(tag, 0.0), self.drops[tag], mean(self._best[numbers]))
            for tag, numbers in by_tag(self._data.held_out).items()
        )
        return DistillResult(
            curve=tuple(self._curve),
            best_step=self._best_step,
            before=mean(self._before),
            after=mean(self._best),
            change=change,
            change_error=error,
            domains=domains,
            tokens=self._tokens,
            seconds=seconds,
            top_k=self._top_k,
            times=self._times(),
        )

    def _measure(self, losses: list[float], seconds: float) -> None:
        """Measure on the held-out samples, and keep the state."""
        measured = self._trainer.measure(self._data.held_out)
        step = self._trainer.step
        self._curve.append(Point(step, sum(losses) / len(losses), mean(measured)))
        if mean(measured) < mean(self._best):
            self._best, self._best_values = measured, self._trainer.values()
            self._best_step, self._worse = step, 0
        else:
            self._worse += 1
        notes = {
            "fingerprint": dict(self._fingerprint),
            "curve": [[point.step, point.training, point.held_out] for point in self._curve],
            "best_step": self._best_step,
            "worse": self._worse,
            "seconds": seconds,
            "tokens": self._tokens,
        }
        tensors = {"before": self._before, "best": self._best}
        if self._state.is_kept_here:  # copies on the host, of which one is enough
            tensors |= self._trainer.state() | {f"best.{name}": value for name, value in self._best_values.items()}
        self._state.save(step, notes, tensors)
        self._keep(step)


class ParallelRun(Run):
    """One training of several processes, in one of them. What they decide by is the same in all.

    Each has the whole of both models.
    """

    def __init__(
        self,
        start: Checkpoint,
        teacher: Checkpoint,
        data: TrainingData,
        options: DistillOptions,
        place: Place,
        predictions: StoredTeacher | torch.device,
        state: StateDirectory,
        fingerprint_: Mapping[str, Any],
        kept: Kept,
    ) -> None:
        self._place = place
        super().__init__(start, teacher, data, options, place.device, predictions, state, fingerprint_, kept)

    def _new_trainer(self, target: Teacher, device: torch.device) -> Trainer:  # noqa: ARG002
        return ReplicatedTrainer(self.student, target, self._options, self._place)

    def _keep(self, step: int) -> None:
        super()._keep(step)
        if self._place.is_first:
            self._place.tell((step, None))


class ShardedRun(ParallelRun):
    """One where each process has a part of both models."""

    # Models are loaded on the host, by one process after the other, so that it holds one of them at a time.

    def _load_student(self, start: Checkpoint, teacher: Checkpoint, device: torch.device) -> Student:  # noqa: ARG002
        def load() -> Student:
            return shard_student(super(ShardedRun, self)._load_student(start, teacher, _HOST), self._place)

        student: Student = self._place.in_turn(load)
        return student

    def _load_teacher(self, teacher: Checkpoint, device: torch.device) -> nn.Module:  # noqa: ARG002
        model: nn.Module = self._place.in_turn(lambda: shard(load_teacher(teacher, _HOST), self._place))
        return model

    def _new_trainer(self, target: Teacher, device: torch.device) -> Trainer:  # noqa: ARG002
        assert isinstance(self.student, ShardedStudent)
        return ShardedTrainer(self.student, target, self._options, self._place)
