"""The CPU kernels that numba compiles, where it is installed: `pip install 'w4a8-convert[fast]'`.

Each does what torch operations do beside its call, to the bit, several times as fast; without numba these do the work.
numba compiles a kernel when it is first called, some seconds for all, and keeps it for later processes.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch


def cpu_kernels(name: str, device: torch.device) -> ModuleType | None:
    """Return `kernels/cpu_<name>.py`, or None for another device or where numba is not to be had."""
    return _load(name) if device.type == "cpu" else None


@cache
def _load(name: str) -> ModuleType | None:
    if find_spec("numba") is None:
        return None
    try:
        import_module("numba")
    except ImportError:  # it refuses a NumPy newer than it knows
        return None
    try:
        return import_module(f"convert_w4a8.kernels.cpu_{name}")
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        return None  # no directory to keep it in: compiling every time would take longer than it saves
