"""The CPU kernels that numba compiles, where it is installed: `pip install 'w4a8-convert[fast]'`.

Each does what a torch reference does, to the bit, several times as fast; without numba the references do the work.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


@cache
def cpu_kernels(name: str) -> ModuleType | None:
    """Return `kernels/cpu_<name>.py`, or None where there is no numba that works with this NumPy."""
    if find_spec("numba") is None:
        return None
    try:
        import_module("numba")
    except ImportError:  # it refuses a NumPy newer than it knows
        return None
    return import_module(f"convert_w4a8.kernels.cpu_{name}")
