"""Work on several threads that gives the same bytes on any number of them."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

_T = TypeVar("_T")
_lock = threading.Lock()
_inside = 0
_before = 1


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Keep torch from using several threads an operation; yields how many it used before. May be nested.

    What a matrix product of torch gives depends, in its last bits, on the number of threads that share it.
    """
    global _inside, _before  # noqa: PLW0603 - torch has one setting for the process
    with _lock:
        if not _inside:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield _before
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                torch.set_num_threads(_before)


def side_by_side(work: Callable[[_T], object], parts: Iterable[_T]) -> None:
    """Do independent pieces of work, each on one thread, as many at a time as torch may use; the first error ends all.

    Inside `one_thread_each`, as in a job of a conversion, they run one after the other.
    """
    threads = torch.get_num_threads()
    with one_thread_each():
        if threads == 1:
            for part in parts:
                work(part)
            return
        with ThreadPoolExecutor(threads) as pool:
            futures = [pool.submit(work, part) for part in parts]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()
