"""Windows of tokens in a .npy, uint16 [W, T], as `sample_teacher.py` writes them."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


def load_windows(path: Path, tokens: int = 1) -> npt.NDArray[np.integer[Any]]:
    """Return windows of so many tokens or more, [W, T], which are read as they are used.

    Raises:
        ValueError: the file holds something else.

    """
    found: npt.NDArray[np.integer[Any]] = np.load(path, mmap_mode="r")
    if found.ndim != 2 or found.dtype.kind not in "iu" or found.shape[1] < tokens:
        raise ValueError(f"{path}: is {found.dtype} {list(found.shape)}, not windows of {tokens} tokens")
    return found
