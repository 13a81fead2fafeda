"""What a process imports when it begins, and from where."""

import gc
import os
import sys


def leave_out_working_directory() -> None:
    """Let no module come from the working directory, which may be a checkpoint's.

    It is where relative entries of the path lead, which `python -c` and editable installations leave there.
    """
    sys.path[:] = [entry for entry in sys.path if os.path.isabs(entry)]  # noqa: PTH117 - may be no path at all


def import_torch() -> None:
    """Import torch without the garbage collector, which would walk over its objects now, and at exit once more.

    That is 0.4 of 1.4 s. What exists then is never collected, so it is for a process that has just begun.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        import torch  # noqa: F401, PLC0415
    finally:
        gc.enable()
    gc.freeze()
