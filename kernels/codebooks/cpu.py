"""Codebooks of groups of 128 weights on a CPU, compiled by numba: the same as reference.py, bit for bit.

Every operation is rounded as torch rounds it, and sums run in the same order. Each row is worked by itself.
"""

import torch

from convert_w4a8.kernels.codebooks.cpu_clusters import fit_rows
from convert_w4a8.kernels.codebooks.cpu_codes import descend_rows, feedback_rows
from convert_w4a8.kernels.codebooks.cpu_tables import fit_scale_rows, refine_rows
from convert_w4a8.kernels.fp8_cpu import E4M3_VALUES


def fit(values: torch.Tensor, importance: torch.Tensor, rounds: int) -> torch.Tensor:
    """Return what `reference.fit` returns."""
    entries = torch.empty(len(values), 8, dtype=torch.float64)
    fit_rows(values.numpy(), importance.numpy(), entries.numpy(), rounds)
    return entries


def refine(
    values: torch.Tensor, importance: torch.Tensor, entries: torch.Tensor, codes: torch.Tensor, passes: int
) -> None:
    """Do what `reference.refine` does to `entries` and `codes`."""
    refine_rows(values.numpy(), importance.numpy(), entries.numpy(), codes.numpy(), passes, E4M3_VALUES)


def fit_scale(
    values: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, limits: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Return what `reference.fit_scale` returns, and put codes into `codes`."""
    entries = torch.empty(len(values), 8, dtype=torch.float64)
    fit_scale_rows(
        values.numpy(),
        importance.numpy(),
        scales.numpy(),
        limits.numpy(),
        entries.numpy(),
        codes.numpy(),
        E4M3_VALUES,
    )
    return entries


def feedback(
    goal: torch.Tensor,
    start: torch.Tensor,
    factor: torch.Tensor,
    entries: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Do what `reference.feedback` does to `codes` and `errors`."""
    feedback_rows(goal.numpy(), start.numpy(), factor.numpy(), entries.numpy(), codes.numpy(), errors.numpy())


def descend(
    goal: torch.Tensor,
    gradient: torch.Tensor,
    moment: torch.Tensor,
    entries: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
    rounds: int,
    free: bool,
) -> None:
    """Do what `reference.descend` does to `entries`, `codes` and `errors`."""
    arrays = goal.numpy(), gradient.numpy(), moment.numpy()
    descend_rows(*arrays, entries.numpy(), codes.numpy(), errors.numpy(), rounds, free, E4M3_VALUES)
