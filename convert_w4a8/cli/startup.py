"""Importing torch in a command that ends soon."""

import gc
import sys


def import_torch() -> None:
    """Import torch without the garbage collector, which would walk over its objects now, and at exit once more.

    That is 0.4 of 1.4 s. What exists then is never collected, so it is for a process that has just begun.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
