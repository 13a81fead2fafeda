"""Memory that is used again for one layer's tensors after another's."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_ALIGNMENT = 64
"""Bytes: a cache line, and more than any dtype needs."""


class Arena:
    """Memory for one layer's tensors after another's: pages that are mapped already cost a tenth of fresh ones.

    `clear` ends the life of everything that was taken before. For one thread.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def __len__(self) -> int:
        return len(self._memory)

    def clear(self) -> None:
        """Make all memory free again, and enough of it for as much as was taken since the last time."""
        if self._used > len(self._memory):
            self._memory = torch.empty(0, dtype=torch.uint8)  # free before asking for more
            self._memory = torch.empty(self._used, dtype=torch.uint8)
        self._used = 0

    def take(self, nbytes: int) -> torch.Tensor:
        """Return uninitialized memory, uint8 [nbytes]."""
        start = self._used
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        inside = self._used <= len(self._memory)
        return self._memory[start : start + nbytes] if inside else torch.empty(nbytes, dtype=torch.uint8)


class Arenas:
    """Arenas for as many threads as ask for one."""

    def __init__(self) -> None:
        self._free: list[Arena] = []
        self._lock = threading.Lock()

    @contextmanager
    def lend(self) -> Iterator[Arena]:
        """Lend an arena: the largest that is free, lest a large layer make another one grow."""
        with self._lock:
            self._free.sort(key=len)
            arena = self._free.pop() if self._free else Arena()
        try:
            yield arena
        finally:
            arena.clear()
            with self._lock:
                self._free.append(arena)
