"""A disk that fails, and a machine that dies: stands between a process and the functions of `os`."""

import mmap
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CALLS = ("mkdir", "open", "pwrite", "write", "sendfile", "truncate", "fsync", "fdatasync", "rename", "unlink", "rmdir")
"""Calls at which a run is killed: those that change the disk."""


@dataclass
class Disk:
    """Stands between a child and the operating system: counts its calls, disturbs some, knows what was flushed.

    disturb(n, name): called at the n-th call; may raise, or return when to die ("before", "half", "after") or "short".
    """

    directory: Path
    names: Sequence[str] = CALLS
    disturb: Callable[[int, str], str | None] = lambda _n, _name: None
    power: random.Random | None = None
    count: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 8))
    real: dict[str, Callable[..., Any]] = field(default_factory=dict)
    flushed: dict[int, int] = field(default_factory=dict)
    listed: dict[int, set[str]] = field(default_factory=dict)
    renames: list[tuple[Path, Path]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def calls(self) -> int:
        """How many calls there were; the parent knows it too."""
        return int(struct.unpack("q", self.count[:8])[0])

    def install(self) -> None:
        """Replace the functions of `os` in this process. What is on the disk already counts as flushed."""
        torch.set_num_threads(1)
        for path in [self.directory, *self.directory.rglob("*")]:
            status = path.stat()
            self.flushed[status.st_ino] = status.st_size
            if path.is_dir():
                self.listed[status.st_ino] = {entry.name for entry in path.iterdir()}
        for name in {*self.names, *CALLS}:
            self.real[name] = getattr(os, name)
            setattr(os, name, self._wrap(name))

    def _wrap(self, name: str) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            what = None
            if name in self.names and not (name == "write" and args[0] <= 2):
                with self.lock:
                    number = self.calls + 1
                    self.count[:8] = struct.pack("q", number)
                what = self.disturb(number, name)
            if what == "before":
                self._die()
            if what in ("half", "short") and name in ("pwrite", "write"):
                args = (args[0], args[1][: max(1, len(args[1]) // 2)], *args[2:])
            elif what == "short" and name == "preadv":
                args = (args[0], [args[1][0][: max(1, len(args[1][0]) // 2)]], *args[2:])
            result = self.real[name](*args, **kwargs)
            if self.power:
                self._remember(name, args, result)
            if what in ("half", "after"):
                self._die()
            return result

        return wrapped

    def _remember(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Keep track of what would outlast a power loss."""
        if name == "open" and args[1] & os.O_EXCL:
            self.flushed.pop(os.fstat(result).st_ino, None)
        elif name in ("pwrite", "sendfile"):
            self.flushed.pop(os.fstat(args[0]).st_ino, None)
        elif name in ("fsync", "fdatasync"):
            status, path = os.fstat(args[0]), Path(f"/proc/self/fd/{args[0]}").readlink()
            self.flushed[status.st_ino] = status.st_size
            if path.is_dir():
                self.listed[status.st_ino] = {entry.name for entry in path.iterdir()}
                self.renames = [pair for pair in self.renames if pair[1].parent != path]
        elif name == "rename":
            self.renames.append((Path(args[0]), Path(args[1])))

    def _die(self) -> None:
        if self.power:
            with self.lock:
                self._lose(self.power)
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)  # until the signal arrives

    def _lose(self, rng: random.Random) -> None:
        """Lose some of what was never flushed: renames, names in directories, contents."""
        for source, target in reversed(self.renames):
            if rng.random() < 0.5 and target.exists() and source.parent.exists() and not source.exists():
                self.real["rename"](target, source)
        for path in [path for path in self.directory.rglob("*") if path.is_file()]:
            status = path.stat()
            size, flushed = status.st_size, self.flushed.get(status.st_ino)
            if path.name not in self.listed.get(path.parent.stat().st_ino, ()) and rng.random() < 0.5:
                self.real["unlink"](path)
            elif flushed is None and size and rng.random() < 0.8:
                self.real["truncate"](path, rng.randrange(size))
                if rng.random() < 0.5:  # the size is there, the bytes are not
                    self.real["truncate"](path, size)
            elif flushed is not None and size > flushed:
                self.real["truncate"](path, rng.randint(flushed, size))
