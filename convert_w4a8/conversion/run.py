"""Carrying out a plan: several layers at a time, in this process."""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.disk import check_destination, occupied, real_path
from convert_w4a8.checkpoint.files import CARD, CONFIG
from convert_w4a8.checkpoint.journal import Notes, work_path
from convert_w4a8.checkpoint.places import check_name
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.conversion.advice import infinity_warnings
from convert_w4a8.conversion.config import output_config
from convert_w4a8.conversion.destination import check_replaceable, privacy
from convert_w4a8.conversion.fingerprint import check_unchanged, fingerprint
from convert_w4a8.conversion.jobs import run_jobs
from convert_w4a8.conversion.layer import Quantizer
from convert_w4a8.conversion.memory import check_memory
from convert_w4a8.conversion.model_card import model_card
from convert_w4a8.conversion.plan import LayerPlan, Plan, check_tensors
from convert_w4a8.conversion.result import LayerResult, Recipe, Result
from convert_w4a8.conversion.shard import Progress, ShardTask, jobs_of, shard_tasks
from convert_w4a8.errors import ConvertError
from convert_w4a8.quantization.layer import LayerStats

WriteShards = Callable[[Sequence[ShardTask], CheckpointWriter], None]
"""Writes the unfinished ones of some files of an output."""


class WriteShardsElsewhere(Protocol):
    """WriteShards on other machines."""

    def kind_of_device(self) -> str:
        """Return the kind of the devices that do the work, as `devices.kind_of` calls it."""

    def __call__(self, tasks: Sequence[ShardTask], writer: CheckpointWriter, /) -> None:
        """Write the unfinished ones of some files of an output."""


def check_paths(
    checkpoint: Checkpoint,
    out: Path,
    plan: Plan,
    *,
    overwrite: bool,
    resume: bool = False,
    before: Mapping[Path, int] = MappingProxyType({}),
    works_here: bool = True,
) -> None:
    """Check that the output can be written at `out`, without touching anything.

    before: other outputs that are to be written before this one, and the bytes that each will take.
    works_here: whether this process converts, so that its memory counts.

    Raises:
        ConvertError: `out` is taken, overlaps the input or another output, or the disk or the memory is too small.

    """
    for path in (checkpoint.root, out):
        check_name(path.absolute())
    try:
        source, target = checkpoint.root.resolve(), real_path(out)
    except OSError as error:
        raise ConvertError(str(out), "is or lies behind a link that leads nowhere", "choose another path") from error
    if source == target or source in target.parents or target in source.parents:
        raise ConvertError(str(out), "overlaps the input directory", "choose another output path")
    for other in map(real_path, before):
        if target == other or target in other.parents or other in target.parents:
            raise ConvertError(str(out), f"overlaps the output {other}", "choose another output path")
    here = Path.cwd()
    if target == here or target in here.parents:
        raise ConvertError(str(out), "is the working directory or above it", "choose another output path")
    check_destination(out, overwrite=overwrite or resume)  # what may be resumed is known once it is locked
    if overwrite:
        check_replaceable(out, checkpoint)
    existing = _existing(target)
    free = shutil.disk_usage(existing).free + occupied(work_path(target))  # what was interrupted is used or replaced
    if works_here:
        check_memory(plan)
    needed = plan.disk_nbytes + sum(
        nbytes for other, nbytes in before.items() if _on_one_disk(real_path(other), existing)
    )
    if free < needed:
        raise ConvertError(
            str(out),
            f"needs {needed:,} bytes{' with ' + str(next(iter(before))) if before else ''}, the disk has {free:,} free",
            "free space or choose another disk",
        )


def _existing(path: Path) -> Path:
    """Return the directory above a path that exists."""
    return next(parent for parent in path.parents if os.path.exists(parent))  # noqa: PTH110 - raises nothing


def _on_one_disk(path: Path, directory: Path) -> bool:
    return _existing(path).stat().st_dev == directory.stat().st_dev


def carry_out(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    device: torch.device,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda _nbytes: None,
    write: WriteShards | None = None,
    recipe: Recipe | None = None,
    kind_of_device: str | None = None,
) -> Result:
    """Carry out a plan. `out` appears whole, at the end, or not at all.

    resume: continue a conversion that was interrupted, if there is one; the output is the same, byte for byte.
    write: instead of `write_shards`. recipe: what to say of it. kind_of_device: as `fingerprint` has it.

    Raises:
        ConvertError, PlanError: the input, the output path, the options or the GPU's memory do not allow it.

    """
    started = time.perf_counter()
    check_paths(checkpoint, out, plan, overwrite=overwrite, resume=resume, works_here=write is None)
    check_tensors(plan)
    tasks = shard_tasks(plan)
    before = fingerprint(checkpoint, plan.options, kind_of_device)
    with CheckpointWriter(
        out,
        plan.shards,
        fingerprint=before,
        fingerprints={task.shard.file_name: task.fingerprint() for task in tasks},
        overwrite=overwrite,
        resume=resume,
        privacy=privacy(checkpoint),
    ) as writer:
        if write is None:
            write_shards(tasks, writer, device, progress)
        else:
            write(tasks, writer)
        noted = writer.layers
        layers = tuple(_result(layer, noted[layer.module]) for layer in plan.layers)
        warnings = infinity_warnings(writer.infinities)
        for relative in checkpoint.side_files:
            writer.copy_file(checkpoint.root / relative, relative)
        writer.write_json(CONFIG, output_config(checkpoint, plan, layers, recipe))
        writer.write_text(CARD, model_card(checkpoint, plan, [layer.stats for layer in layers], recipe))
        check_unchanged(before, fingerprint(checkpoint, plan.options, kind_of_device))
        writer.commit()
    return Result(plan, layers, time.perf_counter() - started, warnings)


def write_shards(
    tasks: Sequence[ShardTask],
    writer: CheckpointWriter,
    device: torch.device,
    progress: Progress,
    quantizer: Quantizer | None = None,
) -> None:
    """Write every unfinished file of some, with threads. quantizer: instead of the scales that the options ask for."""
    unfinished = set(writer.unfinished)
    wanted = [task for task in tasks if task.shard.file_name in unfinished]
    _count_finished(tasks, wanted, progress)
    writers = {task.shard.file_name: writer.shard_writer(task.shard.file_name) for task in wanted}
    notes = Notes()

    def done(task: ShardTask) -> None:
        writer.finish(writers[task.shard.file_name], task.notes_of(notes))

    for task in wanted:
        if not task.shard.specs:  # a checkpoint without tensors
            done(task)
    run_jobs(jobs_of(wanted, writers, notes, device, progress, done, quantizer))
    writer.wait()


def _count_finished(tasks: Sequence[ShardTask], wanted: Sequence[ShardTask], progress: Progress) -> None:
    """Tell the progress of what is finished already: layers, and copied tensors, that no wanted file has."""
    coming = {layer.module for task in wanted for layer in task.layers}
    finished = [task for task in tasks if task not in wanted]
    layers = {layer.module: layer.spec.nbytes for task in finished for layer in task.layers}
    progress(sum(nbytes for module, nbytes in layers.items() if module not in coming))
    progress(sum(tensor.info.nbytes for task in finished for tensor in task.tensors))


def _result(layer: LayerPlan, note: Any) -> LayerResult:
    """Return what was noted of a layer: the fields of `LayerStats`, and others."""
    if note is None:
        return LayerResult(layer, None)
    names = {field.name for field in fields(LayerStats)}
    others = {key: value for key, value in note.items() if key not in names}
    return LayerResult(layer, LayerStats(**{name: note[name] for name in names}), others)
