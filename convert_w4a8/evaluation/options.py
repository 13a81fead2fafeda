"""What the user can choose about `w4a8 evaluate`. Imports nothing heavy: the command line starts with it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

SERVERS = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class EvaluateOptions:
    """What the user chose; see `w4a8 evaluate --help`.

    tolerance, tag_tolerance: how much of the score may be lost, from 0 to 1; by tag, the empty one for all tags.
    max_divergence: nats per token on the baseline's own answers; None: it does not matter.
    timeout, start_timeout: seconds that an answer, and a server's start, may take. max_model_len: in tokens; None: the
    model's. requests: how many are drawn from logs. server: "auto", "vllm" or "transformers".
    Raises ValueError for what does not go together.
    """

    tolerance: float = 0.05
    tag_tolerance: Mapping[str, float] | None = None
    max_divergence: float | None = None
    max_tokens: int = 256
    samples: int = 1
    temperature: float = 0.0
    concurrency: int = 1
    timeout: float = 600.0
    baseline_model: str | None = None
    candidate_model: str | None = None
    server: str = "auto"
    max_model_len: int | None = None
    serve_options: tuple[str, ...] = ()
    start_timeout: float = 600.0
    rounds: int = 1
    requests: int = 300

    def __post_init__(self) -> None:
        """Check the values."""
        if self.samples > 1 and self.temperature <= 0:
            raise ValueError("several samples need a temperature above 0: greedy answers are all the same")
        for share in (self.tolerance, *(self.tag_tolerance or {}).values()):
            if not 0 <= share <= 1:
                raise ValueError(f"a tolerance is {share}, not from 0 to 1")
        if self.max_divergence is not None and not self.max_divergence > 0:
            raise ValueError(f"max_divergence is {self.max_divergence}, not more than 0")
        if self.server not in SERVERS:
            raise ValueError(f"server is {self.server!r}, none of {', '.join(SERVERS)}")
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, not 0 or more")
        for name in ("timeout", "start_timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}, not more than 0 seconds")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise ValueError(f"max_model_len is {self.max_model_len}, not 1 or more")
        for name in ("max_tokens", "samples", "concurrency", "rounds", "requests"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, not 1 or more")
