"""A process for each GPU of this machine, in each of which the same function runs; what they say, and how they end.

The processes find each other by a file, and send what they have to say through a pipe. When one fails the others, which
may wait for it, are ended; when the process that started them ends, however that comes, they end themselves.
"""

import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from convert_w4a8.errors import ConvertError, DiskError

_PATIENCE = timedelta(hours=2)
"""How long a process waits for another one, which may read or write large files meanwhile."""
_GRACE = 3.0
"""Seconds to hear of other processes after one has failed: the first one heard of may fail for another's sake."""
_SAID, _DONE, _REFUSED, _FAILED = "said", "done", "refused", "failed"
_ERRORS: Mapping[str, type[ConvertError]] = {"ConvertError": ConvertError, "DiskError": DiskError}


@dataclass(frozen=True)
class Place:
    """Which of several processes this is. tell: how to send something that can be pickled to the one that began it."""

    rank: int
    ranks: int
    device: torch.device
    tell: Callable[[Any], None] = field(default=lambda _message: None)

    @property
    def is_first(self) -> bool:
        """Whether it speaks for all."""
        return self.rank == 0

    def in_turn(self, do: Callable[[], Any]) -> Any:
        """Return what a function gives, which one process after the other calls."""
        found = None
        for turn in range(self.ranks):
            if turn == self.rank:
                found = do()
            dist.barrier()
        return found


def run_on_all(
    work: Callable[..., Any],
    arguments: Sequence[Any],
    ranks: int,
    kind: str,
    hear: Callable[[Any], None],
) -> Any:
    """Call `work(place, *arguments)` in each of so many processes; return what the first one returned.

    kind: of their devices: `cuda`, one for each, or `cpu`. hear: called with what a process tells.

    Raises:
        ConvertError: a process raised it, or was ended by a signal.
        RuntimeError: a process raised something else; with its traceback.

    """
    context = get_context("spawn")
    processes: dict[Connection, SpawnProcess] = {}
    with tempfile.TemporaryDirectory(prefix="w4a8-distill-") as folder:
        store = Path(folder) / "processes"
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
                process = context.Process(
                    target=_run, args=(work, arguments, rank, ranks, device, theirs, str(store)), daemon=True
                )
                processes[ours] = process
                process.start()
                theirs.close()
            result = _listen(processes, hear)
            for process in processes.values():
                process.join(_GRACE)
            return result
        finally:
            _end(list(processes.values()))


def _listen(processes: Mapping[Connection, SpawnProcess], hear: Callable[[Any], None]) -> Any:
    """Hear all until they are done, or one has failed."""
    ranks = {connection: rank for rank, connection in enumerate(processes)}
    results: dict[int, Any] = {}
    failures: dict[int, tuple[Any, ...]] = {}
    waiting = list(processes)
    until: float | None = None
    while waiting:
        ready = wait(waiting, None if until is None else max(0.0, until - time.monotonic()))
        if not ready:
            break
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = ranks[connection]
            try:
                kind, *what = connection.recv()
            except (EOFError, OSError):
                waiting.remove(connection)
                if rank not in results and rank not in failures:
                    processes[connection].join(_GRACE)
                    failures[rank] = (None, processes[connection].exitcode)
            else:
                if kind == _SAID:
                    hear(what[0])
                elif kind == _DONE:
                    results[rank] = what[0]
                else:
                    failures[rank] = (kind, *what)
        if failures and until is None:
            until = time.monotonic() + _GRACE
    if failures:
        raise _cause(failures)
    return results[0]


def _cause(failures: Mapping[int, tuple[Any, ...]]) -> Exception:
    """Return the error that the others come from: first what a process understood, then one that vanished."""
    for kind, *what in failures.values():
        if kind == _REFUSED:
            name, *parts = what
            return _ERRORS[name](*parts)
    for rank, (kind, *what) in failures.items():
        if kind is None:
            code = what[0]
            subject = f"process {rank + 1} of the training"
            if code is not None and code < 0:
                remedy = "see whether the machine has run out of memory; --resume continues from what was kept"
                return DiskError(subject, f"was ended by signal {-code}", remedy)
            remedy = "see what it has printed; a script needs `if __name__ == '__main__':` around what it does"
            return DiskError(subject, f"ended with exit code {code}", remedy)
    rank, (_, text) = next(iter(failures.items()))
    return RuntimeError(f"process {rank + 1} of the training failed:\n{text}")


def _end(processes: Sequence[SpawnProcess]) -> None:
    """End what still runs."""
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.terminate()
    for process in started:
        process.join(_GRACE)
        if process.is_alive():
            process.kill()
            process.join()


def _run(
    work: Callable[..., Any],
    arguments: Sequence[Any],
    rank: int,
    ranks: int,
    device: torch.device,
    connection: Connection,
    store: str,
) -> None:
    """Be one of the processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the first one ends us
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host's name may lead nowhere
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=_PATIENCE,
            device_id=device if device.type == "cuda" else None,
        )
        result = work(Place(rank, ranks, device, lambda message: connection.send((_SAID, message))), *arguments)
        dist.barrier()
        connection.send((_DONE, result))
        dist.destroy_process_group()
    except ConvertError as error:
        problem = error.problem
        name = "DiskError" if isinstance(error, DiskError) else "ConvertError"
        _last_words(connection, (_REFUSED, name, problem.subject, problem.reason, problem.remedy))
    except Exception:  # noqa: BLE001 - it is raised where the process was begun
        _last_words(connection, (_FAILED, traceback.format_exc()))


def _last_words(connection: Connection, message: tuple[Any, ...]) -> None:
    """Say why, and end at once: the others may never come to where the libraries would wait for them."""
    connection.send(message)
    sys.stderr.flush()
    os._exit(1)


def _end_with_parent(connection: Connection) -> None:
    """End this process when the one that began it is gone."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)
