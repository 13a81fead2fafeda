"""Weights and second moments of inputs, for tests of what is chosen by them."""

import torch


def moment(k: int, seed: int = 0, tokens: int | None = None) -> torch.Tensor:
    """Return E[x xᵀ], float32 [K, K], of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=generator) / k**0.5
    sizes = torch.randn(k, generator=generator).exp()
    x = torch.randn(tokens or 2 * k, k, generator=generator) @ mix * sizes
    result: torch.Tensor = x.t() @ x / len(x)
    return result


def weight(n: int, k: int, seed: int = 1) -> torch.Tensor:
    """Return a matrix, float32 [N, K], of channels of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randn(n, 1, generator=generator).mul(0.3).exp() / k**0.5
    result: torch.Tensor = torch.randn(n, k, generator=generator) * sizes
    return result


def noise(difference: torch.Tensor, moment: torch.Tensor) -> float:
    """Return Σ e·H·eᵀ over the rows e of a difference."""
    e = difference.double()
    return float(((e @ moment.double()) * e).sum())
