"""The compiled kernels: Triton's on a CUDA GPU, numba's on a CPU (`pip install 'w4a8-convert[fast]'`).

Each does what torch operations do beside its call, to the bit, many times as fast; without them these do the work.
Either compiles a kernel when it is first called, some seconds for all, and keeps it for later processes.
"""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

from convert_w4a8.errors import ConvertError


def kernels(name: str, device: torch.device) -> ModuleType | None:
    """Return `kernels/<name>.py` or `kernels/cpu_<name>.py`; None where what compiles them is not to be had."""
    match device.type:
        case "cuda":
            return import_module(f"convert_w4a8.kernels.{name}") if _triton_works() else None
        case "cpu":
            return _cpu_kernels(name)
        case _:
            return None


@cache
def _triton_works() -> bool:
    """Return whether Triton can launch kernels: it needs a C compiler and Python's headers, not only a GPU."""
    if find_spec("triton") is None:
        return False
    try:
        import_module("triton.runtime").driver.active.get_current_target()  # compiles, if it never has
    except Exception:  # noqa: BLE001 - whatever it lacks, we can do without
        return False
    return True


@cache
def _cpu_kernels(name: str) -> ModuleType | None:
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


_LEAST_CAPABILITY = (8, 0)
"""Triton supports GPUs of compute capability 8.0 and higher (its README); on older ones torch itself may not run."""


def resolve_device(name: str) -> torch.device:
    """Return the device that `--device` names; `auto` is CUDA where there is a GPU that Triton supports.

    Raises:
        ConvertError: there is no such device.

    """
    if name == "auto":
        usable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= _LEAST_CAPABILITY
        return torch.device("cuda" if usable else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConvertError(f"--device {name}", "is not a device", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConvertError(
            f"--device {name}", f"there are {torch.cuda.device_count()} CUDA devices", "use --device cpu"
        )
    return device
