"""How far weights are from those that they stand for."""

import math

import torch


def sqnr_db(signal: float, noise: float) -> float:
    """10·log10(signal/noise); inf without noise."""
    return 10 * math.log10(signal / noise) if noise and signal else math.inf


def energy(x: torch.Tensor) -> float:
    """Return the sum of squares."""
    return float(x.square().sum(dtype=torch.float64))
