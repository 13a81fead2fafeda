"""Where the files of a checkpoint may lie: nothing of the machine gets into an output through a link or a name."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from convert_w4a8.checkpoint.disk import real_path
from convert_w4a8.errors import ConvertError

_MAX_DEPTH = 16
"""Directories within each other."""


def homes_of(root: Path) -> list[Path]:
    """Return where a checkpoint's files may really lie: its own directory, and the blobs of the Hub's cache."""
    home = root.resolve()
    return [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]


def check_link(path: Path, homes: Iterable[Path]) -> Path:
    """Return a path unchanged.

    Raises:
        ConvertError: a link leads out of the checkpoint, and would carry a file of the machine into the output.

    """
    try:
        real = real_path(path)
    except OSError as error:
        raise ConvertError(str(path), "is a link that leads nowhere", "copy the file that is meant") from error
    if not any(real.is_relative_to(home) for home in homes):
        raise ConvertError(
            str(path),
            f"is a link out of the checkpoint, to {real}",
            "copy the file, or give the directory that it lies in",
        )
    return path


def check_weights(path: Path, homes: Iterable[Path]) -> Path:
    """Return a path unchanged. Raises ConvertError for a link out of the checkpoint, or a name that is not UTF-8."""
    check_name(path)
    return check_link(path, homes)


def check_name(path: Path) -> None:
    """Raise ConvertError for a name that the safetensors library cannot open."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError as error:
        reason = "has a name that is not UTF-8, which the safetensors library cannot open"
        raise ConvertError(str(path), reason, "rename it, or choose another path") from error


def list_paths(root: Path) -> list[Path]:
    """Return everything below a directory in order, without following links.

    Raises:
        ConvertError: a link leads out of the checkpoint, or directories are nested deeper than any checkpoint's are.

    """
    homes = homes_of(root)
    paths = sorted(_walk(root))
    for path in paths:
        if path.is_symlink() and path.exists():
            check_link(path, homes)
    return paths


def _walk(root: Path) -> Iterator[Path]:
    waiting = [(root, 0)]
    while waiting:
        directory, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ConvertError(str(directory), "is nested too deep for a checkpoint", "give the checkpoint's directory")
        for path in directory.iterdir():
            yield path
            if path.is_dir() and not path.is_symlink():
                waiting.append((path, depth + 1))
