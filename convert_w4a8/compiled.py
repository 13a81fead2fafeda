"""The compiled kernels: Triton's on a CUDA GPU, numba's on a CPU (`pip install 'w4a8-convert[fast]'`).

Each does what torch operations do beside its call, to the bit, many times as fast; without them these do the work.
Either compiles a kernel when it is first called, some seconds for all, and keeps it for later processes.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

_LIBRARIES = {"cuda": ("triton", "convert_w4a8.kernels."), "cpu": ("numba", "convert_w4a8.kernels.cpu_")}


def kernels(name: str, device: torch.device) -> ModuleType | None:
    """Return `kernels/<name>.py` or `kernels/cpu_<name>.py`; None where what compiles them is not to be had."""
    return _load(name, device.type) if device.type in _LIBRARIES else None


@cache
def _load(name: str, device_type: str) -> ModuleType | None:
    library, prefix = _LIBRARIES[device_type]
    if find_spec(library) is None:
        return None
    try:
        import_module(library)
    except ImportError:  # numba refuses a NumPy newer than it knows
        return None
    try:
        return import_module(prefix + name)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        return None  # no directory to keep it in: compiling every time would take longer than it saves
