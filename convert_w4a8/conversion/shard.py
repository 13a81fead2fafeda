"""The unit of a conversion: one file of the output, as plain data that can be sent to another process or machine."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.arena import Arenas
from convert_w4a8.checkpoint.checksum import Piece
from convert_w4a8.checkpoint.journal import Notes
from convert_w4a8.checkpoint.safetensors_file import TensorInfo, read_into, read_tensor
from convert_w4a8.checkpoint.shards import ShardPlan, ShardWriter
from convert_w4a8.conversion.jobs import Job, run_jobs
from convert_w4a8.conversion.layer import CHUNK_BYTES, Quantizer, convert_layer, copy_tensor, layer_memory
from convert_w4a8.conversion.memory import memory_errors
from convert_w4a8.conversion.plan import LayerPlan, Plan, TensorPlan
from convert_w4a8.errors import ConvertError
from convert_w4a8.options import Options
from convert_w4a8.version import __version__

Progress = Callable[[int], None]
"""Called with the number of source bytes that are done with since the last call; from any thread."""


@dataclass(frozen=True)
class ShardTask:
    """One file of the output and all that it is made of.

    layers: those of which at least one tensor lies in the file. tensors: those that are copied into it.
    inputs: size in bytes and time of change in ns of each file that is read, by path.
    """

    shard: ShardPlan
    layers: tuple[LayerPlan, ...]
    tensors: tuple[TensorPlan, ...]
    options: Options
    inputs: Mapping[str, tuple[int, int]]

    def fingerprint(self) -> str:
        """Return a digest of all that the file's bytes depend on; not of the device, since all give the same bytes."""
        value = {
            "version": __version__,
            "options": asdict(self.options),
            "specs": [(spec.name, spec.dtype, spec.shape) for spec in self.shard.specs],
            "layers": [_layer(layer) for layer in self.layers],
            "tensors": [_part(tensor.info) for tensor in self.tensors],
            "inputs": {Path(path).name: state for path, state in self.inputs.items()},
        }
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

    def notes_of(self, notes: Notes) -> Notes:
        """Return what became of the tensors of this file."""
        return notes.of((layer.module for layer in self.layers), (tensor.output.name for tensor in self.tensors))

    def check_inputs(self) -> None:
        """Raise ConvertError where a file is not what it was when the task was made, or is not to be seen from here."""
        for path, state in self.inputs.items():
            if _state(Path(path)) != tuple(state):
                raise ConvertError(path, "has changed since the conversion was planned, or is absent", "begin again")


@dataclass(frozen=True)
class ShardResult:
    """A file that is on the disk: the checksums of its pieces, and what became of its tensors."""

    file_name: str
    pieces: list[Piece]
    notes: Notes


def shard_tasks(plan: Plan) -> list[ShardTask]:
    """Cut a plan into one task for each file of the output."""
    states: dict[Path, tuple[int, int]] = {}
    layers = {spec.name: layer for layer in plan.layers for spec in layer.specs}
    tensors = {tensor.output.name: tensor for tensor in plan.tensors}
    tasks = []
    for shard in plan.shards:
        ours = {layers[spec.name].module: layers[spec.name] for spec in shard.specs if spec.name in layers}
        copied = tuple(tensors[spec.name] for spec in shard.specs if spec.name in tensors)
        paths = {part.path for layer in ours.values() for part in layer.spec.parts.values()}
        paths |= {tensor.info.path for tensor in copied}
        for path in paths:
            states.setdefault(path, _state(path))
        inputs = {str(path): states[path] for path in sorted(paths)}
        tasks.append(ShardTask(shard, tuple(ours.values()), copied, plan.options, inputs))
    return tasks


def convert_shard(
    task: ShardTask,
    directory: Path,
    device: torch.device,
    progress: Progress = lambda _nbytes: None,
    quantizer: Quantizer | None = None,
) -> ShardResult:
    """Carry out one task, by itself: write its file into a directory, and return when it is on the disk.

    quantizer: instead of the scales that the options ask for.

    Raises:
        ConvertError: the input is damaged or has changed, or the disk fails.

    """
    task.check_inputs()
    notes = Notes()
    with ThreadPoolExecutor(1, thread_name_prefix="flush") as flusher:
        flushes: list[Future[None]] = []
        writer = ShardWriter(directory, task.shard, lambda flush: flushes.append(flusher.submit(flush)))
        try:
            run_jobs(jobs_of([task], {task.shard.file_name: writer}, notes, device, progress, quantizer=quantizer))
            for flush in flushes:
                flush.result()
            return ShardResult(task.shard.file_name, writer.finish(), notes)
        finally:
            flusher.shutdown(cancel_futures=True)
            writer.close()


def jobs_of(
    tasks: Iterable[ShardTask],
    writers: Mapping[str, ShardWriter],
    notes: Notes,
    device: torch.device,
    progress: Progress,
    done: Callable[[ShardTask], None] = lambda _task: None,
    quantizer: Quantizer | None = None,
) -> Iterator[Job]:
    """Yield what is to be done for some tasks in this process, in the order of their files.

    A layer with tensors in several of the files is converted once. notes: what is found is put there before the last
    tensor is written that it is about. done: called with a task when the last tensor of its file is written.
    quantizer: instead of the scales that the options ask for.
    """
    arenas = Arenas()
    by_name = {task.shard.file_name: task for task in tasks}
    files = {spec.name: name for name, task in by_name.items() for spec in task.shard.specs}
    begun: set[str] = set()

    def write(name: str, parts: Iterable[torch.Tensor]) -> None:
        file = files.get(name)
        # A tensor of no file here lies in one that is finished, or is another process's.
        if file is not None and writers[file].write(name, parts):
            done(by_name[file])

    def run_layer(layer: LayerPlan, options: Options) -> None:
        with memory_errors(layer.module), arenas.lend() as arena:
            tensors, stats = convert_layer(layer, partial(read_tensor, arena=arena), options, device, quantizer)
            notes.layers[layer.module] = None if stats is None else asdict(stats)
            for name, parts in tensors.items():
                write(name, parts)
        progress(layer.spec.nbytes)

    def run_copy(tensor: TensorPlan) -> None:
        name = tensor.output.name
        write(name, copy_tensor(tensor, read_into, partial(notes.infinities.__setitem__, name)))
        progress(tensor.info.nbytes)

    for name, task in by_name.items():
        layers = {spec.name: layer for layer in task.layers for spec in layer.specs}
        tensors = {tensor.output.name: tensor for tensor in task.tensors}
        for spec in task.shard.specs:
            layer = layers.get(spec.name)
            if layer is None:
                yield Job(partial(run_copy, tensors[spec.name]), 2 * CHUNK_BYTES, name)
            elif layer.module not in begun:
                begun.add(layer.module)
                yield Job(partial(run_layer, layer, task.options), layer_memory(layer, quantizer), name)


def _layer(layer: LayerPlan) -> dict[str, Any]:
    """Describe a layer by all that decides how it is read and converted."""
    spec = {field.name: getattr(layer.spec, field.name) for field in fields(layer.spec) if field.name != "parts"}
    parts = {role: _part(info) for role, info in layer.spec.parts.items()}
    return {"module": layer.module, "dequantize": layer.dequantize, "spec": spec, "parts": parts}


def _part(info: TensorInfo) -> list[Any]:
    return [info.name, info.dtype, info.shape, info.path.name, info.start]


def _state(path: Path) -> tuple[int, int]:
    """Return size and time of change of a file; (−1, 0) where there is none."""
    try:
        status = path.stat()
    except OSError:
        return -1, 0
    return status.st_size, status.st_mtime_ns
