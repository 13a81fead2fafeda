"""A Ray that is started for one command, on this machine: only what carries out tasks, without what watches it."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from convert_w4a8.startup import import_torch


def _store_bytes() -> int:
    """Return how much shared memory Ray's objects may take: a part of what is free, which is taken as it is used.

    Tasks of a conversion are small. Those of a calibration bring weights and inputs of some experts, which are hundreds
    of MB; what the store does not hold goes through files, and takes several times as long.
    """
    least, most = 128 << 20, 4 << 30
    try:
        shared = os.statvfs("/dev/shm")  # noqa: S108 - where Ray puts it
    except OSError:  # another system
        return least
    return max(least, min(most, shared.f_bavail * shared.f_frsize // 8))


_STORE_BYTES = _store_bytes()
_UNUSED = ("start_api_server", "start_monitor", "start_log_monitor")
"""Processes of a head that show things, scale a cluster, and bring logs to the driver; each imports Ray in Python."""
_SETTINGS = {
    "RAY_prestart_worker_first_driver": "0",  # it would begin a process a core; a task has several
    "RAY_enable_worker_prestart": "0",
    "RAY_raylet_client_connect_timeout_milliseconds": "50",  # it waits so long, and tries again
    "RAY_raylet_client_num_connect_attempts": "200",
}


@contextmanager
def lean(ray: Any) -> Iterator[dict[str, Any]]:
    """Let `ray.init` start no more than is needed, in the block, while torch is imported; yields more arguments for it.

    There is no public way to leave out these processes, which take a second and two of a processor; where Ray calls
    them otherwise, they are started.
    """
    node = ray._private.node.Node  # noqa: SLF001
    kept = {name: vars(node)[name] for name in _UNUSED if name in vars(node)}
    added = [name for name in _SETTINGS if name not in os.environ]
    os.environ.update({name: _SETTINGS[name] for name in added})
    for name in kept:
        setattr(node, name, _start_nothing)
    importing = threading.Thread(target=_import_torch)
    importing.start()
    cores = len(os.sched_getaffinity(0))  # which Ray does not look at
    cpus = {"num_cpus": cores} if cores < (os.cpu_count() or 1) else {}
    try:
        yield {"include_dashboard": False, "object_store_memory": _STORE_BYTES, **cpus}
    finally:
        importing.join()
        for name, function in kept.items():
            setattr(node, name, function)
        for name in added:
            os.environ.pop(name, None)


def _import_torch() -> None:
    with suppress(Exception):  # who needs torch says why it cannot be imported
        import_torch()


def _start_nothing(*_arguments: Any, **_keywords: Any) -> None:
    """Stand for what starts a process."""
