"""Moments of the inputs of a linear layer, over the tokens that count."""

from dataclasses import dataclass

import torch

ROWS = 4096
"""Tokens that are multiplied at a time."""


@dataclass
class Moments:
    """Sums over tokens, or means, float32: of x̂ x̂ᵀ [K, K], or x̂² [K] with `energies`; of x x̂ᵀ [K, K] where x is given.

    x̂: inputs as the quantized layer sees them. x: the original model's.
    """

    energies: bool = False
    second: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    tokens: int = 0
    is_mean: bool = False

    def add(self, seen: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Add tokens: x̂ [M, K], and x [M, K]."""
        assert not self.is_mean
        for start in range(0, len(seen), ROWS):
            x = seen[start : start + ROWS]
            self.second = _plus(self.second, x.float().square().sum(0) if self.energies else _product(x, x))
            if original is not None:
                self.cross = _plus(self.cross, _product(original[start : start + ROWS], x))
        self.tokens += len(seen)

    def mean(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the means over the tokens, which take the place of the sums: nothing can be added any more."""
        assert self.second is not None
        for total in (self.second, self.cross):
            if total is not None and not self.is_mean:
                total.div_(self.tokens)
        self.is_mean = True
        return self.second, self.cross


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return xᵀ·y, float32. Tensor cores multiply BF16 exactly, and sum in float32."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x.t(), y, out_dtype=torch.float32)
    return x.float().t() @ y.float()


def _plus(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if total is None else total.add_(more)
