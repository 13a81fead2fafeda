"""Jobs side by side, as far as cores and memory allow."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch

_MAX_WORKERS = 4
_MEMORY_BYTES = 512 << 20
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


def run_jobs(jobs: Iterable[Job]) -> None:
    """Run jobs in order, but for threads that turn to the next file where another one writes; the first error ends all.

    torch uses one thread an operation meanwhile.
    """
    waiting: dict[str, deque[Job]] = {}
    for job in jobs:
        waiting.setdefault(job.file, deque()).append(job)
    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    with _one_thread_each(), ThreadPoolExecutor(workers) as pool:
        running: dict[Future[None], Job] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    queue = waiting[_choose_file(waiting, {job.file for job in running.values()})]
                    if running and sum(job.memory for job in (*running.values(), queue[0])) > _MEMORY_BYTES:
                        break
                    job = queue.popleft()
                    if not queue:
                        del waiting[job.file]
                    running[pool.submit(job.run)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    future.result()
        finally:
            for future in running:
                future.cancel()


def _choose_file(waiting: Iterable[str], busy: set[str]) -> str:
    """Return the first of the next files that nobody writes to, or the first of all."""
    candidates = list(islice(waiting, _FILES))
    return next((file for file in candidates if file not in busy), candidates[0])


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch from using several threads an operation: the jobs themselves run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
