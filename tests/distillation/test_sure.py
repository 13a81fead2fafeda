"""What is written is better than what came in, for sure: as seldom wrong with few held-out samples as with many."""

import math

import pytest
import torch

from convert_w4a8.distillation.train import difference
from convert_w4a8.distillation.training_run import sure


@pytest.mark.parametrize("samples", [2, 3, 5, 14, 60])
def test_chance_is_taken_for_a_gain_as_seldom_as_that(samples: int) -> None:
    """A training that changes nothing: one in 44, as with two standard errors that are known."""
    generator = torch.Generator().manual_seed(samples)
    before = torch.stack((torch.ones(samples), torch.full((samples,), 40.0)), dim=1).double()
    wrong, trials = 0, 4000
    for noise in torch.randn(trials, samples, generator=generator).double():
        after = before.clone()
        after[:, 0] += noise
        change, error = difference(after, before)
        wrong += change < -sure(samples) * error
    assert 0.015 < wrong / trials < 0.036


def test_it_takes_two_errors_of_many_samples() -> None:
    """Never less, and one sample shows none."""
    found = [sure(samples) for samples in range(1, 1000)]
    assert found[0] == math.inf
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(2, abs=0.005)
