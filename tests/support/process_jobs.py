"""What processes do that fail; where little is imported, since each of them imports it."""

import threading
from typing import Any

import torch.distributed as dist

from convert_w4a8.distillation.processes import Place
from convert_w4a8.errors import DiskError


def refuse(place: Place) -> None:
    """Fail in one process while the others wait."""
    if place.rank == 1:
        raise DiskError("a file", "is full", "make room")
    dist.barrier()


def raise_something(place: Place) -> None:
    """Fail otherwise."""
    if place.rank == 1:
        raise KeyError("a mistake of ours")
    dist.barrier()


def say_and_wait(place: Place) -> None:
    """Say something, and never end."""
    place.tell(place.rank)
    threading.Event().wait()


def stop(_message: Any) -> None:
    """Be interrupted while one listens."""
    raise KeyboardInterrupt
