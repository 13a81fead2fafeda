"""A Ray that is started for one command, on this machine: only what carries out tasks, without what watches it.

A process of its own starts it, `python -m convert_w4a8.cluster.local`, so that the command goes on meanwhile. That
process says the address on its stdout, and ends with all that it started when its stdin does: when the command ends,
however that comes.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from convert_w4a8.cluster.greetings import one_line
from convert_w4a8.cluster.quiet import load_ray, muted
from convert_w4a8.errors import ConvertError


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


STORE_BYTES = _store_bytes()
"""What is kept for Ray's objects, of memory that tasks do not get."""
_UNUSED = ("start_api_server", "start_monitor", "start_log_monitor")
"""Processes of a head that show things, scale a cluster, and bring logs to the driver; each imports Ray in Python."""
_SETTINGS = {
    "RAY_prestart_worker_first_driver": "0",  # it would begin a process a core; a task has several
    "RAY_enable_worker_prestart": "0",
    "RAY_raylet_client_connect_timeout_milliseconds": "50",  # it waits so long, and tries again
    "RAY_raylet_client_num_connect_attempts": "200",
}
_AUTH = "RAY_AUTH_MODE"
"""Whether Ray wants a token, which it keeps in the home directory; of one that it starts, it does by default."""
_END_SECONDS = 10.0
_PR_SET_CHILD_SUBREAPER = 36


class LocalRay:
    """A Ray on this machine; no process of it is left when a `with` block of it ends. Its processes work in `/`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._address: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process is None:
            return
        if self._address is not None:  # else it is in the middle of starting processes
            with suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=_END_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def begin(self) -> None:
        """Begin to start it."""
        self._process = subprocess.Popen(  # noqa: S603 - this Python, with our arguments
            [sys.executable, "-P", "-m", __name__],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group that can be killed, and that no key of the terminal interrupts
        )

    def address(self) -> str:
        """Return its address, as soon as it has begun.

        Raises:
            ConvertError: it cannot begin.

        """
        if self._process is None:
            self.begin()
        assert self._process is not None
        assert self._process.stdout is not None
        while self._address is None:
            line = self._process.stdout.readline()
            said = {"problem": "its first process ended"} if not line else _said(line)
            if "problem" in said:
                raise ConvertError("--ray local", f"cannot be started ({said['problem']})", "free memory and /dev/shm")
            self._address = said.get("address")
            if said.get("auth"):
                os.environ.setdefault(_AUTH, said["auth"])
                if "ray" in sys.modules:  # it has read its environment
                    sys.modules["ray"]._raylet.Config.initialize("")  # noqa: SLF001 - as Ray does, where it starts one
        return self._address


def cores() -> int:
    """Return how many CPUs a Ray on this machine has: those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def lean(ray: Any) -> Iterator[dict[str, Any]]:
    """Let `ray.init` start no more than is needed, in the block; yields more arguments for it.

    There is no public way to leave out these processes, which take a second and two of a processor; where Ray calls
    them otherwise, they are started.
    """
    node = ray._private.node.Node  # noqa: SLF001
    kept = {name: vars(node)[name] for name in _UNUSED if name in vars(node)}
    added = [name for name in _SETTINGS if name not in os.environ]
    os.environ.update({name: _SETTINGS[name] for name in added})
    for name in kept:
        setattr(node, name, _start_nothing)
    cpus = {"num_cpus": cores()} if cores() < (os.cpu_count() or 1) else {}  # Ray counts those of the machine
    try:
        yield {"include_dashboard": False, "object_store_memory": STORE_BYTES, **cpus}
    finally:
        for name, function in kept.items():
            setattr(node, name, function)
        for name in added:
            os.environ.pop(name, None)


def _start_nothing(*_arguments: Any, **_keywords: Any) -> None:
    """Stand for what starts a process."""


def _said(line: bytes) -> dict[str, str]:
    """Return what a line says; nothing where it is not ours."""
    with suppress(ValueError):
        found = json.loads(line)
        if isinstance(found, dict):
            return found
    return {}


def _adopt_orphans() -> None:
    """Become the parent of what our processes leave behind, so that it can be ended and waited for; Linux has that."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_children() -> None:
    """Kill all processes that this one started, and what those leave behind."""
    if not Path("/proc/self").exists():  # another system: this process, too
        os.killpg(0, signal.SIGKILL)
    with suppress(ChildProcessError):
        while True:
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError, IndexError):
                    if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                        os.kill(int(process.name), signal.SIGKILL)
            os.wait()


def main() -> None:
    """Start Ray, say its address, and end all of it when stdin ends."""
    _adopt_orphans()
    try:
        ray = load_ray()
        with muted(ray), lean(ray) as keywords:
            ray.init(address="local", log_to_driver=False, configure_logging=False, **keywords)
        said = {"address": ray.get_runtime_context().gcs_address, "auth": os.environ.get(_AUTH, "")}
    except Exception as error:  # noqa: BLE001 - whatever it is, the command says it
        said = {"problem": one_line(error)}
    with suppress(OSError):
        sys.stdout.write(f"{json.dumps(said)}\n")
        sys.stdout.flush()
        sys.stdin.read()
    _end_children()
    os._exit(0)  # not what Ray does at exit: there is nothing any more that it could end


if __name__ == "__main__":
    main()
