"""Distilling a checkpoint: mix, training with held-out measurements, and the output."""

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.checkpoint.disk import real_path
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.conversion.destination import privacy
from convert_w4a8.conversion.fingerprint import check_unchanged, fingerprint
from convert_w4a8.conversion.memory import memory_errors
from convert_w4a8.devices import kind_of
from convert_w4a8.distillation.first_pass import check_stored, stored_teacher
from convert_w4a8.distillation.hidden import check_blocks, sizes_of_blocks
from convert_w4a8.distillation.linear import LutLinear
from convert_w4a8.distillation.machine import deterministic
from convert_w4a8.distillation.mix import TrainingData, by_tag, mixed, shares
from convert_w4a8.distillation.options import TOP_K, DistillOptions, rates_for
from convert_w4a8.distillation.output import plan_files, write_output
from convert_w4a8.distillation.paths import check_paths
from convert_w4a8.distillation.processes import Place, run_on_all
from convert_w4a8.distillation.recipe import record, section
from convert_w4a8.distillation.result import DistillResult, Domain, Point
from convert_w4a8.distillation.sharded import (
    BestValues,
    ShardedState,
    ShardedStudent,
    ShardedTrainer,
    check_gpus,
    part_files,
    shard,
    shard_student,
)
from convert_w4a8.distillation.state import StateDirectory
from convert_w4a8.distillation.stored import StoredTeacher, read_notes
from convert_w4a8.distillation.student import (
    Student,
    check_models,
    check_vocabulary,
    load_student,
    load_teacher,
    vocabulary,
)
from convert_w4a8.distillation.teacher import LiveTeacher, Teacher
from convert_w4a8.distillation.train import Trainer, difference, mean
from convert_w4a8.errors import ConvertError, DiskError

_HOST = torch.device("cpu")
_SURE = 2.0
"""Standard errors by which the divergence of held-out samples has to fall, or nothing is written."""
_PARTS = "the models, their gradients and moments, and a batch"
_LESS_OF_TEACHER = "give fewer --batch-tokens or --max-length, or a --teacher-device of its own"
_LESS_OF_ALL = "give more --gpus, fewer --batch-tokens, a lower --max-length, or --recompute"
_LESS = "give fewer --batch-tokens, --max-length, --recompute, or a --teacher-device of its own"


def distill(
    start: Checkpoint,
    teacher: Checkpoint,
    data: TrainingData,
    out: Path,
    options: DistillOptions,
    *,
    device: torch.device,
    teacher_device: torch.device | None = None,
    gpus: int = 1,
    teacher_logits: Path | None = None,
    top_k: int = TOP_K,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int, float], None] = lambda _step, _loss: None,
    storing: Callable[[int, int], None] = lambda _done, _of: None,
) -> DistillResult:
    """Train the W4A8 checkpoint `start` to predict as `teacher` does. `out` appears whole, at the end, or not at all.

    gpus: over how many GPUs of this machine both models are spread, a process for each; of a CPU, how many processes.
    teacher_logits: directory of the teacher's logits, the `top_k` highest of each token and the sum of the others, or
    all with 0. They are written there if they are not there yet; the teacher does not run beside the student then.
    progress: called with the number of each step and its divergence in nats per token. storing: called while logits are
    written, with how many tokens are done and of how many.

    Raises:
        ConvertError: the inputs, the output path or the memory do not allow it, or training did not help.

    """
    check_paths(start, teacher, out, overwrite=overwrite, resume=resume, teacher_logits=teacher_logits)
    check_models(start, teacher, blocks=options.hidden_weight > 0)
    check_gpus(start, gpus, device, teacher_device)
    stored: StoredTeacher | None = None
    teacher_on = teacher_device or device
    if teacher_logits is not None:
        check_stored(teacher_logits, top_k, options)
        with memory_errors("the teacher", remedy=_LESS_OF_TEACHER, of_gpu=True), deterministic(teacher_on):
            samples = (*data.samples, *data.held_out)
            stored = stored_teacher(
                teacher,
                samples,
                teacher_logits,
                top_k,
                device=teacher_on,
                batch_tokens=options.batch_tokens,
                progress=storing,
            )
    predictions = stored or teacher_on
    before = _fingerprint(start, teacher, options, data, device, predictions, gpus)
    state = StateDirectory(real_path(out))
    plan = plan_files(start)
    with CheckpointWriter(
        out,
        plan,
        fingerprint=before,
        # Files are written at the end; those of an interrupted run, perhaps on another device, are not kept.
        fingerprints={shard.file_name: secrets.token_hex(8) for shard in plan},
        overwrite=overwrite,
        resume=resume,
        privacy=privacy(start),
    ) as writer:
        if not resume:
            state.remove()
        kept = _Kept(options.steps)
        layers: Iterable[tuple[str, LutLinear]]
        others: Mapping[str, torch.Tensor]
        try:
            if gpus > 1:
                job = _Job(start.root, teacher.root, data, options, teacher_logits, out, before)
                result = _train_on_all(job, gpus, device.type, progress, kept)
                best = BestValues(part_files(state.path, kept.last(), gpus))
                layers, others = best.layers(start, options.preset, device), best.others(start)
            else:
                with memory_errors("the training", _PARTS, _LESS, of_gpu=True), deterministic(device, teacher_on):
                    run = _Run(start, teacher, data, options, device, predictions, state, before, kept)
                    result = run.train(progress)
                layers, others = run.student.layers.items(), run.student.others
        except KeyboardInterrupt as error:
            kept.note(error)
            raise
        except DiskError:  # what was kept stays
            raise
        except ConvertError:
            state.remove()
            raise
        write_output(writer, start, layers, others, record(options, data.digest(), result), section(options, result))
        check_unchanged(before, _fingerprint(start, teacher, options, data, device, predictions, gpus))
        writer.commit()
    state.remove()
    return result


@dataclass
class _Kept:
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


@dataclass(frozen=True)
class _Job:
    """What each of several processes is told about a training."""

    start: Path
    teacher: Path
    data: TrainingData
    options: DistillOptions
    teacher_logits: Path | None
    out: Path
    fingerprint: Mapping[str, Any]


def _train_on_all(
    job: _Job, gpus: int, kind: str, progress: Callable[[int, float], None], kept: _Kept
) -> DistillResult:
    """Train in several processes, whose states lie beside the output then."""

    def hear(message: tuple[int, float | None]) -> None:
        step, loss = message
        if loss is None:
            kept.step = step
        else:
            progress(step, loss)

    if kind == "cuda":
        torch.cuda.empty_cache()  # of the pass over the teacher
    result: DistillResult = run_on_all(_train_part, (job,), gpus, kind, hear)
    return result


def _train_part(place: Place, job: _Job) -> DistillResult:
    """Be one of several processes of a training."""
    start, teacher = open_checkpoint(job.start), open_checkpoint(job.teacher)
    predictions: StoredTeacher | torch.device = place.device
    if job.teacher_logits is not None:
        notes = read_notes(job.teacher_logits)
        assert notes is not None  # `distill` has seen to that
        predictions = StoredTeacher(job.teacher_logits, notes)
    state = ShardedState(real_path(job.out), place)

    def tell(*message: Any) -> None:
        if place.is_first:
            place.tell(message)

    with memory_errors("the training", _PARTS, _LESS_OF_ALL, of_gpu=True), deterministic(place.device):
        kept = _Kept(job.options.steps)
        run = _ShardedRun(start, teacher, job.data, job.options, place, predictions, state, job.fingerprint, kept)
        return run.train(tell)


class _Run:
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
        kept: _Kept,
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
            tensors, notes = saved.tensors, saved.notes
            self._before, self._best = tensors["before"], tensors["best"]
            self._best_values = {
                name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")
            }
            self._curve = [Point(*point) for point in notes["curve"]]
            self._best_step, self._worse = notes["best_step"], notes["worse"]
            self._spent, self._tokens = notes["seconds"], notes["tokens"]
            self._trainer.restore(tensors, notes["step"])
            self._keep(notes["step"])
        tags = by_tag(data.held_out)
        self.drops = {tag: mean(self._before[numbers]) for tag, numbers in tags.items()}
        self.shares = self._shares()
        self._batch = mixed(data.samples, self.shares, options)

    def _load_student(self, start: Checkpoint, teacher: Checkpoint, device: torch.device) -> Student:
        return load_student(start, teacher, self._options.preset, device, self._options.towards)

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
        if not change < -_SURE * error:
            reason = f"changed by {change:+.5f} ± {error:.5f} nats per token at best, which is no gain for sure"
            raise ConvertError(
                "divergence of held-out samples",
                f"{reason}; nothing was written",
                "give more data, more --steps, more --held-out, or a lower --rate",
            )
        trainer.set_values(self._best_values)
        tags = by_tag(self._data.held_out)
        domains = tuple(
            Domain(tag, self.shares.get(tag, 0.0), self.drops[tag], mean(self._best[numbers]))
            for tag, numbers in tags.items()
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
        tensors = {"before": self._before, "best": self._best} | self._trainer.state()
        tensors |= {f"best.{name}": value for name, value in self._best_values.items()}
        self._state.save(step, notes, tensors)
        self._keep(step)


class _ShardedRun(_Run):
    """One training of several processes, in one of them. What they decide by is the same in all."""

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
        kept: _Kept,
    ) -> None:
        self._place = place
        super().__init__(start, teacher, data, options, place.device, predictions, state, fingerprint_, kept)

    # Models are loaded on the host, by one process after the other, so that it holds one of them at a time.

    def _load_student(self, start: Checkpoint, teacher: Checkpoint, device: torch.device) -> Student:  # noqa: ARG002
        def load() -> Student:
            return shard_student(super(_ShardedRun, self)._load_student(start, teacher, _HOST), self._place)

        student: Student = self._place.in_turn(load)
        return student

    def _load_teacher(self, teacher: Checkpoint, device: torch.device) -> nn.Module:  # noqa: ARG002
        model: nn.Module = self._place.in_turn(lambda: shard(load_teacher(teacher, _HOST), self._place))
        return model

    def _new_trainer(self, target: Teacher, device: torch.device) -> Trainer:  # noqa: ARG002
        assert isinstance(self.student, ShardedStudent)
        return ShardedTrainer(self.student, target, self._options, self._place)

    def _keep(self, step: int) -> None:
        super()._keep(step)
        if self._place.is_first:
            self._place.tell((step, None))


def _fingerprint(
    start: Checkpoint,
    teacher: Checkpoint,
    options: DistillOptions,
    data: TrainingData,
    device: torch.device,
    predictions: StoredTeacher | torch.device,
    gpus: int = 1,
) -> dict[str, Any]:
    """Describe a training by all that its output depends on, as JSON: also the kinds of device, which add otherwise."""
    found = fingerprint(start, options)
    found |= {f"teacher: {key}": value for key, value in fingerprint(teacher, options).items()}
    found["--device"] = kind_of(device)
    if gpus > 1:
        found["--gpus"] = gpus
    if isinstance(predictions, StoredTeacher):
        found["--teacher-logits"] = predictions.digest
    else:
        found["--teacher-device"] = kind_of(predictions)
    return found | {"rates": asdict(rates_for(options.preset, options.steps)), "data": data.digest()}
