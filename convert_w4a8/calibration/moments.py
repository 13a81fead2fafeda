"""Moments of the inputs of a linear layer, over the tokens that count."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

ROWS = 4096
"""Tokens that are multiplied at a time."""


@dataclass
class Moments:
    """Sums over tokens, float32: of x̂ x̂ᵀ [K, K], or x̂² [K] with `energies`; of x x̂ᵀ [K, K] where x is given.

    x̂: inputs as the quantized layer sees them. x: the original model's.
    """

    energies: bool = False
    second: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    tokens: int = 0

    def add(
        self,
        seen: torch.Tensor,
        original: torch.Tensor | None = None,
        *,
        kept: torch.Tensor | None = None,
        rounding: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """Add tokens: x̂ [M, K], and x [M, K].

        kept: which of them count, bool [M]; None for all. rounding: what makes x̂ of `seen`, `ROWS` tokens at a time.
        """
        index = None if kept is None else kept.nonzero()[:, 0]
        count = len(seen) if index is None else len(index)
        for start in range(0, count, ROWS):
            rows = slice(start, start + ROWS) if index is None else index[start : start + ROWS]
            x = (seen[rows] if rounding is None else rounding(seen[rows])).float()
            self.second = _plus(self.second, x.square().sum(0) if self.energies else x.t() @ x)
            if original is not None:
                self.cross = _plus(self.cross, original[rows].float().t() @ x)
        self.tokens += count

    def mean(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the means over the tokens."""
        assert self.second is not None
        return self.second / self.tokens, None if self.cross is None else self.cross / self.tokens


def _plus(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if total is None else total.add_(more)
