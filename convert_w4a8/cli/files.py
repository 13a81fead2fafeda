"""Files that a command writes where an option or a variable says: one is whole, or as it was, and nothing else changes.

A link is not followed, since the directory that it lies in may be somebody else's; devices and pipes may be reached
through one, as `/dev/stdout` is.
"""

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from convert_w4a8.errors import ConvertError

_IN_PLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
"""A file that may be written may lie in a directory that may not, or be a mount of its own, as in containers."""
_OTHERS = {stat.S_IFDIR: "a directory", stat.S_IFBLK: "a disk", stat.S_IFSOCK: "a socket"}


def check_writable(*paths: Path) -> None:
    """Raise ConvertError if files cannot be written, as far as can be told before the work; touches nothing."""
    for path in paths:
        with _errors(path):
            kind = _kind(path)
            parent = next((folder for folder in path.absolute().parents if os.path.lexists(folder)), Path("/"))
            if kind is None and not parent.is_dir():
                raise OSError(errno.ENOTDIR, f"{parent} is not a directory")
            if not os.access(parent if kind is None else path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def write_files(files: Mapping[Path, bytes]) -> None:
    """Write files, with their directories. Raises ConvertError where one cannot be written."""
    for path, content in files.items():
        with _errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if _kind(path) in (None, stat.S_IFREG) and not _is_ours(path):
                try:
                    _replace(path, content)
                    continue
                except OSError as error:
                    if error.errno not in _IN_PLACE or not path.exists():
                        raise
            _put(path, content, os.O_TRUNC)


def append_to_file(path: Path, content: bytes) -> None:
    """Append to a file, or make it. Raises ConvertError where that is not possible."""
    with _errors(path):
        _kind(path)
        _put(path, content, os.O_APPEND)


def append_for_the_job(summary: str) -> None:
    """Append the summary to the file that GitHub Actions shows, if any. Raises ConvertError if it cannot."""
    file = os.environ.get("GITHUB_STEP_SUMMARY")
    if not file:
        return
    try:
        append_to_file(Path(file), summary.encode(errors="backslashreplace"))
    except ConvertError as error:
        raise ConvertError(
            f"GITHUB_STEP_SUMMARY ({file})", error.problem.reason, "name a file that can, or unset it"
        ) from error


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # a name that is too long, a directory that may not be entered, a disk that is full
        raise ConvertError(str(path), f"cannot be written ({error.strerror})", "choose another path") from error


def _is_ours(path: Path) -> bool:
    """Whether a path names an open file of this process: `/dev/stdout`, `/dev/fd/3`."""
    return str(path) in ("/dev/stdout", "/dev/stderr") or str(path.parent) in ("/dev/fd", "/proc/self/fd")


def _kind(path: Path) -> int | None:
    """Return what a path is, as `stat.S_IFMT` does; None where nothing is there. Raises OSError for what is no file."""
    try:
        kind = stat.S_IFMT(path.lstat().st_mode)
    except FileNotFoundError:
        return None
    if kind == stat.S_IFLNK:
        try:
            kind = stat.S_IFMT(path.stat().st_mode)
        except FileNotFoundError:
            kind = stat.S_IFREG
        if kind == stat.S_IFREG and not _is_ours(path):
            raise OSError(errno.EMLINK, "it is a link; name the file that it leads to")
    if kind in _OTHERS:
        raise OSError(errno.EINVAL, f"it is {_OTHERS[kind]}")
    return kind


def _replace(path: Path, content: bytes) -> None:
    """Write a file beside a path, and let it take its place."""
    new = path.parent / f".w4a8-{secrets.token_hex(8)}"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            with suppress(FileNotFoundError):
                old = path.lstat()
                with suppress(PermissionError):
                    os.fchown(descriptor, old.st_uid, old.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
            _write(descriptor, content)
        finally:
            os.close(descriptor)
        new.replace(path)
    except BaseException:
        new.unlink()
        raise


def _put(path: Path, content: bytes, how: int) -> None:
    """Write to what is there, or make it. A pipe that nobody reads is an error, and is not waited for."""
    follow = 0 if _is_ours(path) or _kind(path) != stat.S_IFREG else os.O_NOFOLLOW
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | follow | how
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "nobody reads from it") from error
        raise
    try:
        os.set_blocking(descriptor, True)
        _write(descriptor, content)
    finally:
        os.close(descriptor)


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
