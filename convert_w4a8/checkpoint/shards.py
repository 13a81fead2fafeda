"""The files of an output: which tensors lie in which, and writing one, its tensors in any order, from any thread."""

import errno
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import torch

from convert_w4a8.checkpoint.checksum import Piece, checksum
from convert_w4a8.checkpoint.disk import disk_errors
from convert_w4a8.checkpoint.files import SINGLE_FILE
from convert_w4a8.checkpoint.safetensors_file import TORCH_DTYPES, TensorInfo, TensorSpec, layout_file

_COPY_BYTES = 16 << 20
_FLUSH_BYTES = 256 << 20
_HEADER_BYTES = 90_000_000
"""The longest header that is written; 100,000,000 bytes is the longest that the safetensors library reads."""
_ENTRY_BYTES = 128
"""What a tensor takes of a header beside its name: dtype, shape and offsets."""


@dataclass(frozen=True)
class ShardPlan:
    """One output file and the tensors it will hold."""

    file_name: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.specs)


def plan_shards(
    specs: Iterable[TensorSpec],
    max_shard_size: int,
    named: Mapping[str, str] = MappingProxyType({}),
    part_of: Callable[[str], Hashable] = lambda _name: None,
) -> tuple[ShardPlan, ...]:
    """Fill shards in the given order up to `max_shard_size` bytes; a larger tensor gets a shard of its own.

    A shard also ends where its header would be longer than the safetensors library reads.
    named: of tensors that go into another file, its name. part_of: a shard ends where this changes, too, from name to
    name.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled = header = 0
    part: Hashable = None
    others: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        if spec.name in named:
            others.setdefault(named[spec.name], []).append(spec)
            continue
        nbytes, entry = spec.nbytes, len(spec.name.encode()) + _ENTRY_BYTES
        before, part = part, part_of(spec.name)
        too_large = filled + nbytes > max_shard_size or header + entry > _HEADER_BYTES
        if groups[-1] and (too_large or part != before):
            groups.append([])
            filled = header = 0
        groups[-1].append(spec)
        filled += nbytes
        header += entry
    total = len(groups)
    names = [f"model-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)]
    shards = dict(zip([SINGLE_FILE] if total == 1 else names, groups, strict=True)) | others
    return tuple(ShardPlan(name, tuple(group)) for name, group in shards.items())


def _at_once(work: Callable[[], None]) -> None:
    work()


class ShardWriter:
    """Writes one file of an output. `write` may be called from several threads, in any order of tensors.

    in_background: runs what waits for the disk, beside the work; by default at once.
    """

    def __init__(
        self, directory: Path, plan: ShardPlan, in_background: Callable[[Callable[[], None]], None] = _at_once
    ) -> None:
        self.path = directory / plan.file_name
        self.pieces: list[Piece] = []
        """What was written where, and its checksums."""
        self._plan = plan
        self._pending = {spec.name for spec in plan.specs}
        self._in_background = in_background
        self._descriptor: int | None = None
        self._lock = threading.Lock()
        self._unflushed = 0
        self._is_lost = False

    @cached_property
    def _layout(self) -> tuple[bytes, Mapping[str, TensorInfo]]:
        """The leading bytes, and where each tensor goes: as long as the file is open, for there may be many."""
        return layout_file(self.path, self._plan.specs)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self._layout[0]) + self._plan.nbytes

    def write(self, name: str, parts: Iterable[torch.Tensor]) -> bool:
        """Write one tensor, in parts along its first dimension or flat ones; together they have the planned size.

        Returns whether it was the last one of the file.
        """
        info = self._layout[1][name]
        offset = 0
        for part in parts:
            if part.dtype != TORCH_DTYPES[info.dtype] or (part.dim() > 1 and part.shape[1:] != info.shape[1:]):
                raise ValueError(f"{name} is {part.dtype} {tuple(part.shape)}, planned {info.dtype} {info.shape}")
            flat = part.detach().cpu().contiguous().view(-1).view(torch.uint8)
            if offset + len(flat) > info.nbytes:
                raise ValueError(f"{name} is longer than planned {info.dtype} {info.shape}")
            self._write_at(flat.numpy().data, info.start + offset)
            offset += len(flat)
        if offset != info.nbytes:
            raise ValueError(f"{name} is shorter than planned {info.dtype} {info.shape}")
        with self._lock:
            self._pending.remove(name)
            return not self._pending

    def _write_at(self, data: memoryview, start: int) -> None:
        with disk_errors(self.path):
            with self._lock:
                descriptor = self._descriptor if self._descriptor is not None else self._create()
            self._put(descriptor, data, start)
        self._unflushed += len(data)  # threads may lose an addition to one another: a flush comes later then
        if self._unflushed >= _FLUSH_BYTES:
            self._unflushed = 0
            self._in_background(self._flush)

    def _create(self) -> int:
        """Create the file with its header and its final size, and return the descriptor."""
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._descriptor = descriptor
        self._put(descriptor, memoryview(self._layout[0]), 0)
        os.truncate(descriptor, self.size)
        return descriptor

    def _put(self, descriptor: int, data: memoryview, start: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(descriptor, data[done : done + _COPY_BYTES], start + done)
        self.pieces.append((start, len(data), checksum(data)))

    def _flush(self) -> None:
        with disk_errors(self.path):
            if self._descriptor is not None:
                try:
                    os.fdatasync(self._descriptor)
                except OSError:
                    self._is_lost = True  # Linux tells of a lost write once, and not whoever asks next
                    raise

    def finish(self) -> list[Piece]:
        """Wait until all of the file is on the disk, close it, and return the checksums of its pieces in order."""
        if self._pending:
            raise ValueError(f"never written: {sorted(self._pending)[:3]}")
        with disk_errors(self.path):
            if self._is_lost:
                raise OSError(errno.EIO, "some of it was lost before")
            if self._descriptor is None:  # a checkpoint without tensors
                self._create()
            assert self._descriptor is not None
            os.fsync(self._descriptor)
        self.close()
        pieces, self.pieces = sorted(self.pieces), []
        return pieces

    def close(self) -> None:
        """Close the file as it is."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
        vars(self).pop("_layout", None)
