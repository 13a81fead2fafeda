"""Where the arithmetic runs: the devices of `--device`, and the one table of operations that kernels do.

Each operation is a folder of `kernels/` with a file for each kind of device: `gpu.py` (Triton), `cpu.py` (numba) and
`reference.py` (plain torch, on any device, many times slower). All of them give the same bytes, but for
`codebooks` and `training` on a GPU, which are as good. Where Triton or numba cannot work, the reference does the work.
Either compiles a kernel when it is first called, some seconds for all, and keeps it for later processes.
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
from typing import Any, Protocol

import torch

from convert_w4a8.errors import ConvertError
from convert_w4a8.linear import Packing

_OPERATIONS: Mapping[str, Mapping[str, str]] = {
    "repack": {"cuda": "gpu", "cpu": "cpu"},
    "codes": {"cuda": "gpu", "cpu": "cpu"},
    "tables": {"cuda": "gpu"},
    "gemm": {"cuda": "gpu"},
    "codebooks": {"cuda": "gpu", "cpu": "cpu"},
    "activations": {"cuda": "gpu"},
    "training": {"cuda": "gpu"},
}
"""Which file of an operation serves which kind of device; `reference` serves the others."""
_COMPILERS = {"gpu": "Triton", "cpu": "numba", "reference": "torch"}
"""Whose kernels a file has."""
_missing: dict[str, str] = {}
"""Why a compiler cannot be used, once that was found out."""
_importing = threading.RLock()
_LEAST_CAPABILITY = (8, 0)
"""Triton supports GPUs of compute capability 8.0 and higher (its README); on older ones torch itself may not run."""


class Repack(Protocol):
    """Codes from one packing into another."""

    def reorder(self, packed: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Encode and reorder the codes of an [N, K] layer into the kernel's order, int32 [K/32, 4·N]."""

    def restore(self, reordered: torch.Tensor) -> torch.Tensor:
        """Invert `reorder`: int32 [N, K/8], as compressed-tensors packs codes."""

    def to_pack_quantized(self, packed: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return the codes of another packing as compressed-tensors packs them, int32 [N, K/8]."""


class Codes(Protocol):
    """New codes, scales and table entries for groups of values; `quantization/groups.py` describes these."""

    def gather(
        self, packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return values, counts, importances and letters of groups of 128.

        packed: int32 [n, K/8]. zeros: uint8 [n, K/128]. scales: float32 [n, K/128]. importance: float32 [K].
        """

    def add_energies(
        self, packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, energies: torch.Tensor
    ) -> None:
        """Add the squares of the weights of groups of 128 to `energies`, float64 [K]; arguments as for `gather`."""

    def fit_symmetric(
        self,
        values: torch.Tensor,
        importance: torch.Tensor,
        kept: torch.Tensor,
        candidates: list[float],
        codes: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        """Choose symmetric codes uint8 [R, V] and scales float32 [R] for the groups that are not kept, in place."""

    def refit(
        self,
        values: torch.Tensor,
        counts: torch.Tensor,
        importance: torch.Tensor,
        kept: torch.Tensor,
        channel_scale: torch.Tensor,
        codes: torch.Tensor,
        tables: torch.Tensor,
        rounds: int,
    ) -> tuple[float, float]:
        """Fit codes uint8 [R, V] and tables float8_e4m3fn [R, 8] of the groups that are not kept, in place.

        Returns the energy of the values, and that of their difference from what they became, of all groups.
        """

    def spell(self, letters: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the codes uint8 [R, 16] of the letters uint8 [R, 128], eight a word: int32 [R, 16]."""


class Tables(Protocol):
    """FP8 lookup tables."""

    def expand_tables(self, group_scale: torch.Tensor) -> torch.Tensor:
        """Expand group scales float8_e4m3fn [G, N] to tables float8_e4m3fn [G, N, 8]."""


class Gemm(Protocol):
    """Products with a layer in the LUT layout."""

    def gemm(
        self,
        tokens: torch.Tensor,
        token_scale: torch.Tensor,
        packed: torch.Tensor,
        tables: torch.Tensor,
        channel_scale: torch.Tensor,
    ) -> torch.Tensor:
        """Multiply FP8 activations by a layer; bfloat16 [M, N].

        tokens: float8_e4m3fn [M, K]. token_scale: float32 [M, 1]. packed: int32 [K/32, 4·N]; N a multiple of 16, K of
        128. tables: float8_e4m3fn [K/128, N, 8]. channel_scale: float32 [N].

        output[m, n] = token_scale[m] · channel_scale[n] · Σ_k tokens[m, k] · weight[n, k], summed in float32.
        """


class Codebooks(Protocol):
    """Codebooks and codes for R groups of 128 weights; `kernels/codebooks/reference.py` has the formulas.

    Values are in units of the channel scale, float32 [R, 128]; row r has the importances in row r % C of float64
    [C, 128], and the factor or moment r % C of float64 [C, 128, 128]. Entries are float64 [R, 8], codes uint8 [R, 128].
    """

    def fit(self, values: torch.Tensor, importance: torch.Tensor, rounds: int) -> torch.Tensor:
        """Return the entries, not rounded, with the least weighted squared error."""

    def refine(
        self, values: torch.Tensor, importance: torch.Tensor, entries: torch.Tensor, codes: torch.Tensor, passes: int
    ) -> None:
        """Round entries to E4M3 and improve them, in place, and choose the nearest codes."""

    def fit_scale(
        self,
        values: torch.Tensor,
        importance: torch.Tensor,
        scales: torch.Tensor,
        limits: torch.Tensor,
        codes: torch.Tensor,
    ) -> torch.Tensor:
        """Return the entries of the best FP8 scales near `scales`, float32 [R]; choose the nearest codes.

        limits: the least and the largest byte that a scale may have without its sign, uint8 [R, 2].
        """

    def feedback(
        self,
        goal: torch.Tensor,
        start: torch.Tensor,
        factor: torch.Tensor,
        entries: torch.Tensor,
        codes: torch.Tensor,
        errors: torch.Tensor,
    ) -> None:
        """Choose codes one column after the other, each column's error made up for by those after it.

        goal: what to approximate. start: `goal` with the errors of earlier groups made up for. factor: float64
        [C, 128, 128]. errors: what the codes mean less `goal`, float32 [R, 128], filled.
        """

    def descend(
        self,
        goal: torch.Tensor,
        gradient: torch.Tensor,
        moment: torch.Tensor,
        entries: torch.Tensor,
        codes: torch.Tensor,
        errors: torch.Tensor,
        rounds: int,
        free: bool,
    ) -> None:
        """Improve codes, and entries if they are `free`, in place, one at a time, under the second moment.

        gradient: half that of the objective, float32 [R, 128]. moment: float64 [C, 128, 128]. errors: filled as above.
        """


class Activations(Protocol):
    """Quantization of activations per token, alone or with what comes before; see `kernels/activations/reference.py`.

    All return tokens float8_e4m3fn [terms·M, K] and scales float32 [M, 1].
    """

    def quantize(self, x: torch.Tensor, terms: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize bfloat16 [M, K]."""

    def silu_quantize(self, gate_up: torch.Tensor, terms: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize silu(gate) · up of bfloat16 [M, 2·K]."""

    def norm_quantize(
        self, x: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quantize the RMS norm of bfloat16 [M, K]; weight: bfloat16 [K]."""

    def add_norm_quantize(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float, terms: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize the RMS norm of x + residual; the third result is that sum, bfloat16 [M, K]."""


class Training(Protocol):
    """What training a layer computes beside matrix products; `kernels/training/reference.py` describes these."""

    def quantize(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Quantize bfloat16 [M, K] by token: float8_e4m3fn, the same in bfloat16, scales float32 [M, 1]."""

    def scale_outputs(self, sums: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor) -> torch.Tensor:
        """Return bf16(s·(C·sums)), bfloat16 [M, N], of float32 [M, N]; scales float32 [M, 1] and [N]."""

    def scale_gradients(
        self, gradient: torch.Tensor, token_scale: torch.Tensor, channel_scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bf16(gradient·C) and bf16(gradient·s) of bfloat16 [M, N]."""

    def look_up(self, entries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return entries float32 [N, G, 8] by codes uint8 [N, K]: bfloat16 [N, K]."""

    def choose(
        self, weights: torch.Tensor, factor: torch.Tensor, entries: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the codes uint8 [N, K] of the values nearest to weights·factor, and these, bfloat16 [N, K]."""

    def sum_by_entry(self, gradient: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Return the gradient of entries, float32 [N, G, 8], from that of weights, float32 [N, K]."""

    def divergence(
        self, student: torch.Tensor, teacher: torch.Tensor, *, with_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return KL(teacher ‖ student) of each token, float32 [T], of logits [T, V], and its gradient."""

    def adam(
        self,
        value: torch.Tensor,
        gradient: torch.Tensor,
        first: torch.Tensor,
        second: torch.Tensor,
        rounded: torch.Tensor | None,
        numbers: torch.Tensor,
    ) -> None:
        """Take a step of Adam, in place."""


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


def why_not_compiled(device: torch.device) -> str | None:
    """Return why Triton cannot compile kernels for a device; None where it can."""
    if device.type != "cuda":
        return "there is no CUDA device"
    with _importing:
        return _triton_problem()


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
