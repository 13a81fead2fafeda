"""The CPU kernels that numba compiles, where it is installed: `pip install 'w4a8-convert[fast]'`.

Each does what torch operations do beside its call, to the bit, several times as fast; without numba these do the work.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch


def cpu_kernels(name: str, device: torch.device) -> ModuleType | None:
    """Return `kernels/cpu_<name>.py`, or None for another device or where numba is not to be had."""
    return import_module(f"convert_w4a8.kernels.cpu_{name}") if device.type == "cpu" and _has_numba() else None


@cache
def _has_numba() -> bool:
    if find_spec("numba") is None:
        return False
    try:
        import_module("numba")
    except ImportError:  # it refuses a NumPy newer than it knows
        return False
    return True
