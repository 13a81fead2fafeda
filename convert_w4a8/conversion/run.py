"""The conversion itself: read a layer, quantize its scales, pack it, write it; several layers at a time."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import CARD, CONFIG, Checkpoint
from convert_w4a8.checkpoint.disk import check_destination, occupied
from convert_w4a8.checkpoint.journal import work_path
from convert_w4a8.checkpoint.safetensors_file import TORCH_DTYPES, Arena, TensorInfo, read_into
from convert_w4a8.checkpoint.writer import CheckpointWriter
from convert_w4a8.conversion.config import output_config
from convert_w4a8.conversion.fingerprint import fingerprint
from convert_w4a8.conversion.jobs import Job, run_jobs
from convert_w4a8.conversion.model_card import model_card
from convert_w4a8.conversion.plan import LayerPlan, Plan, TensorPlan, check_tensors
from convert_w4a8.conversion.result import LayerResult, Result
from convert_w4a8.encoding.dequantize import dequantize, output_blocks
from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import W4Linear
from convert_w4a8.quantization.layer import LayerStats, to_w4a8

_CHUNK_BYTES = 8 << 20
Progress = Callable[[int], None]
"""Called with the number of source bytes that are done with since the last call; from any thread."""


def check_paths(checkpoint: Checkpoint, out: Path, plan: Plan, *, overwrite: bool, resume: bool = False) -> None:
    """Check that the output can be written at `out`, without touching anything.

    Raises:
        ConvertError: `out` is taken, overlaps the input, or the disk is too full.

    """
    source, target = checkpoint.root.resolve(), out.resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ConvertError(str(out), "overlaps the input directory", "choose another output path")
    check_destination(out, overwrite=overwrite or resume)  # what may be resumed is known once it is locked
    existing = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(existing).free + occupied(work_path(target))  # what was interrupted is used or replaced
    if free < plan.disk_nbytes:
        raise ConvertError(
            str(out),
            f"needs {plan.disk_nbytes:,} bytes, the disk has {free:,} free",
            "free space or choose another disk",
        )


def convert(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    device: torch.device,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = lambda _nbytes: None,
) -> Result:
    """Carry out a plan. `out` appears whole, at the end, or not at all.

    resume: continue a conversion that was interrupted, if there is one; the output is the same, byte for byte.

    Raises:
        ConvertError, PlanError: the input, the output path, the options or the GPU's memory do not allow it.

    """
    started = time.perf_counter()
    check_paths(checkpoint, out, plan, overwrite=overwrite, resume=resume)
    check_tensors(checkpoint, plan)
    found = fingerprint(checkpoint, plan.options)
    with CheckpointWriter(out, plan.shards, fingerprint=found, overwrite=overwrite, resume=resume) as writer:
        work = _Work(checkpoint, plan, writer, device, progress)
        run_jobs(_jobs(work))
        layers = tuple(LayerResult(layer, _stats(writer.noted[layer.module])) for layer in plan.layers)
        for relative in checkpoint.side_files:
            writer.copy_file(checkpoint.root / relative, relative)
        writer.write_json(CONFIG, output_config(checkpoint, plan, layers))
        writer.write_text(CARD, model_card(checkpoint, plan, [layer.stats for layer in layers]))
        writer.commit()
    return Result(plan, layers, time.perf_counter() - started)


def _stats(note: Mapping[str, Any] | None) -> LayerStats | None:
    return None if note is None else LayerStats(**note)


@dataclass(frozen=True)
class _Work:
    """What every job of a conversion needs."""

    checkpoint: Checkpoint
    plan: Plan
    writer: CheckpointWriter
    device: torch.device
    progress: Progress
    arenas: list[Arena] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def arena(self) -> Iterator[Arena]:
        """Lend memory for a layer's tensors: the largest that is free, lest a large layer make another one grow."""
        with self.lock:
            self.arenas.sort(key=len)
            arena = self.arenas.pop() if self.arenas else Arena()
        try:
            yield arena
        finally:
            arena.clear()
            with self.lock:
                self.arenas.append(arena)


def _jobs(work: _Work) -> list[Job]:
    """List what is to be done, in the order of the output files, so that they finish one after the other."""
    specs = ((shard.file_name, spec.name) for shard in work.plan.shards for spec in shard.specs)
    places = {name: (place, file) for place, (file, name) in enumerate(specs)}
    jobs = []
    for layer in work.plan.layers:
        if all(work.writer.is_finished(spec.name) for spec in layer.outputs):
            work.progress(_source_nbytes(work, layer))
        else:
            place, file = min(places[spec.name] for spec in layer.outputs)
            jobs.append((place, Job(partial(_convert_layer, work, layer), _layer_memory(layer), file)))
    for tensor in work.plan.tensors:
        if work.writer.is_finished(tensor.output.name):
            work.progress(tensor.info.nbytes)
        else:
            place, file = places[tensor.output.name]
            jobs.append((place, Job(partial(_copy_tensor, work, tensor), 2 * _CHUNK_BYTES, file)))
    return [job for _, job in sorted(jobs, key=itemgetter(0))]


def _layer_memory(layer: LayerPlan) -> int:
    """Return the bytes that converting a layer takes at most: thrice its codes, read, chosen anew and joined."""
    n, k = layer.spec.out_features, layer.spec.in_features
    return n * k * 3 // 2


def _source_nbytes(work: _Work, layer: LayerPlan) -> int:
    return sum(work.checkpoint.tensors[name].nbytes for name in layer.spec.parts.values())


def _convert_layer(work: _Work, layer: LayerPlan) -> None:
    with work.arena() as arena:
        _convert_tensors(work, layer, work.plan.source.read_layer(replace(work.checkpoint, arena=arena), layer.spec))
    work.progress(_source_nbytes(work, layer))


def _convert_tensors(work: _Work, layer: LayerPlan, w: W4Linear) -> None:
    if layer.dequantize is not None:
        work.writer.note(layer.module, None)
        _write_dequantized(w, layer, work.writer)
    else:
        target = work.plan.target
        try:
            w4a8, stats = to_w4a8(_to(w, work.device), work.plan.options.scales, stock=target.STOCK)
            work.writer.note(layer.module, asdict(stats))
            for name, parts in target.encode(layer.module, w4a8).items():
                work.writer.write(name, parts)
        except torch.OutOfMemoryError as error:  # a GPU's; others work on it too
            raise ConvertError(
                layer.module, f"does not fit into the free memory of {work.device}", "use --device cpu"
            ) from error


def _to(w: W4Linear, device: torch.device) -> W4Linear:
    if device.type == "cpu":
        return w
    return W4Linear(
        packed=w.packed.to(device),
        packing=w.packing,
        scales=w.scales.to(device),
        zeros=None if w.zeros is None else w.zeros.to(device),
        g_idx=None if w.g_idx is None else w.g_idx.to(device),
        group_size=w.group_size,
    )


def _write_dequantized(w: W4Linear, layer: LayerPlan, writer: CheckpointWriter) -> None:
    (spec,) = layer.outputs
    n, k = w.shape_nk
    for start, stop in output_blocks(n, k):
        block = dequantize(w.outputs(start, stop)).bfloat16()
        writer.write_bytes(spec.name, block.flatten().view(torch.uint8).numpy().data, start * k * 2)
    writer.mark_written(spec.name)


def _copy_tensor(work: _Work, tensor: TensorPlan) -> None:
    """Copy a tensor in pieces, so that an embedding of gigabytes needs no gigabytes."""
    for offset in range(0, tensor.info.nbytes, _CHUNK_BYTES):
        piece = torch.empty(min(_CHUNK_BYTES, tensor.info.nbytes - offset), dtype=torch.uint8)
        read_into(tensor.info, piece, offset)
        _check_numbers(tensor.info, piece)
        if tensor.output.dtype != tensor.info.dtype:  # FP16 → BF16, two bytes each
            piece = piece.view(torch.float16).bfloat16().view(torch.uint8)
        work.writer.write_bytes(tensor.output.name, piece.numpy().data, offset)
    work.writer.mark_written(tensor.output.name)
    work.progress(tensor.info.nbytes)


def _check_numbers(info: TensorInfo, piece: torch.Tensor) -> None:
    """Raise ConvertError if some bytes of a tensor hold a NaN. A maximum is NaN then, and costs no time."""
    values = piece.view(TORCH_DTYPES[info.dtype])
    if values.is_floating_point() and values.itemsize > 1 and values.max().isnan():
        raise ConvertError(info.name, "holds NaN", "the checkpoint is damaged: download it again")
