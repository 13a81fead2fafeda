"""What this machine has: versions, cores, memory, GPUs, kernels, caches. What is broken is said, not raised."""

import logging
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from convert_w4a8.text import human_bytes, printable
from convert_w4a8.version import __version__

_PACKAGES = ("torch", "numpy", "numba", "triton", "safetensors", "huggingface_hub", "click", "matplotlib", "vllm")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMINFO = Path("/proc/meminfo")


def environment() -> dict[str, Any]:
    """Return all of it, ready for JSON."""
    notes: list[str] = []
    with _silence():
        gpus = _try(_gpus, notes, "GPUs", [])
        device, workers, kernels = _try(_kernels, notes, "kernels", (None, None, []))
        caches = {name: _try(find, notes, f"{name} cache", None) for name, find in _CACHES.items()}
    return {
        "versions": _versions(),
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "usable_cores": _usable_cores()},
        "memory": _memory(),
        "gpus": gpus,
        "device": device,
        "workers": workers,
        "kernels": kernels,
        "caches": caches,
        "notes": notes,
    }


def as_text(found: Mapping[str, Any]) -> str:
    """Render it for people."""
    cpu, memory = found["cpu"], found["memory"]
    sizes = {name: "not known" if size is None else human_bytes(size) for name, size in memory.items()}
    limit = f", limited to {sizes['limit_bytes']}" if memory["limit_bytes"] is not None else ""
    lines = [_line(name, version or "not installed") for name, version in found["versions"].items()]
    lines += [
        _line("platform", found["platform"]),
        _line("cores", f"{cpu['cores']}, of which {cpu['usable_cores']} can be used"),
        _line("memory", f"{sizes['total_bytes']}, {sizes['available_bytes']} available{limit}"),
    ]
    lines += [
        _line(
            f"GPU {gpu['index']}", f"{gpu['name']}, capability {gpu['capability']}, {human_bytes(gpu['memory_bytes'])}"
        )
        for gpu in found["gpus"]
    ] or [_line("GPU", "none that torch can use")]
    lines += [_line("device", f"{found['device']} (what --device auto takes), {found['workers']} workers")]
    lines += kernel_lines(found["kernels"])
    places = found["caches"].items()
    lines += [
        _line("temporary files" if name == "temporary" else f"{name} cache", place or "-") for name, place in places
    ]
    return "\n".join([*lines, *(_line("note", note) for note in found["notes"])])


def kernel_lines(kernels: Sequence[Mapping[str, Any]]) -> list[str]:
    """Render what does each operation on each device."""
    lines = []
    for device in dict.fromkeys(kernel["device"] for kernel in kernels):
        ours = [kernel for kernel in kernels if kernel["device"] == device]
        uses = ", ".join(f"{kernel['operation']} by {kernel['by']}" for kernel in ours)
        lines.append(_line("kernels", f"on {device}: {uses}"))
        reasons = dict.fromkeys(kernel["why_not"] for kernel in ours if kernel["why_not"])
        lines += [_line("", f"not compiled, so many times slower: {reason}") for reason in reasons]
    return lines


def start_lines(device: Any, workers: int) -> list[str]:
    """Return what --verbose says at the beginning, of the device that was chosen."""
    from convert_w4a8.devices import kernels_in_use

    versions = ", ".join(f"{name} {version}" for name, version in _versions().items() if version)
    kernels = [{"device": device.type, **vars(kernel)} for kernel in kernels_in_use(device)]
    return [
        _line("versions", versions),
        _line("device", f"{device}, {workers} workers, {_usable_cores()} of {os.cpu_count()} cores"),
        *kernel_lines(kernels),
    ]


def _line(head: str, text: str) -> str:
    return f"{head:<15} {printable(text)}"


def _versions() -> dict[str, str | None]:
    """Return versions by package without importing any; None where one is not installed.

    That of torch, if it is imported, says for what it was built: 2.13.0+cu130.
    """
    found: dict[str, str | None] = {"w4a8-convert": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
            if name == "torch":
                found[name] = getattr(sys.modules.get(name), "__version__", found[name])
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory() -> dict[str, int | None]:
    """Return bytes: of the machine, free for new work, and the limit of the container if there is one."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        total, available = (int(lines[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return {"total_bytes": None, "available_bytes": None, "limit_bytes": None}
    try:
        limit = int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # "max": there is none
        return {"total_bytes": total, "available_bytes": available, "limit_bytes": None}
    return {"total_bytes": total, "available_bytes": available, "limit_bytes": limit}


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _kernels() -> tuple[str, int, list[dict[str, Any]]]:
    """Return the device that `auto` takes, how many workers there are, and what does each operation."""
    import torch

    from convert_w4a8.conversion.jobs import worker_count
    from convert_w4a8.devices import kernels_in_use, resolve_device

    device = resolve_device("auto")
    kinds = dict.fromkeys(("cpu", device.type))
    return (
        str(device),
        worker_count(),
        [{"device": kind, **vars(kernel)} for kind in kinds for kernel in kernels_in_use(torch.device(kind))],
    )


def _hub_cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _numba_cache() -> str | None:
    """Return where a CPU kernel is kept."""
    import torch

    from convert_w4a8.devices import repack

    module = repack(torch.device("cpu"))
    caches = (getattr(kernel, "_cache", None) for kernel in vars(module).values())
    paths = (getattr(kept, "cache_path", None) for kept in caches)
    return next((str(path) for path in paths if path), None)


def _triton_cache() -> str:
    return os.environ.get("TRITON_CACHE_DIR") or str(Path.home() / ".triton" / "cache")


_CACHES: Mapping[str, Callable[[], str | None]] = {
    "hub": _hub_cache,
    "numba": _numba_cache,
    "triton": _triton_cache,
    "temporary": tempfile.gettempdir,
}


def _try(find: Callable[[], Any], notes: list[str], what: str, otherwise: Any) -> Any:
    """Return what is found; where it fails, whatever the reason, note that and return something else."""
    try:
        return find()
    except Exception as error:  # noqa: BLE001 - a broken installation is what somebody looks for here
        first = next(iter(str(error).splitlines()), "")
        notes.append(f"{what}: not known ({type(error).__name__}: {first})")
        return otherwise


@contextmanager
def _silence() -> Iterator[None]:
    """Keep warnings away: what they say is in the result."""
    logger = logging.getLogger("convert_w4a8")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
