"""Writing a checkpoint directory: whole or not at all, in bounded memory, tensors in any order, from any thread."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from convert_w4a8.checkpoint import INDEX, SINGLE_FILE
from convert_w4a8.errors import ConvertError
from convert_w4a8.safetensors_file import TORCH_DTYPES, TensorInfo, TensorSpec, layout_file

_COPY_BYTES = 16 << 20
_FLUSH_BYTES = 256 << 20


@dataclass(frozen=True)
class ShardPlan:
    """One output file and the tensors it will hold."""

    file_name: str
    specs: tuple[TensorSpec, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(spec.nbytes for spec in self.specs)


def plan_shards(specs: Iterable[TensorSpec], max_shard_size: int) -> tuple[ShardPlan, ...]:
    """Fill shards in the given order up to `max_shard_size` bytes; a larger tensor gets a shard of its own."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.nbytes
    if len(groups) == 1:
        return (ShardPlan(SINGLE_FILE, tuple(groups[0])),)
    total = len(groups)
    return tuple(
        ShardPlan(f"model-{number:05d}-of-{total:05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


class CheckpointWriter:
    """Writes shards and files into a temporary directory beside `out`, which `commit` renames to `out`.

    Leaving the `with` block without `commit` removes the temporary directory. `write` may be called from several
    threads, in any order of tensors. What is written goes to the disk in the background, so that `commit` finds
    little left to flush.
    """

    def __init__(self, out: Path, shards: Sequence[ShardPlan], *, overwrite: bool = False) -> None:
        self._out = out
        self._overwrite = overwrite
        self._shards = shards
        self._infos: dict[str, TensorInfo] = {}
        self._descriptors: dict[Path, int] = {}
        self._pending: set[str] = set()
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._unflushed = 0

    def __enter__(self) -> Self:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self.directory = Path(tempfile.mkdtemp(prefix=f".{self._out.name}.", suffix=".partial", dir=self._out.parent))
        try:
            for shard in self._shards:
                self._create(shard)
        except BaseException:
            self._discard()
            raise
        self._pending = set(self._infos)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._discard()

    def _create(self, shard: ShardPlan) -> None:
        path = self.directory / shard.file_name
        head, infos = layout_file(path, shard.specs)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._descriptors[path] = descriptor
        _write_all(descriptor, memoryview(head), 0)
        os.truncate(descriptor, len(head) + shard.nbytes)
        self._infos.update(infos)

    def _discard(self) -> None:
        """Close every file and remove the temporary directory, which is gone already after `commit`."""
        self._flusher.shutdown(cancel_futures=True)
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        shutil.rmtree(self.directory, ignore_errors=True)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, which must have the planned dtype and shape."""
        info = self._infos[name]
        if tensor.dtype != TORCH_DTYPES[info.dtype] or tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, planned {info.dtype} {info.shape}")
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        self.write_bytes(name, flat.numpy().data, 0)
        self._pending.discard(name)

    def write_bytes(self, name: str, data: memoryview, offset: int) -> None:
        """Write some of a tensor's bytes, `offset` bytes from its beginning; `mark_written` ends it."""
        info = self._infos[name]
        descriptor = self._descriptors[info.path]
        _write_all(descriptor, data, info.start + offset)
        self._unflushed += len(data)  # threads may lose an addition to one another: a flush comes later then
        if self._unflushed >= _FLUSH_BYTES:
            self._unflushed = 0
            self._flusher.submit(os.fdatasync, descriptor)

    def mark_written(self, name: str) -> None:
        """Declare a tensor that was written by `write_bytes` complete."""
        self._pending.discard(name)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file in the style of Hugging Face's tools."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """Write a text file in UTF-8, its line ends as they are."""
        path = self.directory / name
        path.write_text(text, encoding="utf-8", newline="")
        _fsync(path)

    def copy_file(self, source: Path, relative: Path) -> None:
        """Copy a side file byte for byte."""
        target = self.directory / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        _fsync(target)

    def commit(self) -> None:
        """Write the index, flush everything to the disk and make the directory appear as `out`."""
        if self._pending:
            raise ValueError(f"never written: {sorted(self._pending)[:3]}")
        if len(self._shards) > 1:
            weight_map = {name: info.path.name for name, info in sorted(self._infos.items())}
            total = sum(info.nbytes for info in self._infos.values())
            self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        self.directory.chmod(0o755)
        _fsync(self.directory)
        _replace_directory(self.directory, self._out, overwrite=self._overwrite)
        _fsync(self._out.parent)


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Check that `out` may be written: absent, an empty directory, or any directory with `overwrite`.

    Raises:
        ConvertError: it may not.

    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise ConvertError(str(out), "exists and is not a directory", "choose another output path")
    if out.is_dir() and not overwrite and any(out.iterdir()):
        raise ConvertError(str(out), "is not empty", "choose another path, or pass --overwrite to replace it")


def _replace_directory(new: Path, out: Path, *, overwrite: bool) -> None:
    check_destination(out, overwrite=overwrite)
    if not out.is_dir():
        new.rename(out)
        return
    # A directory cannot be replaced by rename unless it is empty: move the old one away first, then remove it.
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".replaced", dir=out.parent))
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done : done + _COPY_BYTES], offset + done)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
