"""How the pictures of a report look, and how they become PNGs: matplotlib without the user's own settings."""

import importlib.util
import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convert_w4a8.errors import ConvertError
from convert_w4a8.version import install_command

_WIDTH = 10.0
"""Inches."""
_DPI = 144
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#999999",
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def require_matplotlib() -> None:
    """Raise ConvertError unless matplotlib can be imported."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConvertError("w4a8 report", "its pictures need matplotlib", install_command("report"))


@contextmanager
def style() -> Iterator[None]:
    """Have figures that are made and drawn within look as those of a report.

    Raises:
        ConvertError: matplotlib is not installed.

    """
    require_matplotlib()
    with _elsewhere():
        import matplotlib as mpl  # noqa: PLC0415

    with mpl.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names in writing that the font does not have
        mpl.rcdefaults()  # not what the user's own matplotlibrc says
        mpl.rcParams.update(_STYLE)
        yield


@contextmanager
def _elsewhere() -> Iterator[None]:
    """Go to the package's directory: matplotlib reads the `matplotlibrc` of the working directory when imported.

    That may be a checkpoint's, and be wrong, a pipe, or without end. The working directory is every thread's.
    """
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(Path(__file__).parent)
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def png(figure: Any) -> bytes:
    """Return a figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def new_figure(height: float) -> Any:
    """Return an empty figure; height: inches."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - no pyplot: it would choose a display

    return Figure(figsize=(_WIDTH, height))
