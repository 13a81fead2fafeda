"""Regular expressions from a configuration. They may be hostile, and made to take for ever."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from convert_w4a8.errors import ConvertError, PlanError, Problem

_SECONDS = 0.5


def matches(pattern: str, text: str, setting: str) -> bool:
    """Whether a pattern of a setting matches at the beginning of a text.

    Raises:
        ConvertError: it is no regular expression.
        PlanError: it takes longer than half a second (noticed in the main thread only). It would for other texts, too.

    """
    try:
        with _time_limit():
            return re.match(pattern, text) is not None
    except (re.error, RecursionError, OverflowError) as error:
        reason = f"{pattern!r} is not a regular expression ({error})"
        raise ConvertError(f"quantization_config: {setting}", reason, "repair the pattern") from error
    except TimeoutError as error:
        reason = f"{pattern!r} takes too long to match {text!r}"
        raise PlanError([Problem(f"quantization_config: {setting}", reason, "repair the pattern")]) from error


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raise TimeoutError in what takes too long: `re` looks for signals while it matches. Restores other timers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, stop)
    before = signal.setitimer(signal.ITIMER_REAL, _SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)
