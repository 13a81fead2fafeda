"""What the extra `evaluate` brings, imported by what needs it."""

from importlib import import_module
from typing import Any

from convert_w4a8.errors import ConvertError
from convert_w4a8.version import install_command


def library(module: str, package: str) -> Any:
    """Return a library of the extra `evaluate`. Raises ConvertError if it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConvertError(
            "w4a8 evaluate", f"needs {package}, which is not installed", install_command("evaluate")
        ) from error
