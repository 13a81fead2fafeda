"""Writing a checkpoint directory: whole or not at all, shard by shard, resumable."""

import json
import os
import shutil
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from safetensors import safe_open

from convert_w4a8.checkpoint.checksum import Piece, is_intact
from convert_w4a8.checkpoint.disk import check_destination, disk_errors, fsync, make_directory, replace_directory
from convert_w4a8.checkpoint.files import INDEX, needs_index
from convert_w4a8.checkpoint.journal import REPLACED, STATES, Fingerprint, FinishedFile, Notes, WorkDirectory, work_path
from convert_w4a8.checkpoint.shards import ShardPlan, ShardWriter
from convert_w4a8.errors import ConvertError, DiskError, W4A8Error


@dataclass(frozen=True)
class Privacy:
    """The most that the modes of directories, weights and other files may allow, as bits of `chmod`."""

    directories: int = 0o777
    weights: int = 0o777
    files: int = 0o777


class CheckpointWriter:
    """Writes shards and files into a work directory beside `out` (see journal.py), from which `commit` makes `out`.

    fingerprints: of what each shard's bytes depend on, by file name.

    The shards of `unfinished` are to be written, by ShardWriters of `shard_writer` or by others, and each handed to
    `finish`, which waits for the disk in the background, or to `note`. With `resume`, the finished shards of an
    interrupted conversion with the same fingerprints are kept.

    Leaving the `with` block without `commit` removes the work directory, unless a shard is finished and the error may
    be gone next time: an interrupt, a full disk, no memory, but not a fault of the input. A note on the error says so.
    """

    def __init__(
        self,
        out: Path,
        shards: Sequence[ShardPlan],
        *,
        fingerprint: Fingerprint = MappingProxyType({}),
        fingerprints: Mapping[str, str] = MappingProxyType({}),
        overwrite: bool = False,
        resume: bool = False,
        privacy: Privacy = Privacy(),
    ) -> None:
        self._out = out
        self._privacy = privacy
        self._plans = {plan.file_name: plan for plan in shards}
        self._fingerprint = fingerprint
        self._fingerprints = fingerprints
        self._overwrite = overwrite
        self._resume = resume
        self._writers: list[ShardWriter] = []
        self._lock = threading.Lock()
        self._background: list[Future[None]] = []
        self._needs_index = len(shards) > 1

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
                self._keep_what_is_intact()
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
        for writer in self._writers:
            writer.close()
        finished = len(self._work.files) if keep else 0
        if not finished:
            self._work.remove()
        elif error is not None and not _is_final(error):
            error.add_note(f"{finished} of {len(self._plans)} files are finished; --resume continues from there")
        self._work.close()

    def _keep_what_is_intact(self) -> None:
        """Keep the shards that were finished and are intact, and remove everything else."""
        with ThreadPoolExecutor() as pool:
            intact = dict(zip(self._plans, pool.map(self._is_intact, self._plans.values()), strict=True))
        self._work.files = {name: self._work.files[name] for name in self._plans if intact[name]}
        for path in self.directory.iterdir():
            if path.name not in self._work.files:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _is_intact(self, plan: ShardPlan) -> bool:
        finished = self._work.files.get(plan.file_name)
        if finished is None or finished.shard != self._fingerprints.get(plan.file_name, ""):
            return False
        writer = ShardWriter(self.directory, plan)
        return is_intact(writer.path, finished.pieces, writer.size)

    @property
    def unfinished(self) -> list[str]:
        """The files that are still to be written, in the order of the plan."""
        return [name for name in self._plans if name not in self._work.files]

    def redo(self, names: Collection[str]) -> None:
        """Remove finished files of an interrupted conversion: they are to be written anew."""
        for name in names:
            path = self.directory / name
            with disk_errors(path):
                path.unlink()
            del self._work.files[name]

    @contextmanager
    def states(self) -> Iterator[Path]:
        """Return a directory for what this process keeps on the disk while it runs; it is removed at the end."""
        path = self._work.path / STATES
        with disk_errors(path):
            shutil.rmtree(path, ignore_errors=True)  # of a process that was killed
            path.mkdir(exist_ok=True)  # its workers may still write there
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @property
    def layers(self) -> Mapping[str, Any]:
        """What was noted of the layers of finished shards, in the interrupted conversion and since."""
        return {name: note for finished in self._work.files.values() for name, note in finished.notes.layers.items()}

    @property
    def infinities(self) -> Mapping[str, int]:
        """How many infinities were noted of copied tensors of finished shards, where there are any."""
        files = self._work.files.values()
        return {name: count for finished in files for name, count in finished.notes.infinities.items()}

    def shard_writer(self, file_name: str) -> ShardWriter:
        """Return a writer of one shard in this process."""
        writer = ShardWriter(self.directory, self._plans[file_name], self._in_background)
        self._writers.append(writer)
        return writer

    def finish(self, writer: ShardWriter, notes: Notes) -> None:
        """Finish a shard in the background, when all of it is on the disk."""
        self._in_background(lambda: self.note(writer.path.name, writer.finish(), notes))

    def note(self, file_name: str, pieces: list[Piece], notes: Notes) -> None:
        """Note a shard that another process has written into `directory`, and whose bytes are on the disk.

        pieces: what it wrote where, with checksums, in order.
        """
        with disk_errors(self.directory / file_name):
            self._work.note_file(file_name, FinishedFile(self._fingerprints.get(file_name, ""), pieces, notes))

    def note_later(self, file_name: str, pieces: list[Piece], notes: Notes) -> None:
        """Note a shard as `note` does, in the background: nothing that interrupts this thread comes in between."""
        self._in_background(lambda: self.note(file_name, pieces, notes))

    def _in_background(self, run: Callable[[], None]) -> None:
        """Run something behind everything that was handed over before; raise what went wrong there meanwhile."""
        with self._lock:
            for future in self._background:
                if future.done():
                    future.result()
            self._background = [future for future in self._background if not future.done()]
            self._background.append(self._flusher.submit(run))

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
        self._needs_index |= needs_index(relative)
        target = self.directory / relative
        with disk_errors(source, "copied"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            _restrict(target, stat.S_IMODE(source.stat().st_mode) | stat.S_IRUSR | stat.S_IWUSR)
            fsync(target)

    def wait(self) -> None:
        """Wait until everything that was handed over is on the disk."""
        with self._lock:
            background, self._background = self._background, []
        for future in background:
            future.result()

    def commit(self) -> None:
        """Write the index, where it is needed, wait until everything is on the disk and make it appear as `out`."""
        self.wait()
        if self.unfinished:
            raise ValueError(f"never finished: {self.unfinished[:3]}")
        if self._needs_index:
            specs = {spec.name: (name, spec.nbytes) for name, plan in self._plans.items() for spec in plan.specs}
            weight_map = {name: file for name, (file, _) in sorted(specs.items())}
            total = sum(nbytes for _, nbytes in specs.values())
            self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        self._check_files()
        with disk_errors(self._out):
            for directory, _, files in os.walk(self.directory):
                _restrict(Path(directory), self._privacy.directories)
                for name in files:
                    most = self._privacy.weights if name in self._plans else self._privacy.files
                    _restrict(Path(directory, name), most)
                fsync(Path(directory))
            try:
                check_destination(self._out, overwrite=self._overwrite)
            except ConvertError as error:  # it appeared meanwhile; what is finished is kept
                raise DiskError(*astuple(error.problem)) from error
            replace_directory(self.directory, self._out, self._work.path / REPLACED)
            fsync(self._out.parent)

    def _check_files(self) -> None:
        """Open every shard with the safetensors library: what it cannot read is our bug, and does not become OUT."""
        for name, plan in self._plans.items():
            with safe_open(self.directory / name, framework="pt") as file:
                if set(file.keys()) != {spec.name for spec in plan.specs}:
                    raise ValueError(f"{name} does not hold what was planned")


def _restrict(path: Path, most: int) -> None:
    """Take from a file's or directory's mode what goes beyond `most`."""
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & ~most:
        path.chmod(mode & most)


def _is_final(error: BaseException) -> bool:
    """Whether an error would come again: the input or the command line is at fault."""
    return isinstance(error, W4A8Error) and not isinstance(error, DiskError)
