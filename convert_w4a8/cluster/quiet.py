"""What Ray does to the process that connects to it, kept from it: its messages, its handlers, its paths."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def muted(ray: Any) -> Iterator[None]:
    """Keep Ray from printing: what matters is said by us, in one line.

    Of lost nodes it prints on stdout, where a JSON document may be; there is no public way to keep it from that.
    """
    logger, worker = logging.getLogger("ray"), vars(ray._private.worker)  # noqa: SLF001
    level, printer = logger.level, worker["print_to_stdstream"]
    logger.setLevel(logging.CRITICAL)
    worker["print_to_stdstream"] = _print_nothing
    try:
        yield
    finally:
        logger.setLevel(level)
        worker["print_to_stdstream"] = printer


def _print_nothing(*_arguments: Any, **_keywords: Any) -> None:
    """Stand for what prints Ray's messages."""


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep what Ray changes of this process when it begins, and the working directory out of its workers' path.

    Ray sets a handler of SIGTERM of its own, and lets workers import modules from the directory that the driver
    works in, which may be a checkpoint's.
    """
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM) if is_main else None
    descriptor = os.open(".", os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.chdir("/")
        yield
    finally:
        os.fchdir(descriptor)
        os.close(descriptor)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)
