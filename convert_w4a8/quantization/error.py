"""How far weights are from those that they stand for."""

import math


def sqnr_db(signal: float, noise: float) -> float:
    """10·log10(signal/noise); inf without noise."""
    return 10 * math.log10(signal / noise) if noise and signal else math.inf
