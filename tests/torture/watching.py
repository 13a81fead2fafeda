# ruff: noqa: PTH109, PTH115, PTH118  (names as bytes)
"""What a run opens: by Python's own account, and by the system's, which sees what libraries open too."""

import ctypes
import os
import struct
import sys
from collections.abc import Collection
from pathlib import Path

_WRITING = frozenset({"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.truncate"})
_IN_OPEN, _IN_ISDIR, _IN_Q_OVERFLOW = 0x20, 0x40000000, 0x4000
_EVENT = struct.Struct("iIII")


class Watch:
    """Sees each file that anybody opens in some directories (inotify), as long as it lives."""

    def __init__(self, directories: Collection[Path]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._names: dict[int, Path] = {}
        for directory in directories:
            watch = self._libc.inotify_add_watch(self._descriptor, os.fsencode(directory), _IN_OPEN)
            if watch >= 0:  # else it may not be looked into, by nobody
                self._names[watch] = directory

    def close(self) -> list[str]:
        """Stop, and return what was opened, each path once."""
        found = []
        try:
            while data := os.read(self._descriptor, 1 << 16):
                while data:
                    watch, mask, _, length = _EVENT.unpack_from(data)
                    name = data[_EVENT.size : _EVENT.size + length].rstrip(b"\0")
                    data = data[_EVENT.size + length :]
                    if mask & _IN_Q_OVERFLOW:
                        raise AssertionError("more was opened than could be noted")
                    if name and not mask & _IN_ISDIR:
                        found.append(os.path.join(self._names[watch], os.fsdecode(name)))
        except BlockingIOError:
            pass
        finally:
            os.close(self._descriptor)
        return list(dict.fromkeys(found))


def log_openings(descriptor: int) -> None:
    """Write down each path that this process opens, makes or removes, its links resolved. Cannot be undone.

    That is what Python does; libraries open files without telling it.
    """

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" or event in _WRITING:
            path = arguments[0]
            if isinstance(path, str | bytes | os.PathLike):
                full = _absolute(event, arguments, os.fsencode(path))
                mark = b"r" if event == "open" and not _is_writing(arguments) else b"w"
                if full is not None:
                    os.write(descriptor, mark + _resolved(full) + b"\0")

    sys.addaudithook(hook)


def _absolute(event: str, arguments: tuple[object, ...], path: bytes) -> bytes | None:
    """Return the path that is meant; None for a directory that is there already, and where it cannot be known.

    os.open does not tell relative to which directory: what is not in the working directory is in one opened before.
    """
    if event == "os.mkdir" and os.path.lexists(path):
        return None
    if path.startswith(b"/"):
        return path
    last = arguments[-1]
    if event not in ("open", "os.truncate") and isinstance(last, int) and last >= 0:
        return os.path.join(os.readlink(b"/proc/self/fd/%d" % last), path)
    if event == "open" and arguments[1] is None and not os.path.lexists(path):
        return None
    try:
        return os.path.join(os.getcwdb(), path)
    except OSError:
        return None


def _resolved(path: bytes) -> bytes:
    """Return where a path leads, as far as that can be known before it is opened."""
    try:
        return os.path.realpath(path)
    except OSError:
        return path


def _is_writing(arguments: tuple[object, ...]) -> bool:
    flags = arguments[2] if len(arguments) > 2 else 0
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
