"""What a training did."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Point:
    """A point of the curve. training: mean divergence of the batches since the last point, None at the first one.

    held_out: divergence of the held-out samples. Both in nats per token.
    """

    step: int
    training: float | None
    held_out: float


@dataclass(frozen=True)
class Domain:
    """A domain: its share of the training's tokens, and its divergence in nats per token before and after."""

    tag: str
    share: float
    before: float
    after: float


@dataclass(frozen=True)
class DistillResult:
    """A finished training. Divergences are of the held-out samples, in nats per token; `after` is at `best_step`.

    change, change_error: after − before and its standard error, paired by sample. tokens: trained on, without padding.
    top_k: the divergences are over so many of the teacher's likeliest tokens and the rest as one; 0: over all tokens.
    times: how many times the text of each domain was trained on, on average, also of those that are not held out.
    """

    curve: tuple[Point, ...]
    best_step: int
    before: float
    after: float
    change: float
    change_error: float
    domains: tuple[Domain, ...]
    tokens: int
    seconds: float
    top_k: int = 0
    times: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)
