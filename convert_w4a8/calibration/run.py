"""Quantizing a model: without data layer by layer, with data block by block.

Output, resumption and errors are those of a conversion (`conversion/run.py`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch

from convert_w4a8.calibration.matrix import quantizer
from convert_w4a8.calibration.model import Model
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.calibration.recipe import recipe
from convert_w4a8.calibration.spread import Spread, one_by_one
from convert_w4a8.calibration.states import batches
from convert_w4a8.calibration.walk import Walk
from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.journal import Notes
from convert_w4a8.checkpoint.names import block_of
from convert_w4a8.checkpoint.safetensors_file import TensorInfo, read_header, read_into, read_tensor
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.conversion import run
from convert_w4a8.conversion.layer import convert_layer, copy_tensor
from convert_w4a8.conversion.memory import check_memory, memory_errors
from convert_w4a8.conversion.plan import LayerPlan, Plan
from convert_w4a8.conversion.result import Result
from convert_w4a8.conversion.run import WriteShardsElsewhere, carry_out
from convert_w4a8.conversion.shard import Progress, ShardResult, ShardTask, convert_shard
from convert_w4a8.devices import kind_of
from convert_w4a8.linear import ServedLinear
from convert_w4a8.samples.sample import SampleSet

STATES_BYTES = 8 << 30
"""Hidden states that are held in memory, of all kinds together; what is beyond lies on the disk."""


def quantize(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    samples: SampleSet | None,
    *,
    device: torch.device,
    overwrite: bool = False,
    resume: bool = False,
    states_bytes: int = STATES_BYTES,
    progress: Progress = lambda _nbytes: None,
    write_shards: WriteShardsElsewhere | None = None,
    spread: Spread = one_by_one,
) -> Result:
    """Carry out a plan of `plan_quantization`. `out` appears whole, at the end, or not at all.

    samples: those whose digest is in the plan's options; None without data.
    write_shards: what writes files without data, by `quantize_shard`; this process if None.
    spread: what quantizes the matrices of a block with data.

    Raises:
        ConvertError, PlanError: the input, the output path, the options or the memory do not allow it.

    """
    options = plan.options
    assert isinstance(options, QuantizeOptions)

    def by_threads(tasks: Sequence[ShardTask], writer: CheckpointWriter) -> None:
        run.write_shards(tasks, writer, device, progress, quantizer(options))

    def write(tasks: Sequence[ShardTask], writer: CheckpointWriter) -> None:
        if samples is None:
            (write_shards or by_threads)(tasks, writer)
        else:
            _Run(checkpoint, plan, options, samples, writer, device, states_bytes, progress, spread).write(tasks)

    if write_shards is None:
        check_memory(plan)
    return carry_out(
        checkpoint,
        plan,
        out,
        device=device,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
        write=write,
        recipe=recipe(options, samples),
        kind_of_device=kind_of(device) if write_shards is None else write_shards.kind_of_device(),
    )


def quantize_shard(task: ShardTask, directory: Path, device: torch.device, progress: Progress) -> ShardResult:
    """Write one file of a quantization without data, by itself, as `convert_shard` does.

    Raises:
        ConvertError: the input is damaged or has changed, or the disk fails.

    """
    options = task.options
    assert isinstance(options, QuantizeOptions)
    return convert_shard(task, directory, device, progress, quantizer(options))


class _Run:
    """One run with data."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        options: QuantizeOptions,
        samples: SampleSet,
        writer: CheckpointWriter,
        device: torch.device,
        states_bytes: int,
        progress: Progress,
        spread: Spread,
    ) -> None:
        self._checkpoint, self._plan, self._options, self._samples = checkpoint, plan, options, samples
        self._writer, self._device, self._states_bytes, self._progress = writer, device, states_bytes, progress
        self._spread = spread

    def write(self, tasks: Sequence[ShardTask]) -> None:
        """Write all unfinished files: first those of no block, then block by block."""
        dtype = torch.float32 if self._device.type == "cpu" else torch.bfloat16
        with memory_errors("the model"):
            model = Model(self._checkpoint, self._device, dtype)
        model.check_length(max(self._samples.samples, key=len))
        by_block: dict[int, list[ShardTask]] = {}
        others = []
        for task in tasks:
            place = block_of(task.shard.specs[0].name) if task.shard.specs else None
            if place is not None and place[0] == model.above and place[1] < len(model.blocks):
                by_block.setdefault(place[1], []).append(task)
            else:
                others.append(task)
        self._redo_half_blocks(by_block.values())
        run.write_shards(others, self._writer, self._device, self._progress, quantizer(self._options))
        unfinished = set(self._writer.unfinished)
        last = max((n for n, ours in by_block.items() if any(_file(task) in unfinished for task in ours)), default=-1)
        if last < 0:
            return
        with self._writer.states() as directory:
            samples = batches(self._samples.samples)
            walk = Walk(model, samples, self._options, directory, self._states_bytes, self._spread)
            for number in range(last + 1):
                ours = by_block.get(number, [])
                with memory_errors(f"{model.above}.{number}"):
                    self._block(walk, number, ours, is_last=number == last)
                self._progress(sum(tensor.info.nbytes for task in ours for tensor in task.tensors))
                self._progress(sum(layer.spec.nbytes for layer in _layers(ours).values()))
        self._writer.wait()

    def _redo_half_blocks(self, blocks: Iterable[Sequence[ShardTask]]) -> None:
        """Let all files of a block be written in one run: what another device chose does not go with the rest."""
        unfinished = set(self._writer.unfinished)
        for tasks in blocks:
            files = {_file(task) for task in tasks}
            if files & unfinished:
                self._writer.redo(files - unfinished)

    def _block(self, walk: Walk, number: int, tasks: Sequence[ShardTask], *, is_last: bool) -> None:
        """Write the files of a block, or go through it where they are written."""
        layers = _layers(tasks)
        converted = [layer for layer in layers.values() if layer.dequantize is None]
        if not {_file(task) for task in tasks} & set(self._writer.unfinished):
            written = self._written(tasks)
            walk.pass_by(number, self._finished(written, converted), written)
            return
        writers = {_file(task): self._writer.shard_writer(_file(task)) for task in tasks}
        files = {spec.name: _file(task) for task in tasks for spec in task.shard.specs}
        notes = Notes()

        def write(tensors: Mapping[str, Iterable[torch.Tensor]]) -> None:
            for name, parts in tensors.items():
                writers[files[name]].write(name, parts)

        for done in walk.quantize(number, converted, is_last=is_last):
            notes.layers[done.layer.module] = {**asdict(done.stats), **done.notes}
            write(self._plan.target.encode(done.layer.module, done.w4a8))
        for layer in layers.values():
            if layer.module not in notes.layers:  # kept in 16 bits, or never called
                made = quantizer(self._options)
                tensors, stats = convert_layer(layer, read_tensor, self._options, self._device, made)
                notes.layers[layer.module] = None if stats is None else {**asdict(stats), "tokens": 0}
                write(walk.scaled(number, layer.spec.name, tensors) if stats is None else tensors)
        for task in tasks:
            for tensor in task.tensors:
                name = tensor.output.name
                parts = copy_tensor(tensor, read_into, partial(notes.infinities.__setitem__, name))
                write({name: walk.scaled_copy(number, tensor, parts)})
            self._writer.finish(writers[_file(task)], task.notes_of(notes))

    def _written(self, tasks: Sequence[ShardTask]) -> Checkpoint:
        """Return what is in files that are finished."""
        directory = self._writer.directory
        tensors: dict[str, TensorInfo] = {}
        for task in tasks:
            tensors |= read_header(directory / _file(task))[1]
        return replace(self._checkpoint, root=directory, tensors=tensors)

    def _finished(self, written: Checkpoint, layers: Iterable[LayerPlan]) -> dict[str, ServedLinear]:
        """Read layers back from files that are finished; by their names in the source."""
        return {layer.spec.name: self._plan.target.decode(written, layer.module, read_tensor) for layer in layers}


def _file(task: ShardTask) -> str:
    return task.shard.file_name


def _layers(tasks: Sequence[ShardTask]) -> dict[str, LayerPlan]:
    return {layer.module: layer for task in tasks for layer in task.layers}
