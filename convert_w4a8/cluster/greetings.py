"""What nodes are asked before the work begins, by functions that travel by value: any node can call them."""

import os
from collections.abc import Callable
from typing import Any

from convert_w4a8.errors import ClusterError
from convert_w4a8.version import __version__, install_command


def one_line(error: Exception) -> str:
    """Return an error as one line."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def check_version(node: str, found: str | None, problem: str = "") -> None:
    """Raise ClusterError where a node has another version of this package, none, or one that it cannot import."""
    if found is not None and found != __version__:
        reason = f"has w4a8-convert {found}, here is {__version__}"
    elif problem:
        reason = f"cannot import w4a8-convert or what it needs ({problem})"
    elif found is None:
        reason = "has no w4a8-convert"
    else:
        return
    raise ClusterError(f"node {node}", reason, f"install {__version__} there: {install_command('ray')}")


def greeting() -> Callable[[str, bool], tuple[str | None, str]]:
    """Return a function that returns the version of this package on a node, and why it cannot be used.

    It imports what tasks need, if that is asked for.
    """

    def greet(ours: str, imports: bool) -> tuple[str | None, str]:
        theirs: str | None = None
        try:
            from convert_w4a8 import version  # noqa: PLC0415

            theirs = version.__version__
            if imports and theirs == ours:
                from convert_w4a8.startup import import_torch  # noqa: PLC0415

                import_torch()
                import torch  # noqa: PLC0415

                import convert_w4a8.conversion.shard  # noqa: F401, PLC0415
                from convert_w4a8.devices import repack  # noqa: PLC0415

                repack(torch.device("cpu"))  # imports numba
        except ModuleNotFoundError as error:
            return theirs, "" if error.name == "convert_w4a8" else f"{error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, the node is at fault
            return theirs, f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return theirs, ""

    return greet


def gpu_names() -> Callable[[], tuple[list[str], str]]:
    """Return a function that returns the names of a node's GPUs, and why there are none. It travels by value."""

    def names() -> tuple[list[str], str]:
        try:
            import torch  # noqa: PLC0415

            return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())], ""
        except Exception as error:  # noqa: BLE001 - whatever it is, the node is at fault
            return [], f"{type(error).__name__}: {error}".splitlines()[0][:200]

    return names


def name_of_gpu(number: str) -> str:
    """Return how torch calls a GPU in this process. number: as Ray and CUDA_VISIBLE_DEVICES have it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return f"cuda:{visible.split(',').index(number) if visible else int(number)}"


def holder() -> type[Any]:
    """Return a class whose actor has a GPU, and does nothing with it. It travels by value."""

    class Holder:
        def number(self) -> str:
            """Return the GPU as Ray calls it."""
            import ray  # noqa: PLC0415

            (found,) = map(str, ray.get_gpu_ids())
            return found

    return Holder
