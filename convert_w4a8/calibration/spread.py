"""Independent calls: the matrices of a stage, and groups of experts. What carries them out may use other processes."""

from collections.abc import Callable, Iterable, Iterator
from itertools import starmap
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Spread(Protocol):
    """Makes calls that do not depend on each other, and yields what they return, in their order.

    The first argument of each is a name, for messages.
    """

    def __call__(self, function: Callable[..., T], calls: Iterable[tuple[Any, ...]], /) -> Iterator[T]:
        """Call a function once with each of some arguments."""


def one_by_one(function: Callable[..., T], calls: Iterable[tuple[Any, ...]], /) -> Iterator[T]:
    """Make each call when its result is asked for, in this process."""
    return starmap(function, calls)
