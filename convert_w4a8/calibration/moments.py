"""Moments of the inputs of a linear layer, over the tokens that count."""

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

    def add(self, seen: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Add tokens: x̂ [M, K], and x [M, K]."""
        for start in range(0, len(seen), ROWS):
            x = seen[start : start + ROWS]
            self.second = _plus(self.second, x.float().square().sum(0) if self.energies else _product(x, x))
            if original is not None:
                self.cross = _plus(self.cross, _product(original[start : start + ROWS], x))
        self.tokens += len(seen)

    def mean(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the means over the tokens; the sums, which are as large, become them."""
        assert self.second is not None
        means = self.second.div_(self.tokens), None if self.cross is None else self.cross.div_(self.tokens)
        self.second = self.cross = None
        return means


def _product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return xᵀ·y, float32. Tensor cores multiply BF16 exactly, and sum in float32."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x.t(), y, out_dtype=torch.float32)
    return x.float().t() @ y.float()


def _plus(total: torch.Tensor | None, more: torch.Tensor) -> torch.Tensor:
    return more if total is None else total.add_(more)
