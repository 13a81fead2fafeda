"""Ray's import, and what it does to the process that connects to it, kept from it: messages, handlers, paths."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from convert_w4a8.cluster.greetings import one_line
from convert_w4a8.errors import ConvertError
from convert_w4a8.version import install_command


def load_ray() -> Any:
    """Import Ray, which is an extra.

    Raises:
        ConvertError: it is not installed, or cannot be imported.

    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported and when it starts
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    try:
        import ray  # noqa: PLC0415  (an extra; it takes half a second)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == "ray"
        reason = "is not installed" if absent else f"cannot be imported ({one_line(error)})"
        raise ConvertError("--ray", f"needs ray, which {reason}", install_command("ray")) from error
    return ray


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
