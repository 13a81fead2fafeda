"""The lower bound of a divergence, against the divergence itself."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8.evaluation.divergence import TOP, kl_bound


def listed(logprobs: np.ndarray, actual: int) -> dict[str, float]:
    """Return what vLLM lists: the likeliest tokens, and the actual one."""
    order = np.argsort(-logprobs)[:TOP]
    return {str(token): float(logprobs[token]) for token in {*order.tolist(), actual}}


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.3, 2.0, 6.0]), st.sampled_from([25, 200]))
def test_it_is_a_lower_bound(seed: int, spread: float, vocabulary: int) -> None:
    """Of any two distributions, flat or peaked, alike or not."""
    rng = np.random.default_rng(seed)
    first = rng.standard_normal(vocabulary) * 3
    logits = (first, first + spread * rng.standard_normal(vocabulary))
    p, q = (x - np.logaddexp.reduce(x) for x in logits)
    actual = int(rng.integers(vocabulary))
    found = kl_bound(listed(p, actual), listed(q, actual))
    assert 0 <= found <= float(np.exp(p) @ (p - q)) + 1e-9


def test_other_tokens_altogether_are_seen() -> None:
    """Where only the actual token is in both lists, and is as likely."""
    p, q = np.full(1000, math.log(1e-9)), np.full(1000, math.log(1e-9))
    p[:19] = q[20:39] = math.log(0.9 / 19)
    p[999] = q[999] = math.log(0.1)
    assert kl_bound(listed(p, 999), listed(q, 999)) > 5  # its own tokens leave nothing to those of the baseline
    q[:] = math.log(0.9 / 999)
    q[999] = math.log(0.1)
    least = {str(token): float(q[token]) for token in range(20, 39)} | {"999": math.log(0.1)}
    assert kl_bound(listed(p, 999), least) == pytest.approx(0.9 * math.log(0.9 / 19 / (0.9 / 999)), rel=1e-3)
