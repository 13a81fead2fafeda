"""What the user can choose about a conversion. Imports nothing heavy: the command line starts with it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

DEFAULT_SHARD_SIZE = 5_000_000_000
PATTERN = "re:"
"""What a layer to keep begins with that is a regular expression."""


class ScalesMode(StrEnum):
    """How FP8 scales are chosen."""

    REFERENCE = "reference"
    """Exactly as vLLM does at load."""
    SEARCH = "search"
    """The FP8 scale and channel scale that give the final table entries the smallest squared error."""
    DIRECT = "direct"
    """Table entries chosen one by one; only for output formats that store them."""


class Policy(StrEnum):
    """What to do with a layer whose codes cannot be kept: choose new ones, or refuse."""

    REQUANTIZE = "requantize"
    ERROR = "error"


class Unsupported(StrEnum):
    """What to do with a layer that the kernel cannot take: refuse, or keep it in BF16."""

    ERROR = "error"
    DEQUANTIZE = "dequantize"


@dataclass(frozen=True)
class Options:
    """What the user chose; see `w4a8-convert --help`."""

    format: str = "lut"
    scales: ScalesMode = ScalesMode.SEARCH
    asymmetric: Policy = Policy.REQUANTIZE
    act_order: Policy = Policy.ERROR
    group_size: Policy = Policy.ERROR
    unsupported: Unsupported = Unsupported.ERROR
    max_shard_size: int = DEFAULT_SHARD_SIZE
    keep: tuple[str, ...] = ()
    """Layers to keep in BF16: full names, or `re:` and a regular expression that matches from the beginning."""

    def __post_init__(self) -> None:
        """Take the values of choices as strings too. Raises ValueError for a choice that there is not."""
        for name, kind in (
            ("scales", ScalesMode),
            ("asymmetric", Policy),
            ("act_order", Policy),
            ("group_size", Policy),
            ("unsupported", Unsupported),
        ):
            object.__setattr__(self, name, kind(getattr(self, name)))
        keep: Any = self.keep
        object.__setattr__(self, "keep", (keep,) if isinstance(keep, str) else tuple(keep))
