"""Ctrl-C in the middle of a calibration."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from convert_w4a8.calibration.walk import Walk


@contextmanager
def interrupted_walk(monkeypatch: pytest.MonkeyPatch, stop: int, after: int = 0) -> Iterator[list[int]]:
    """Interrupt in block `stop`, once `after` of its parts are done; expect it, and give the blocks that were begun.

    The list goes on being filled until the end of the test, where nothing is interrupted any more.
    """
    begun: list[int] = []
    original, interrupted = Walk.quantize, False

    def quantize(self: Walk, number: int, *args: Any, **more: Any) -> Iterator[Any]:
        begun.append(number)
        for count, done in enumerate(original(self, number, *args, **more)):
            if not interrupted and number == stop and count == after:
                raise KeyboardInterrupt
            yield done

    monkeypatch.setattr(Walk, "quantize", quantize)
    with pytest.raises(KeyboardInterrupt):
        yield begun
    interrupted = True
