"""Attempts at the files of an output: where each writes, and how far it is."""

import json
import secrets
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.disk import disk_errors
from convert_w4a8.cluster.tasks import Task
from convert_w4a8.conversion.shard import Progress, ShardTask
from convert_w4a8.errors import ClusterError

_PROGRESS = "progress.json"
_PROGRESS_SECONDS = 0.5
_REMOVALS = 20


@contextmanager
def reporting(directory: Path, node: str) -> Iterator[Progress]:
    """Write now and then how many bytes are done with, and on which node, into a file of a directory.

    node: its id; "" in the process of the command.

    Raises:
        ClusterError: the directory is gone, in what is yielded.

    """
    lock, done, last = threading.Lock(), 0, 0.0

    def write() -> None:
        with suppress(OSError):
            part = directory / f"{_PROGRESS}.part"
            part.write_text(json.dumps({"node": node, "done": done}))
            part.replace(directory / _PROGRESS)

    def update(nbytes: int) -> None:
        nonlocal done, last
        with lock:
            done += nbytes
            if time.monotonic() - last >= _PROGRESS_SECONDS:
                last = time.monotonic()
                write()
                if not directory.is_dir():
                    raise ClusterError(str(directory), "is gone: this attempt is not needed any more", "look at others")

    write()
    yield update


class Attempts:
    """Directories of attempts, and what lies in them."""

    def __init__(self, directory: Path, bars: "Bars") -> None:
        self._root, self._bars = directory / secrets.token_hex(4), bars  # a process that was killed has another one
        self._nodes: dict[tuple[str, int], str] = {}

    def path(self, name: str, number: int) -> Path:
        """Return where an attempt writes its file."""
        return self._root / f"{name}.{number}" / name

    def make(self, task: ShardTask, number: int) -> str:
        """Make a directory for an attempt.

        Raises:
            DiskError: the disk is full, or fails.

        """
        directory = self.path(task.shard.file_name, number).parent
        with disk_errors(directory):
            directory.mkdir(parents=True)
        return str(directory)

    def drop(self, attempts: Sequence[tuple[Task, int]]) -> None:
        """Remove the directories of attempts, which ends them; they may write there in the meantime."""
        left = [self.path(task.name, number).parent for task, number in attempts]
        for _ in range(_REMOVALS):
            for directory in left:
                shutil.rmtree(directory, ignore_errors=True)
            left = [directory for directory in left if directory.exists()]
            if not left:
                return
            time.sleep(0.05)

    def where(self, task: Task, number: int) -> str | None:
        """Return the id of the node that has an attempt, if that is known."""
        return self._nodes.get((task.name, number)) or None

    def poll(self, attempts: Sequence[tuple[Task, int]]) -> None:
        """Look how far attempts are."""
        for task, number in attempts:
            with suppress(OSError, ValueError, KeyError):
                found: dict[str, Any] = json.loads((self.path(task.name, number).parent / _PROGRESS).read_bytes())
                self._nodes[task.name, number] = found["node"]
                self._bars.reach(task.name, found["done"])


class Bars:
    """Tells one progress of all tasks. A layer that lies in several files counts in the first of them."""

    def __init__(self, tasks: Sequence[ShardTask], wanted: Sequence[ShardTask], progress: Progress) -> None:
        self._progress = progress
        self._shares: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._done: dict[str, int] = {}
        counted: set[str] = set()
        names = {task.shard.file_name for task in wanted}
        for task in (*wanted, *(task for task in tasks if task.shard.file_name not in names)):
            name = task.shard.file_name
            copied = sum(tensor.info.nbytes for tensor in task.tensors)
            layers = {layer.module: layer.spec.nbytes for layer in task.layers}
            self._totals[name] = copied + sum(layers.values())
            self._shares[name] = copied + sum(nbytes for module, nbytes in layers.items() if module not in counted)
            counted |= layers.keys()
            self._done[name] = 0
            if name not in names:
                self.finish(name)

    def reach(self, name: str, done: int) -> None:
        """Note how many bytes a task has done; an attempt that begins again does not count backwards."""
        share = self._shares[name] * min(done, self._totals[name]) // max(1, self._totals[name])
        if share > self._done[name]:
            self._progress(share - self._done[name])
            self._done[name] = share

    def finish(self, name: str) -> None:
        """Note that a task is finished."""
        self._progress(self._shares[name] - self._done[name])
        self._done[name] = self._shares[name]
