"""How a matrix is quantized: the choices that there are, and the presets."""

from dataclasses import dataclass
from enum import StrEnum


class Tables(StrEnum):
    """What the table of a group may be."""

    FREE = "free"
    """Eight FP8 entries of its own."""
    SCALE = "scale"
    """e4m3(f·v) for one FP8 scale f: what compressed-tensors can say, and stock vLLM load."""


@dataclass(frozen=True)
class Method:
    """How to choose codes and tables.

    feedback: round column by column, each column's error made up for by those that follow.
    sweeps: over all groups, of coordinate descent on codes and entries; none needs a second moment.
    damping: what is added to the second moment's diagonal, in units of its mean.
    passes: over the entries of a table, each of which is moved by a step of the E4M3 grid where that helps.
    """

    tables: Tables = Tables.FREE
    feedback: bool = True
    sweeps: int = 3
    damping: float = 0.05
    passes: int = 1


FULL = Method(sweeps=6)
"""Needs the second moment of the inputs."""
FAST = Method(feedback=False, sweeps=0, passes=2)
"""Needs the energies of the inputs."""
NO_DATA = FAST
"""With neither: every weight counts the same."""
