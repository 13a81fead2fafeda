"""How far a command is: a bar on a terminal, now and then a line in a log."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from convert_w4a8.cli.output import echo_error
from convert_w4a8.text import human_bytes, human_seconds

_SECONDS = 30.0
"""A line of a log comes after so many seconds, …"""
_PERCENT = 10
"""… or after so many percent, …"""
_LEAST_SECONDS = 10.0
"""… but not sooner after the one before, or after the beginning: what is quick needs no lines."""


def at_terminal() -> bool:
    """Whether stderr is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def progress(total: int, label: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show on stderr how many bytes of a total are done: as a bar if that is a terminal, as lines otherwise.

    What is yielded is called with the number of bytes that are done since the last call, from any thread.
    """
    if quiet:
        yield lambda _nbytes: None
    elif at_terminal():
        from tqdm import tqdm

        with tqdm(total=total, desc=label, unit="B", unit_scale=True) as bar:
            yield bar.update
    else:
        yield ProgressLines(total, label).update


@contextmanager
def training_progress(steps: int, *, quiet: bool) -> Iterator[Callable[[int, float], None]]:
    """Show on stderr how many steps of a training are done, and the divergence of the last one's batch.

    What is yielded is called with the number of each step and its divergence.
    """
    if quiet:
        yield lambda _step, _loss: None
    elif at_terminal():
        from tqdm import tqdm

        with tqdm(total=steps, desc="distill", unit="step") as bar:

            def show(step: int, loss: float) -> None:
                bar.set_postfix_str(f"KL {loss:.5f}", refresh=False)
                bar.update(step - bar.n)

            yield show
    else:
        log = _Log()
        yield lambda step, loss: log.add(
            f"distill    step {step:,} of {steps:,}, KL {loss:.5f} nats per token", is_last=step == steps
        )


def storing_progress(*, quiet: bool) -> Callable[[int, int], None]:
    """Return what shows on stderr how far the pass over a teacher is; it is called with tokens done and all tokens."""
    if quiet:
        return lambda _done, _of: None
    log = _Log()
    return lambda done, of: log.add(f"teacher    {done:,} of {of:,} tokens written", is_last=done == of)


class _Log:
    """Prints a line every 30 s, and the last one."""

    def __init__(self) -> None:
        self._last_time = time.monotonic()

    def add(self, line: str, *, is_last: bool) -> None:
        """Print a line if it is time."""
        if is_last or time.monotonic() - self._last_time >= _SECONDS:
            self._last_time = time.monotonic()
            echo_error(line)


class ProgressLines:
    """Prints a line every 30 s or 10 %."""

    def __init__(self, total: int, label: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._label = label
        self._clock = clock
        self._started = self._last_time = clock()
        self._done = self._last_done = 0
        self._lock = threading.Lock()

    def update(self, nbytes: int) -> None:
        """Note that so many bytes are done, and print a line if it is time."""
        with self._lock:
            self._done += nbytes
            now = self._clock()
            waited = now - self._last_time
            more = 100 * (self._done - self._last_done) >= _PERCENT * self._total
            if not nbytes or waited < _LEAST_SECONDS or not (waited >= _SECONDS or more):
                return
            self._last_time, self._last_done = now, self._done
            echo_error(self._line(now - self._started))

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        share = min(1.0, self._done / self._total) if self._total else 1.0
        return (
            f"{self._label:<10} {share:4.0%}, {human_bytes(self._done)} of {human_bytes(self._total)},"
            f" {rate / 1e6:.0f} MB/s, {human_seconds(max(0, self._total - self._done) / rate)} left"
        )
