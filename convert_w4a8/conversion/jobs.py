"""Jobs side by side, as far as cores and memory allow."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice

from convert_w4a8.threads import one_thread_each

_MAX_WORKERS = 4
"""If nobody asks for more."""
_workers: ContextVar[int | None] = ContextVar("workers", default=None)
MEMORY_BYTES = 512 << 20
"""What jobs that run side by side may take together; a larger job runs alone."""
_FILES = 2
"""Files that are written at a time. Threads that write to the same file wait for each other; but what is finished of a
conversion that is interrupted is whole files."""


@dataclass(frozen=True)
class Job:
    """A piece of work, the memory that it will take in bytes, and the file that it writes to."""

    run: Callable[[], None]
    memory: int
    file: str


@contextmanager
def use_workers(count: int | None) -> Iterator[None]:
    """Let so many jobs run at a time in the block, on any machine; None: one a core, up to 4.

    Raises ValueError for a count below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"workers: {count} is below 1")
    token = _workers.set(count)
    try:
        yield
    finally:
        _workers.reset(token)


def worker_count() -> int:
    """Return how many jobs may run at a time."""
    return _workers.get() or min(_MAX_WORKERS, os.cpu_count() or 1)


def run_jobs(jobs: Iterable[Job]) -> None:
    """Run jobs in order, but for threads that turn to the next file where another one writes; the first error ends all.

    jobs: those of a file follow each other; they are asked for when their file comes. torch uses one thread an
    operation meanwhile.
    """
    coming = iter(jobs)
    waiting: dict[str, deque[Job]] = {}
    _take_files(coming, waiting)
    workers = worker_count()
    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        running: dict[Future[None], Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    queue = waiting[_choose_file(waiting, {job.file for job in running.values()})]
                    if running and sum(job.memory for job in (*running.values(), queue[0])) > MEMORY_BYTES:
                        break
                    job = queue.popleft()
                    running[pool.submit(job.run)] = job
                    if not queue:
                        del waiting[job.file]
                        _take_files(coming, waiting)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        finally:
            for future in running:
                future.cancel()


def _take_files(coming: Iterator[Job], waiting: dict[str, deque[Job]]) -> None:
    """Take jobs until there are all of the next files, and one of the file behind them: there may be millions."""
    while len(waiting) <= _FILES and (job := next(coming, None)) is not None:
        waiting.setdefault(job.file, deque()).append(job)


def _choose_file(waiting: Iterable[str], busy: set[str]) -> str:
    """Return the first of the next files that nobody writes to, or the first of all."""
    candidates = list(islice(waiting, _FILES))
    return next((file for file in candidates if file not in busy), candidates[0])
