"""Where the arithmetic runs: the devices of `--device`, and the one table of operations that kernels do.

Each operation is a folder of `kernels/` with a file for each kind of device: `gpu.py` (Triton), `cpu.py` (numba) and
`reference.py` (plain torch, on any device, many times slower). All of them give the same bytes, but for
`codebooks`, `training` and `blocks` on a GPU, which are as good. Where Triton or numba cannot work, the reference does
the work. Either compiles a kernel when it is first called, some seconds for all, and keeps it for later processes.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec
from types import CodeType, ModuleType
from typing import Any

import torch

from convert_w4a8.errors import ConvertError
from convert_w4a8.operations import Activations, Blocks, Codebooks, Codes, Gemm, Repack, Tables, Training

_OPERATIONS: Mapping[str, Mapping[str, str]] = {
    "repack": {"cuda": "gpu", "cpu": "cpu"},
    "codes": {"cuda": "gpu", "cpu": "cpu"},
    "tables": {"cuda": "gpu"},
    "gemm": {"cuda": "gpu"},
    "codebooks": {"cuda": "gpu", "cpu": "cpu"},
    "activations": {"cuda": "gpu"},
    "training": {"cuda": "gpu"},
    "blocks": {"cuda": "gpu"},
}
"""Which file of an operation serves which kind of device; `reference` serves the others."""
_COMPILERS = {"gpu": "Triton", "cpu": "numba", "reference": "torch"}
"""Whose kernels a file has."""
_missing: dict[str, str] = {}
"""Why a compiler cannot be used, once that was found out."""
_importing = threading.RLock()
_LEAST_CAPABILITY = (8, 0)
"""Triton supports GPUs of compute capability 8.0 and higher (its README); on older ones torch itself may not run."""


def activations(device: torch.device) -> Activations:
    """Return what quantizes activations on a device."""
    operations: Activations = _kernels("activations", device)
    return operations


def codebooks(device: torch.device) -> Codebooks:
    """Return what makes codebooks on a device."""
    operations: Codebooks = _kernels("codebooks", device)
    return operations


def repack(device: torch.device) -> Repack:
    """Return what changes packings on a device."""
    operations: Repack = _kernels("repack", device)
    return operations


def codes(device: torch.device) -> Codes:
    """Return what chooses codes on a device."""
    operations: Codes = _kernels("codes", device)
    return operations


def tables(device: torch.device) -> Tables:
    """Return what makes tables on a device."""
    operations: Tables = _kernels("tables", device)
    return operations


def gemm(device: torch.device) -> Gemm:
    """Return what multiplies by layers on a device."""
    operations: Gemm = _kernels("gemm", device)
    return operations


def training(device: torch.device) -> Training:
    """Return what trains layers on a device."""
    operations: Training = _kernels("training", device)
    return operations


def blocks(device: torch.device) -> Blocks:
    """Return what computes between the linear layers of blocks on a device."""
    operations: Blocks = _kernels("blocks", device)
    return operations


def why_not_compiled(device: torch.device) -> str | None:
    """Return why Triton cannot compile kernels for a device; None where it can."""
    if device.type != "cuda":
        return "there is no CUDA device"
    with _importing:
        return _triton_problem()


def resolve_device(name: str, option: str = "--device") -> torch.device:
    """Return the device that an option names; `auto` is CUDA where there is a GPU that Triton supports.

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
        raise ConvertError(f"{option} {name}", "is not a device", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConvertError(
            f"{option} {name}", f"there are {torch.cuda.device_count()} CUDA devices", f"use {option} cpu"
        )
    return device


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the host or on a GPU. torch raises RuntimeError for the host, by these words."""
    of_torch = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return of_torch or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def locked_memory(count: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Return memory of the host [count] that is locked, so that a GPU copies from and to it; None where there is none.

    torch keeps what is freed, and gives it again where no more is needed, in powers of two.
    """
    try:
        return torch.empty(count, dtype=dtype, pin_memory=True)
    except RuntimeError:  # the host does not lock so much
        return None


def kind_of(device: torch.device) -> str:
    """Return "cpu", or "cuda" and the GPU's name: devices of one kind give the same bytes, of `codebooks` too."""
    return device.type if device.type != "cuda" else f"cuda ({torch.cuda.get_device_name(device)})"


@dataclass(frozen=True)
class Kernel:
    """What does an operation: Triton, numba or torch. why_not: why it is not the first choice, or None where it is."""

    operation: str
    by: str
    why_not: str | None


def kernels_in_use(device: torch.device) -> list[Kernel]:
    """Return what does each operation on a device."""
    found = []
    for operation, files in _OPERATIONS.items():
        file = _kernels(operation, device).__name__.rpartition(".")[2]
        choice = _COMPILERS[files.get(device.type, "reference")]
        why_not = _missing.get(choice) if _COMPILERS[file] != choice else None
        found.append(Kernel(operation, _COMPILERS[file], why_not))
    return found


def must_compile(operations: Iterable[str], device: torch.device) -> bool:
    """Whether numba keeps nothing of an operation's kernels yet, so that the first layers wait for it."""
    for operation in operations:
        module = _kernels(operation, device)
        caches = [f._cache for f in vars(module).values() if hasattr(f, "_cache")]  # noqa: SLF001 - it has no other way
        if module.__name__.endswith(".cpu") and caches and not any(map(_keeps_something, caches)):
            return True
    return False


def _keeps_something(kept: Any) -> bool:
    try:
        return bool(kept._cache_file._load_index())  # noqa: SLF001 - empty if the source has changed since
    except (AttributeError, OSError):
        return True  # not known: then nothing is said


def _kernels(operation: str, device: torch.device) -> Any:
    """Return the module of an operation that serves a device."""
    file = _OPERATIONS[operation].get(device.type, "reference")
    works = {"gpu": _triton_works, "cpu": _numba_works}.get(file)
    if works is not None:
        with _importing:  # one thread finds out, and says what is missing
            works()
    return import_module(f"convert_w4a8.kernels.{operation}.{file if works is None or works() else 'reference'}")


@cache
def _triton_works() -> bool:
    """Return whether Triton can launch kernels; say once why not."""
    problem = _triton_problem()
    return problem is None or _without("Triton", problem)


@cache
def _triton_problem() -> str | None:
    """Return what Triton lacks: it needs a C compiler and Python's headers, not only a GPU."""
    if find_spec("triton") is None:
        return "it is not installed"
    try:
        import_module("triton.runtime").driver.active.get_current_target()  # compiles, if it never has
    except Exception as error:  # noqa: BLE001 - whatever it lacks, torch can do without
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None


@cache
def _numba_works() -> bool:
    """Return whether numba can compile kernels here and keep them."""
    try:
        _import_numba()
    except (ImportError, ValueError) as error:  # absent, a NumPy newer than it knows, or a variable it cannot read
        return _without("numba", str(error))
    try:
        import_module("convert_w4a8.kernels.repack.cpu")
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        return _without("numba", "there is no directory to keep compiled kernels in; set NUMBA_CACHE_DIR")
    return True


def _without(compiler: str, reason: str) -> bool:
    """Say once that a compiler cannot be used, and return False."""
    _missing[compiler] = reason
    logging.getLogger("convert_w4a8").warning(
        "%s cannot be used (%s): torch does the same work, many times slower", compiler, reason
    )
    return False


def _import_numba() -> None:
    """Import numba without the settings that it looks for in the working directory, which may be a checkpoint's.

    It reads `.numba_config.yaml` there when it is imported and whenever it compiles, and a cache directory named there
    may hold pickles. What NUMBA_… variables say still holds.
    """
    with _importing:
        finder = _NumbaConfigFinder()
        sys.meta_path.insert(0, finder)
        try:
            import_module("numba")
        finally:
            sys.meta_path.remove(finder)
        config = import_module("numba.core.config")
        if config._config_fname != os.devnull:  # noqa: SLF001 - somebody else imported it before
            vars(config)["_config_fname"] = os.devnull
            config._env_reloader.update(force=True)  # noqa: SLF001


class _NumbaConfigFinder(MetaPathFinder):
    """Finds `numba.core.config`, and nothing else, as it is but for the name of its settings file."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return where the module is, with a loader that changes it."""
        spec = PathFinder.find_spec(name, path, target) if name == "numba.core.config" else None
        if spec is not None and spec.origin is not None:
            spec.loader = _NumbaConfigLoader(name, spec.origin)
        return spec


class _NumbaConfigLoader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:  # noqa: ARG002
        """Compile the module; it has no other switch."""
        source = self.get_data(self.path).decode()
        code: CodeType = self.source_to_code(source.replace("'.numba_config.yaml'", repr(os.devnull)), self.path)
        return code
