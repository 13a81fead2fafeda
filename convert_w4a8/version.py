"""The version of the package, and how to install it."""

__version__ = "0.1.0"


def install_command(extra: str = "") -> str:
    """Return the command that installs this package, perhaps with an extra.

    The name is not on the package index, where anybody could claim it; a path to a checkout or a wheel works.
    """
    return f"pip install './w4a8-convert[{extra}]'" if extra else "pip install ./w4a8-convert"


INSTALL_NOTE = "w4a8-convert is not on the package index: ./w4a8-convert is a checkout of its repository, or a wheel"
"""What to say beside `install_command`, where a reader may not know."""
