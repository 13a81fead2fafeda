"""A connection to a Ray cluster, or to a local Ray that lives as long as a command."""

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from convert_w4a8.cluster.greetings import one_line
from convert_w4a8.cluster.local import LocalRay, cores
from convert_w4a8.cluster.nodes import LOCAL, MOST_THREADS, Cluster, LocalCluster
from convert_w4a8.cluster.quiet import load_ray, muted, undisturbed
from convert_w4a8.errors import ConvertError

_NOTED = Path("/tmp/ray/ray_current_cluster")  # noqa: S108 - where Ray notes the address of a cluster on this machine
_ANSWER_SECONDS = 10.0
_START = "start the cluster (`ray start`), or give the host:port of its head"
_FREE = "free memory and /dev/shm"


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """Connect to a cluster, by host:port or "auto", or start a local Ray; nothing of that is left at the end.

    A local Ray begins meanwhile, where there are CPUs for more processes than this one; otherwise when it is needed.

    Raises:
        ConvertError: Ray is not installed, or there is no cluster at this address; of a local Ray where it is needed.

    """
    if address.startswith("ray://"):
        raise ConvertError(
            f"--ray {address}",
            "is for Ray's client, which sees no files of the cluster",
            "run this on a machine of the cluster, and give its host:port, or auto",
        )
    with ExitStack() as stack:
        if address == LOCAL:
            if find_spec("ray") is None:
                load_ray()
            local = stack.enter_context(LocalRay())
            if cores() > MOST_THREADS:
                local.begin()
            yield LocalCluster(lambda: stack.enter_context(_connection(local.address(), f"--ray {LOCAL}", _FREE)))
        else:
            load_ray()
            _check_answers(address)
            yield Cluster(stack.enter_context(_connection(address, f"--ray {address}", _START)))


@contextmanager
def _connection(address: str, subject: str, remedy: str) -> Iterator[Any]:
    """Connect to a cluster, and yield Ray, which is silent meanwhile. subject, remedy: for what is said if that fails.

    Raises:
        ConvertError: that fails.

    """
    ray = load_ray()
    if ray.is_initialized():
        raise ConvertError("--ray", "this process uses Ray already", "call ray.shutdown() before")
    with muted(ray):
        try:
            with undisturbed():
                ray.init(address=address, log_to_driver=False, configure_logging=False, namespace="w4a8-convert")
        except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
            with contextlib.suppress(Exception):
                ray.shutdown()
            raise ConvertError(subject, f"cannot be reached ({one_line(error)})", remedy) from error
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """Raise ConvertError where nobody listens, which Ray tries for minutes; "auto" is what is noted on this machine."""
    noted = os.environ.get("RAY_ADDRESS", "")
    if address == "auto" and not noted:
        with contextlib.suppress(OSError, UnicodeError):
            noted = _NOTED.read_text().strip()
    host, _, port = (noted if address == "auto" else address).rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _ANSWER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = f"cannot be reached ({getattr(error, 'strerror', None) or error})"
        raise ConvertError(f"--ray {address}", reason, _START) from error
