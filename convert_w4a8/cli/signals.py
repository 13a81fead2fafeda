"""SIGTERM and SIGHUP end a command as Ctrl-C does: what was begun is tidied away, and the exit code says why."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
"""What schedulers, containers and closed terminals send."""


class Stopped(KeyboardInterrupt):
    """The process was asked to end, by a signal that is not Ctrl-C's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raise Stopped in the block when one of the signals comes, once; what was set before holds again afterwards.

    Further ones are not heeded: they would break off the tidying up. A signal that is ignored, as `nohup` ignores
    SIGHUP, or that a program around us handles, stays as it is. Only the main thread can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stopped: Stopped | None = None

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal stopped
        if stopped is None:
            stopped = Stopped(number)
            raise stopped

    ours = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        if stopped is None or error is stopped:
            raise
        for note in getattr(error, "__notes__", ()):  # Ray raises another one in its place
            stopped.add_note(note)
        raise stopped from error
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code that a shell gives a process which ended by this signal."""
    return 128 + (interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT)


def signal_name(interrupt: KeyboardInterrupt) -> str:
    """Return what interrupted, for people: "Interrupted", or with the signal's name."""
    return (
        f"Interrupted by {signal.Signals(interrupt.number).name}" if isinstance(interrupt, Stopped) else "Interrupted"
    )
