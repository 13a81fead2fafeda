"""What nodes are asked before the work begins, by functions that travel by value: any node can call them."""

from collections.abc import Callable

from convert_w4a8.errors import ClusterError
from convert_w4a8.version import __version__, install_command


def one_line(error: Exception) -> str:
    """Return an error as one line."""
    return next(iter(str(error).splitlines()), "")[:200] or type(error).__name__


def check_version(node: str, found: str | None) -> None:
    """Raise ClusterError where a node has another version of this package than we have, or none."""
    if found != __version__:
        reason = f"has w4a8-convert {found}, here is {__version__}" if found else "has no w4a8-convert"
        raise ClusterError(f"node {node}", reason, f"install {__version__} there: {install_command('ray')}")


def greeting() -> Callable[[str], str | None]:
    """Return a function that returns the version of this package on a node, and imports what tasks need.

    It travels by value, as functions inside of functions do: a node without this package can call it, too.
    """

    def greet(ours: str) -> str | None:
        try:
            from convert_w4a8.version import __version__ as theirs  # noqa: PLC0415
        except ImportError:
            return None
        if theirs == ours:
            import convert_w4a8.conversion.shard  # noqa: F401, PLC0415
        return str(theirs)

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
