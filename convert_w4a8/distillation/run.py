"""Distilling a checkpoint: mix, training with held-out measurements, and the output."""

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.checkpoint.disk import real_path
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.conversion.destination import privacy
from convert_w4a8.conversion.fingerprint import check_unchanged, fingerprint
from convert_w4a8.conversion.memory import memory_errors
from convert_w4a8.devices import kind_of
from convert_w4a8.distillation.agreement import check_text
from convert_w4a8.distillation.data_parallel import ReplicatedState
from convert_w4a8.distillation.first_pass import check_stored, stored_teacher
from convert_w4a8.distillation.linear import LutLinear
from convert_w4a8.distillation.machine import deterministic
from convert_w4a8.distillation.mix import TrainingData
from convert_w4a8.distillation.options import TOP_K, DistillOptions, check_choices, rates_for
from convert_w4a8.distillation.output import plan_files, write_output
from convert_w4a8.distillation.paths import check_paths
from convert_w4a8.distillation.processes import Place, run_on_all
from convert_w4a8.distillation.recipe import record, section
from convert_w4a8.distillation.result import DistillResult
from convert_w4a8.distillation.sharded import BestValues, ShardedState, check_gpus, part_files
from convert_w4a8.distillation.state import StateDirectory
from convert_w4a8.distillation.stored import StoredTeacher, read_notes
from convert_w4a8.distillation.student import check_models, load_student
from convert_w4a8.distillation.training_run import Kept, ParallelRun, Run, ShardedRun
from convert_w4a8.errors import ConvertError, DiskError

_PARTS = "the models, their gradients and moments, and a batch"
_LESS_OF_TEACHER = "give fewer --batch-tokens or --max-length, or a --teacher-device of its own"
_LESS_OF_FIRST = "give fewer --batch-tokens or --max-length, or leave out --teacher-logits: --gpus spreads the teacher"
_LESS_OF_FIRST_WHOLE = f"{_LESS_OF_FIRST} where --replicate is left out too"
_LESS_OF_ALL = "give more --gpus, fewer --batch-tokens, a lower --max-length, or --recompute"
_LESS_OF_EACH = (
    "give fewer --batch-tokens, --max-length, --recompute, or leave out --replicate, and --embeddings with it"
)
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
    replicate: bool = False,
    teacher_logits: Path | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int, float], None] = lambda _step, _loss: None,
    storing: Callable[[int, int], None] = lambda _done, _of: None,
) -> DistillResult:
    """Train the W4A8 checkpoint `start` to predict as `teacher` does. `out` appears whole, at the end, or not at all.

    gpus: of this machine that share every batch, a process for each; of a CPU, how many processes. replicate: each has
    the whole of both models, not a part.
    teacher_logits: directory of the teacher's logits, the `top_k` highest of each token and the sum of the others, or
    all with 0; None: `TOP_K`. They are written there if they are not there yet; the teacher does not run beside the
    student then.
    progress: called with the number of each step and its divergence in nats per token. storing: called while logits are
    written, with how many tokens are done and of how many.

    Raises:
        ConvertError: the inputs, the output path or the memory do not allow it, or training did not help.
        ValueError: arguments that do not go together.

    """
    check_choices(
        gpus=gpus, replicate=replicate, teacher_device=teacher_device, teacher_logits=teacher_logits, top_k=top_k
    )
    top_k = TOP_K if top_k is None else top_k
    check_paths(start, teacher, out, overwrite=overwrite, resume=resume, teacher_logits=teacher_logits)
    check_models(start, teacher, blocks=options.hidden_weight > 0)
    check_text(start, teacher, (*data.samples, *data.held_out))
    check_gpus(start, gpus, device, embeddings=options.embeddings, replicate=replicate)
    stored: StoredTeacher | None = None
    teacher_on = teacher_device or device
    if teacher_logits is not None:
        check_stored(teacher_logits, top_k, options)
        less = _LESS_OF_TEACHER if gpus == 1 else _LESS_OF_FIRST_WHOLE if replicate else _LESS_OF_FIRST
        with memory_errors("the teacher", remedy=less, of_gpu=True), deterministic(teacher_on):
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
    described = partial(_fingerprint, start, teacher, options, data, device, predictions, gpus, replicate=replicate)
    before = described()
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
        kept = Kept(options.steps)
        layers: Iterable[tuple[str, LutLinear]]
        others: Mapping[str, torch.Tensor]
        try:
            if gpus > 1:
                job = _Job(start.root, teacher.root, data, options, teacher_logits, out, before, replicate)
                state.notes(before)  # what is not to be continued stays
                with _nothing_kept(state):
                    result = _train_on_all(job, gpus, device.type, progress, kept)
                if replicate:
                    layers, others = _best_whole(start, teacher, options, device, state.file(kept.last()))
                else:
                    best = BestValues(part_files(state.path, kept.last(), gpus))
                    layers, others = best.layers(start, options.preset, device), best.others(start)
            else:
                with memory_errors("the training", _PARTS, _LESS, of_gpu=True), deterministic(device, teacher_on):
                    run = Run(start, teacher, data, options, device, predictions, state, before, kept)
                    with _nothing_kept(state):
                        result = run.train(progress)
                layers, others = run.student.layers.items(), run.student.others | run.student.again
        except KeyboardInterrupt as error:
            kept.note(error)
            raise
        embeddings = [name for name, one in others.items() if one.dim() > 1]
        notes = record(options, data.digest(), result, gpus=gpus, replicate=replicate, embeddings=embeddings)
        write_output(writer, start, layers, others, notes, section(options, result))
        check_unchanged(
            before, _fingerprint(start, teacher, options, data, device, predictions, gpus, replicate=replicate)
        )
        writer.commit()
    state.remove()
    return result


@contextmanager
def _nothing_kept(state: StateDirectory) -> Iterator[None]:
    """Remove the state of a training that has come to nothing; after a failure of the system it stays."""
    try:
        yield
    except DiskError:
        raise
    except ConvertError:
        state.remove()
        raise


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
    replicate: bool


def _best_whole(
    start: Checkpoint, teacher: Checkpoint, options: DistillOptions, device: torch.device, file: Path
) -> tuple[Iterable[tuple[str, LutLinear]], Mapping[str, torch.Tensor]]:
    """Return the layers and other tensors of a training that is done, with the best values of its last state."""
    student = load_student(start, teacher, options.preset, device, options.towards, embeddings=options.embeddings)
    with safe_open(file, framework="pt") as tensors, torch.no_grad():
        for name, parameter in student.trained():
            parameter.copy_(tensors.get_tensor(f"best.{name}"))
    return student.layers.items(), student.others | student.again


def _train_on_all(job: _Job, gpus: int, kind: str, progress: Callable[[int, float], None], kept: Kept) -> DistillResult:
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
    out = real_path(job.out)
    state = ReplicatedState(out, place) if job.replicate else ShardedState(out, place)

    def tell(*message: Any) -> None:
        if place.is_first:
            place.tell(message)

    less = _LESS_OF_EACH if job.replicate else _LESS_OF_ALL
    with memory_errors("the training", _PARTS, less, of_gpu=True), deterministic(place.device):
        kept = Kept(job.options.steps)
        kind = ParallelRun if job.replicate else ShardedRun
        run = kind(start, teacher, job.data, job.options, place, predictions, state, job.fingerprint, kept)
        return run.train(tell)


def _fingerprint(
    start: Checkpoint,
    teacher: Checkpoint,
    options: DistillOptions,
    data: TrainingData,
    device: torch.device,
    predictions: StoredTeacher | torch.device,
    gpus: int = 1,
    *,
    replicate: bool = False,
) -> dict[str, Any]:
    """Describe a training by all that its output depends on, as JSON: also the kinds of device, which add otherwise.

    Every option is there, so that one which is not shows that another version of this package began a training.
    """
    found = fingerprint(start, options)
    found |= {f"teacher: {key}": value for key, value in fingerprint(teacher, options).items()}
    found |= {"--device": kind_of(device), "--gpus": gpus, "--replicate": replicate}
    if options.springs_of_curvature:
        found["--damping (of the curvature)"] = True
    stored = predictions if isinstance(predictions, StoredTeacher) else None
    found["--teacher-logits"] = None if stored is None else stored.digest
    found["--teacher-device"] = kind_of(predictions) if isinstance(predictions, torch.device) else None
    return found | {"rates": asdict(rates_for(options.preset, options.steps)), "data": data.digest()}
