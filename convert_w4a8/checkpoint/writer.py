"""Writing a checkpoint directory: whole or not at all, in bounded memory, tensors in any order, from any thread."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch

from convert_w4a8.checkpoint.checksum import Piece, checksum, is_intact
from convert_w4a8.checkpoint.directory import INDEX
from convert_w4a8.checkpoint.disk import check_destination, disk_errors, fsync, make_directory, replace_directory
from convert_w4a8.checkpoint.journal import REPLACED, Fingerprint, WorkDirectory, work_path
from convert_w4a8.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo, layout_file
from convert_w4a8.checkpoint.shards import ShardPlan
from convert_w4a8.errors import DiskError, W4A8Error

_COPY_BYTES = 16 << 20
_FLUSH_BYTES = 256 << 20


@dataclass
class _Shard:
    """A shard that is being written: its leading bytes, the tensors still to come, and what was written where."""

    path: Path
    head: bytes
    size: int
    pending: set[str]
    pieces: list[Piece] = field(default_factory=list)
    descriptor: int | None = None


class CheckpointWriter:
    """Writes shards and files into a work directory beside `out` (see resume.py), from which `commit` makes `out`.

    `write` may be called from several threads, in any order of tensors. Tensors in the order of the plan finish one
    shard after the other. A shard whose last tensor is written goes to the disk in the background, and is finished
    then. With `resume`, the finished shards of an interrupted conversion with the same fingerprint are kept; what is
    written to them again is ignored.

    Leaving the `with` block without `commit` removes the work directory, unless a shard is finished and the error may
    be gone next time: an interrupt, a full disk, no memory, but not a fault of the input. A note on the error says so.
    """

    def __init__(
        self,
        out: Path,
        shards: Sequence[ShardPlan],
        *,
        fingerprint: Fingerprint = MappingProxyType({}),
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self._out = out
        self._plans = shards
        self._fingerprint = fingerprint
        self._overwrite = overwrite
        self._resume = resume
        self._infos: dict[str, TensorInfo] = {}
        self._shards: dict[Path, _Shard] = {}
        self._lock = threading.Lock()
        self._background: list[Future[None]] = []
        self._unflushed = 0

    def __enter__(self) -> Self:
        check_destination(self._out, overwrite=self._overwrite or self._resume)
        self._out = self._out.resolve()
        with disk_errors(work_path(self._out)):
            make_directory(self._out.parent)
            self._work = WorkDirectory(self._out)
        self.directory = self._work.checkpoint
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        try:
            with disk_errors(self._work.path):
                self._work.begin(self._fingerprint, resume=self._resume, overwrite=self._overwrite)
                check_destination(self._out, overwrite=self._overwrite)
                self._lay_out()
        except BaseException as error:
            self._leave(error, keep=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave(error, keep=error is not None and not _is_final(error))

    def _leave(self, error: BaseException | None, *, keep: bool) -> None:
        """Stop. Remove the work directory, or keep it if it has finished shards."""
        self._flusher.shutdown(cancel_futures=not keep)
        for shard in self._shards.values():
            if shard.descriptor is not None:
                os.close(shard.descriptor)
        finished = len(self._work.files) if keep else 0
        if not finished:
            self._work.remove()
        elif error is not None and not _is_final(error):
            error.add_note(f"{finished} of {len(self._plans)} files are finished; --resume continues from there")
        self._work.close()

    def _lay_out(self) -> None:
        """Lay out every shard, keep those that were finished and are intact, and remove everything else."""
        for plan in self._plans:
            path = self.directory / plan.file_name
            head, infos = layout_file(path, plan.specs)
            self._infos.update(infos)
            self._shards[path] = _Shard(path, head, len(head) + plan.nbytes, set(infos))
        with ThreadPoolExecutor() as pool:
            intact = dict(zip(self._shards, pool.map(self._is_intact, self._shards.values()), strict=True))
        self._shards = {path: shard for path, shard in self._shards.items() if not intact[path]}
        self._work.files = {path.name: self._work.files[path.name] for path in intact if path not in self._shards}
        for path in self.directory.iterdir():
            if path.name not in self._work.files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for shard in list(self._shards.values()):
            if not shard.pending:  # a checkpoint without tensors
                self._finish(shard)

    def _is_intact(self, shard: _Shard) -> bool:
        pieces = self._work.files.get(shard.path.name)
        return pieces is not None and is_intact(shard.path, pieces, shard.size)

    @property
    def noted(self) -> Mapping[str, Any]:
        """What `note` said of layers, in the interrupted conversion and since."""
        return self._work.layers

    def note(self, module: str, value: Any) -> None:
        """Keep a JSON value about a layer with the shards; to be called before its last tensor is written."""
        with disk_errors(self._work.path):
            self._work.note_layer(module, value)

    def is_finished(self, name: str) -> bool:
        """Whether a tensor lies in a finished shard."""
        return self._infos[name].path not in self._shards

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> None:
        """Write one tensor, in parts along its first dimension; together they have the planned dtype and shape."""
        info = self._infos[name]
        offset = 0
        for part in parts:
            if part.dtype != TORCH_DTYPES[info.dtype] or part.shape[1:] != info.shape[1:]:
                raise ValueError(f"{name} is {part.dtype} {tuple(part.shape)}, planned {info.dtype} {info.shape}")
            flat = part.detach().cpu().contiguous().view(-1).view(torch.uint8)
            if offset + len(flat) > info.nbytes:
                raise ValueError(f"{name} is longer than planned {info.dtype} {info.shape}")
            self.write_bytes(name, flat.numpy().data, offset)
            offset += len(flat)
        if offset != info.nbytes:
            raise ValueError(f"{name} is shorter than planned {info.dtype} {info.shape}")
        self.mark_written(name)

    def write_bytes(self, name: str, data: memoryview, offset: int) -> None:
        """Write some of a tensor's bytes, `offset` bytes from its beginning; `mark_written` ends it."""
        info = self._infos[name]
        shard = self._shards.get(info.path)
        if shard is None:
            return
        with disk_errors(shard.path):
            with self._lock:
                descriptor = shard.descriptor if shard.descriptor is not None else _create(shard)
            _write(shard, descriptor, data, info.start + offset)
        self._unflushed += len(data)  # threads may lose an addition to one another: a flush comes later then
        if self._unflushed >= _FLUSH_BYTES:
            self._unflushed = 0
            self._in_background(partial(_flush, shard))

    def mark_written(self, name: str) -> None:
        """Declare a tensor that was written by `write_bytes` complete."""
        shard = self._shards.get(self._infos[name].path)
        if shard is None:
            return
        with self._lock:
            shard.pending.remove(name)
            is_last = not shard.pending
        if is_last:
            self._in_background(partial(self._finish, shard))

    def _in_background(self, run: Callable[[], None]) -> None:
        """Run something behind everything that was handed over before; raise what went wrong there meanwhile."""
        with self._lock:
            for future in self._background:
                if future.done():
                    future.result()
            self._background = [future for future in self._background if not future.done()]
            self._background.append(self._flusher.submit(run))

    def _finish(self, shard: _Shard) -> None:
        """Flush a shard, close it, and note it as finished."""
        with disk_errors(shard.path):
            descriptor = shard.descriptor if shard.descriptor is not None else _create(shard)
            os.fsync(descriptor)
            self._work.note_file(shard.path.name, shard.pieces)
            del self._shards[shard.path]
            os.close(descriptor)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file in the style of Hugging Face's tools."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in UTF-8, its line ends as they are."""
        path = self.directory / name
        with disk_errors(path):
            path.write_text(text, encoding="utf-8", newline="")
            fsync(path)

    def copy_file(self, source: Path, relative: Path) -> None:
        """Copy a side file byte for byte."""
        target = self.directory / relative
        with disk_errors(source, "copied"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            fsync(target)

    def commit(self) -> None:
        """Write the index, wait until everything is on the disk and make it appear as `out`."""
        pending = sorted(name for shard in list(self._shards.values()) for name in shard.pending)
        if pending:
            raise ValueError(f"never written: {pending[:3]}")
        for future in self._background:
            future.result()
        if len(self._plans) > 1:
            weight_map = {name: info.path.name for name, info in sorted(self._infos.items())}
            total = sum(info.nbytes for info in self._infos.values())
            self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        with disk_errors(self._out):
            for directory, _, _ in os.walk(self.directory):
                fsync(Path(directory))
            check_destination(self._out, overwrite=self._overwrite)
            replace_directory(self.directory, self._out, self._work.path / REPLACED)
            fsync(self._out.parent)


def _is_final(error: BaseException) -> bool:
    """Whether an error would come again: the input or the command line is at fault."""
    return isinstance(error, W4A8Error) and not isinstance(error, DiskError)


def _create(shard: _Shard) -> int:
    """Create a shard's file with its header and its final size, and return the descriptor."""
    descriptor = os.open(shard.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    shard.descriptor = descriptor
    _write(shard, descriptor, memoryview(shard.head), 0)
    os.truncate(descriptor, shard.size)
    return descriptor


def _write(shard: _Shard, descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + _COPY_BYTES], offset + done)
    shard.pieces.append((offset, len(data), checksum(data)))


def _flush(shard: _Shard) -> None:
    with disk_errors(shard.path):
        if shard.descriptor is not None:
            os.fdatasync(shard.descriptor)
