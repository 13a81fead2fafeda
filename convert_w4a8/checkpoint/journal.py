"""What an interrupted conversion leaves beside OUT, who may touch it, and what of it can be trusted.

The work directory `.OUT.w4a8-partial` holds

    lock         held (flock) by the process that converts
    journal      lines of a CRC-32 and JSON: the fingerprint of the conversion, then a line for each finished file: the
                 fingerprint of its shard, the checksums of its pieces, what became of its layers, infinities. It is
                 written when the file's bytes are on the disk, and is on the disk before anything else
    checkpoint/  the output so far, which becomes OUT by one rename when all of it is on the disk
    replaced/    the old OUT, while the new one takes its place
    states/      what a process keeps on the disk while it runs, and nobody reads after it

A file is trusted if its line is in the journal and its bytes still have the checksums that they had in memory.
"""

import errno
import fcntl
import json
import os
import shutil
import stat
import threading
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.checksum import Piece
from convert_w4a8.checkpoint.disk import fsync
from convert_w4a8.errors import ConvertError

LOCK, JOURNAL, CHECKPOINT, REPLACED, STATES = "lock", "journal", "checkpoint", "replaced", "states"
Fingerprint = Mapping[str, Any]
VERSION = "version of w4a8-convert"
"""What a fingerprint calls it. Options are called as on the command line."""
BEGIN_AGAIN = "begin again with --overwrite and without --resume"
_SUFFIX = ".w4a8-partial"


@dataclass(frozen=True)
class Notes:
    """What became of tensors: a JSON note for each layer, by module.

    infinities: how many a copied tensor holds, by name, where there are any.
    """

    layers: dict[str, Any] = field(default_factory=dict)
    infinities: dict[str, int] = field(default_factory=dict)

    def of(self, modules: Iterable[str], copied: Iterable[str]) -> "Notes":
        """Return those of some layers, and of some tensors that are copied."""
        infinities = {name: self.infinities[name] for name in copied if name in self.infinities}
        return Notes({module: self.layers[module] for module in modules}, infinities)


@dataclass(frozen=True)
class FinishedFile:
    """A finished file of an output: the fingerprint of its shard, its checksums, and what became of its tensors."""

    shard: str
    pieces: list[Piece]
    notes: Notes


class WorkDirectory:
    """The work directory of one output, locked for this process from `__init__` to `close`."""

    def __init__(self, out: Path) -> None:
        self.path = work_path(out)
        self.checkpoint = self.path / CHECKPOINT
        self._lock = self._acquire(out)
        try:
            _check_directories(self.path, CHECKPOINT, REPLACED, STATES)
            self._journal = _open(self.path / JOURNAL, os.O_RDWR | os.O_APPEND)
            entries, size = _read_journal(self._journal)
            os.truncate(self._journal, size)
        except BaseException as error:
            if not self.checkpoint.exists() and not isinstance(error, ConvertError):
                self.remove()
            os.close(self._lock)
            raise
        self._writing = threading.Lock()
        self._fingerprint: Fingerprint = {}
        self.files: dict[str, FinishedFile] = {}
        for entry in entries:
            match entry:
                case {"fingerprint": dict(found)}:
                    self._fingerprint = found
                case {
                    "file": str(name),
                    "shard": str(shard),
                    "pieces": list(pieces),
                    "layers": dict(layers),
                    "infinities": dict(infinities),
                } if self.checkpoint.is_dir():
                    known = [(start, size, sum_) for start, size, sum_ in pieces]
                    self.files[name] = FinishedFile(shard, known, Notes(layers, infinities))

    def _acquire(self, out: Path) -> int:
        while True:
            if self.path.is_symlink():
                raise _planted(self.path, "is a link")
            self.path.mkdir(mode=0o700, exist_ok=True)
            try:
                _check_owner(self.path)
                descriptor = _open(self.path / LOCK, os.O_RDWR)
            except FileNotFoundError:  # a conversion that has just ended removed the directory
                continue
            except BaseException:
                with suppress(OSError):
                    self.path.rmdir()  # unless there is something in it
                raise
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                raise ConvertError(
                    str(out), "is being written by another conversion", "wait for it, or choose another output path"
                ) from None
            except OSError as error:  # some network file systems have no locks
                if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
                    raise
            if _is_at(descriptor, self.path / LOCK):
                return descriptor
            os.close(descriptor)

    def begin(self, fingerprint: Fingerprint, *, resume: bool, overwrite: bool) -> None:
        """Begin a conversion; with `resume`, go on with the `files` of the one that was interrupted, if any.

        Raises:
            ConvertError: there is one, and it is not to be resumed or it is another conversion.

        """
        out = self.path.name.removeprefix(".").removesuffix(_SUFFIX)
        if self.files and resume:
            check_same(self._fingerprint, fingerprint, out, "conversion")
            return
        if self.files and not overwrite:
            raise ConvertError(
                str(self.path),
                f"is left of a conversion to {out} that was interrupted, with {len(self.files)} finished files",
                "pass --resume to continue it, or --overwrite to begin again",
            )
        os.truncate(self._journal, 0)
        self._remove_directories()
        self.files = {}
        self.checkpoint.mkdir()
        self._append({"fingerprint": dict(fingerprint)})
        os.fsync(self._journal)
        fsync(self.path)

    def _remove_directories(self) -> None:
        for name in (CHECKPOINT, REPLACED, STATES):
            shutil.rmtree(self.path / name, ignore_errors=True)

    def note_file(self, name: str, finished: "FinishedFile") -> None:
        """Note a finished file, whose bytes are on the disk already."""
        fsync(self.checkpoint)
        entry = {
            "file": name,
            "shard": finished.shard,
            "pieces": finished.pieces,
            "layers": finished.notes.layers,
            "infinities": finished.notes.infinities,
        }
        self._append(entry)
        # Before the disk is waited for, where a signal may come: what is in the journal is not to be given up. Only a
        # later process needs the pieces, and reads them there.
        self.files[name] = replace(finished, pieces=[])
        os.fsync(self._journal)

    def _append(self, entry: Mapping[str, Any]) -> None:
        text = json.dumps(entry).encode()
        line = memoryview(b"%08x %s\n" % (zlib.crc32(text), text))
        with self._writing:
            while line:
                line = line[os.write(self._journal, line) :]

    def remove(self) -> None:
        """Remove everything; the lock last, so that nobody else begins before the rest is gone."""
        for step in (
            self._remove_directories,
            (self.path / JOURNAL).unlink,
            (self.path / LOCK).unlink,
            self.path.rmdir,
        ):
            with suppress(OSError):
                step()

    def close(self) -> None:
        """Release the lock."""
        os.close(self._journal)
        os.close(self._lock)


def work_path(out: Path) -> Path:
    """Return the work directory of an output."""
    return out.parent / f".{out.name}{_SUFFIX}"


def _open(path: Path, flags: int) -> int:
    """Open a file of the work directory, which is made where it is absent, and is never somewhere else.

    Raises:
        ConvertError: it is a link, or no file.

    """
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _planted(path, "is not a file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _planted(path, "is not a file")
    return descriptor


def _check_owner(path: Path) -> None:
    if path.lstat().st_uid != os.geteuid():
        raise _planted(path, "belongs to another user")


def _check_directories(path: Path, *names: str) -> None:
    for name in names:
        if (path / name).is_symlink():
            raise _planted(path / name, "is a link")


def _planted(path: Path, what: str) -> ConvertError:
    return ConvertError(
        str(path), f"{what}, and not what a conversion leaves", "remove it, or choose another output path"
    )


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _read_journal(descriptor: int) -> tuple[list[dict[str, Any]], int]:
    """Return the journal's entries and their size in bytes.

    A line that is cut, as power loss leaves one, or that does not have its checksum ends it.
    """
    entries: list[dict[str, Any]] = []
    size = 0
    with open(descriptor, "rb", closefd=False) as file:
        for line in file:
            sum_, _, text = line.partition(b" ")
            if not line.endswith(b"\n") or sum_ != b"%08x" % zlib.crc32(text[:-1]):
                break
            entries.append(json.loads(text))
            size += len(line)
    return entries, size


def check_same(interrupted: Fingerprint, now: Fingerprint, out: str, what: str) -> None:
    """Check that what is to be continued is what was interrupted. out: its output. what: "conversion" or "training".

    Raises:
        ConvertError: the input or an option is another one, or another version of this package or command began it.

    """
    now = json.loads(json.dumps(now))
    for key in [*now, *interrupted]:
        is_known = key in now and key in interrupted
        if is_known and now[key] == interrupted[key]:
            continue
        reason, same = f"is not what it was in the {what} that was interrupted", "the same input and options"
        if key == VERSION:
            same = f"version {interrupted.get(key, 'that began it')}"
        elif key.startswith("--") and not is_known:
            had = "had not" if key in now else "had, and there is none here"
            reason = f"is an option that the interrupted {what} {had}: another version or command began it"
            same = "that version and command"
        raise ConvertError(f"{out}: {key}", reason, f"resume with {same}, or {BEGIN_AGAIN}")
