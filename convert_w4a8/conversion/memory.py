"""Whether the largest layer fits into the memory that there is, and what the system says when it does not."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from convert_w4a8.conversion.layer import layer_memory
from convert_w4a8.conversion.plan import Plan
from convert_w4a8.devices import is_out_of_memory
from convert_w4a8.errors import ConvertError, DiskError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def available_memory() -> int | None:
    """Return the bytes that this process may still take: of the machine, its control group, its own limit."""
    found = []
    with suppress(OSError, KeyError, ValueError):  # another system
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) << 10)
    with suppress(OSError, ValueError):  # no limit
        found.append(int(_CGROUP.read_text()))
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        found.append(max(0, limit - _address_space()))
    return min(found, default=None)


def _address_space() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def check_memory(plan: Plan) -> None:
    """Check that the largest layer fits into memory.

    Raises:
        ConvertError: it does not.

    """
    available = available_memory()
    if available is None or not plan.layers:
        return
    largest = max(plan.layers, key=layer_memory)
    if layer_memory(largest) > available:
        raise ConvertError(
            largest.module,
            f"needs {layer_memory(largest):,} bytes of memory, there are {available:,}",
            "convert it on a machine with more memory",
        )


@contextmanager
def memory_errors(
    subject: str, what: str = "", remedy: str = "convert it on a machine with more memory", *, of_gpu: bool = False
) -> Iterator[None]:
    """Turn a failed allocation into one line.

    what: the parts of the subject, for the line. of_gpu: also one on a GPU, which is raised as it is otherwise.

    Raises:
        DiskError: there is not enough memory, which may be so on one machine and not on another.

    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or (isinstance(error, torch.OutOfMemoryError) and not of_gpu):
            raise
        reason = f"does not fit into the memory that there is{what and f': {what}'}"
        raise DiskError(subject, reason, remedy) from error
