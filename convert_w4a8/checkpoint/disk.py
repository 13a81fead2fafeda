"""Files and directories that outlast a power loss, and what the system says when it fails, as one line."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convert_w4a8.errors import ConvertError, DiskError


@contextmanager
def disk_errors(subject: Path, action: str = "written") -> Iterator[None]:
    """Turn what the system says into one line: what cannot be `action`, and what to do.

    Raises:
        DiskError: the system failed.

    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free space" if full else "check the disk and the permissions"
        raise DiskError(str(subject), f"cannot be {action} ({error.strerror or error})", remedy) from error


def fsync(path: Path) -> None:
    """Flush a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def real_path(path: Path) -> Path:
    """Return where a path leads, whether or not there is something.

    Raises:
        OSError: links lead in a circle. (Path.resolve says so in some versions of Python only.)

    """
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
    return path.resolve()


def occupied(directory: Path) -> int:
    """Return the bytes that a directory takes on the disk; 0 if it is absent or cannot be read."""
    try:
        return sum(path.stat().st_blocks * 512 for path in directory.rglob("*"))
    except OSError:
        return 0


def make_directory(path: Path) -> None:
    """Make a directory and the missing ones above it, to survive a power loss."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync(path.parent)


def check_destination(out: Path, *, overwrite: bool) -> None:
    """Check that `out` may be written: absent, an empty directory, or any directory with `overwrite`.

    Raises:
        ConvertError: it may not.

    """
    with disk_errors(out):
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            raise ConvertError(str(out), "exists and is not a directory", "choose another output path")
        if out.resolve().is_mount():  # "." is its own parent, and would count as one
            raise ConvertError(str(out), "is a mount point, which cannot be replaced", "choose a directory inside it")
        if out.is_dir() and not overwrite and any(out.iterdir()):
            raise ConvertError(str(out), "is not empty", "choose another path, or pass --overwrite to replace it")


def replace_directory(new: Path, out: Path, old: Path) -> None:
    """Rename a directory to `out`. What is at `out` moves to `old` first, and comes back if `new` cannot be moved."""
    if not out.is_dir() or not any(out.iterdir()):
        new.rename(out)  # replaces an empty directory
        return
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
