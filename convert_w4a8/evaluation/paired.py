"""Statistics of paired scores: bounds of the mean difference, exact McNemar, and how many more pairs would decide.

A difference is that of one prompt's scores, candidate less baseline, from -1 to 1.

The bounds are the percentile bootstrap's (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13),
drawn from the differences and one more: the worst there can be, -1, for the lower bound, and +1 for the upper one.
Without it a bound would be 0 as long as no difference was seen, however few the prompts. With it the lower bound of N
equal answers is about -3/N, which is the exact binomial bound (the "rule of three"). How often the bounds are wrong is
measured by `scripts/quality/verdict_power.py`.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CONFIDENCE = 0.95
DRAWS = 20_000
LEAST = 60
"""Answers of which a weighted mean has bounds: of fewer, those of skewed ones are wrong much too often."""
_SEED = 17
_POWER_Z = 0.8416
"""80 % of a normal distribution lie below so many standard deviations."""
MOST = 100_000
"""More prompts than these are not asked for."""
Differences = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Bounds:
    """The mean difference with its one-sided bounds, each at `CONFIDENCE`."""

    mean: float
    lower: float
    upper: float


def bounds(differences: Differences, confidence: float = CONFIDENCE) -> Bounds:
    """Return the mean of differences, [prompts], and its bounds."""
    return Bounds(
        float(differences.mean()),
        _quantile(differences, -1.0, len(differences), 1 - confidence),
        _quantile(differences, 1.0, len(differences), confidence),
    )


def ratio_bounds(values: Differences, weights: Differences, confidence: float = CONFIDENCE) -> Bounds:
    """Return the weighted mean of what answers gave, [answers], and its bounds, each at `confidence`.

    By the bootstrap-t over answers (Efron & Tibshirani, chapter 12.5), since divergences are skewed. Without bounds
    where there are fewer than `LEAST`.
    """
    count, total = len(values), float(weights.sum())
    mean = float(values @ weights) / total
    if count < LEAST:
        return Bounds(mean, -math.inf, math.inf)
    error = _standard_error(np.ones((1, count)), values, weights, np.array([mean]))[0]
    if error == 0:
        return Bounds(mean, mean, mean)
    draws = max(500, min(4000, 10_000_000 // count))
    drawn = np.random.default_rng(_SEED).multinomial(count, np.full(count, 1 / count), size=draws).astype(np.float64)
    means = (drawn @ (values * weights)) / (drawn @ weights)
    errors = np.maximum(_standard_error(drawn, values, weights, means), 1e-9 * error)
    low, high = np.quantile((means - mean) / errors, (1 - confidence, confidence))
    return Bounds(mean, float(mean - high * error), float(mean - low * error))


def _standard_error(
    drawn: Differences, values: Differences, weights: Differences, means: Differences
) -> npt.NDArray[np.float64]:
    """Return the standard errors of weighted means, [draws], from how often each answer was drawn, [draws, answers]."""
    squared = weights**2
    parts = drawn @ (squared * values**2) - 2 * means * (drawn @ (squared * values)) + means**2 * (drawn @ squared)
    count = drawn.shape[1]
    found: npt.NDArray[np.float64] = np.sqrt(np.maximum(parts, 0) * count / (count - 1)) / (drawn @ weights)
    return found


def mcnemar(losses: int, wins: int) -> float:
    """Return the two-sided p of the exact McNemar test: that so uneven a split of losses and wins is chance.

    McNemar, Psychometrika 12 (1947), with the binomial distribution instead of its approximation.
    """
    total, fewer = losses + wins, min(losses, wins)
    return float(min(1.0, 2 * sum(math.comb(total, k) for k in range(fewer + 1)) / 2**total))


def more_prompts(differences: Differences, tolerance: float, harm: float = CONFIDENCE) -> int | None:
    """Return how many more prompts would decide, with a chance of about 80 %, if differences stay as they are.

    To decide is to have the lower bound above -tolerance, or, where the mean lies below that, the upper bound below it;
    harm: the confidence of that one. None where `MOST` would not do.
    """
    good = float(differences.mean()) > -tolerance
    first = len(differences)

    def decided(count: int) -> bool:
        spread = _POWER_Z * float(differences.std()) / math.sqrt(count)
        if good:
            return _quantile(differences, -1.0, count, 1 - CONFIDENCE) - spread > -tolerance
        return _quantile(differences, 1.0, count, harm) + spread < -tolerance

    high = first + 1
    while not decided(high):
        if high - first >= MOST:
            return None
        high = first + 2 * (high - first)
    low = max(first, first + (high - first) // 2)
    while high - low > max(1, (high - first) // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high - first


def _quantile(differences: Differences, extreme: float, count: int, share: float) -> float:
    """Return a quantile of the means of `count` + 1 draws from differences and one `extreme`, weighed as of `count`."""
    values, counts = np.unique(differences, return_counts=True)
    values = np.append(values, extreme)
    weights = np.append(counts * (count / len(differences)), 1.0) / (count + 1)
    drawn = np.random.default_rng(_SEED).multinomial(count + 1, weights / weights.sum(), size=DRAWS)
    means = drawn @ values / (count + 1)
    return float(np.quantile(means, share, method="lower" if share < 0.5 else "higher"))
