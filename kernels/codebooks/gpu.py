"""Codebooks of groups of 128 weights on a GPU: what reference.py does, in float32.

Bytes differ from those of a CPU, whose arithmetic is in float64; they are the same from run to run. What is written to
must be contiguous.
"""

from typing import Any

import torch

from convert_w4a8.kernels.codebooks.gpu_codes import descend_group, feedback_group
from convert_w4a8.kernels.codebooks.gpu_tables import fit_group, fit_scale_group, refine_group
from convert_w4a8.kernels.fp8 import OPTIONS

_GROUPS_AT_ONCE = 1 << 17


def fit(values: torch.Tensor, importance: torch.Tensor, rounds: int) -> torch.Tensor:
    """Return what `reference.fit` returns."""
    entries = torch.empty(len(values), 8, device=values.device)
    shares, count = _float(importance), len(importance)
    for start in range(0, len(values), _GROUPS_AT_ONCE):
        part = values[start : start + _GROUPS_AT_ONCE].contiguous()
        row = (torch.arange(start, start + len(part), device=values.device) % count)[:, None]
        magnitude, order = part.abs().sort(dim=1, stable=True)
        share = shares[row, order]
        signed = part.gather(1, order)
        sums = torch.zeros(len(part), 4, 129, device=values.device)
        torch.cumsum(share, 1, out=sums[:, 0, 1:])
        torch.cumsum(share * magnitude, 1, out=sums[:, 1, 1:])
        torch.cumsum(share * magnitude * magnitude, 1, out=sums[:, 2, 1:])
        scratch = torch.zeros(len(part), 8, 129, device=values.device)
        back = torch.empty(len(part), 7, 128, dtype=torch.uint8, device=values.device)
        _launch(fit_group, len(part), signed, share, sums, scratch, back, entries[start : start + len(part)], rounds)
    return entries.double()


def refine(
    values: torch.Tensor, importance: torch.Tensor, entries: torch.Tensor, codes: torch.Tensor, passes: int
) -> None:
    """Do what `reference.refine` does to `entries` and `codes`."""
    table = entries.float()
    inputs = values.contiguous(), _float(importance)
    _launch(refine_group, len(values), *inputs, table, codes, len(importance), passes)
    entries.copy_(table)


def fit_scale(
    values: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, limits: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Return what `reference.fit_scale` returns, and put codes into `codes`."""
    table = torch.empty(len(values), 8, device=values.device)
    inputs = values.contiguous(), _float(importance), scales.contiguous(), limits.contiguous()
    _launch(fit_scale_group, len(values), *inputs, table, codes, len(importance))
    return table.double()


def feedback(
    goal: torch.Tensor,
    start: torch.Tensor,
    factor: torch.Tensor,
    entries: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Do what `reference.feedback` does to `codes` and `errors`."""
    inputs = (tensor.float().contiguous() for tensor in (goal, start, factor, entries))
    _launch(feedback_group, len(goal), *inputs, codes, errors, len(factor))


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
    table = entries.float()
    inputs = (tensor.float().contiguous() for tensor in (goal, gradient, moment, moment.diagonal(dim1=1, dim2=2)))
    _launch(descend_group, len(goal), *inputs, table, codes, errors, len(moment), rounds, FREE=free)
    entries.copy_(table)


def _float(importance: torch.Tensor) -> torch.Tensor:
    """Return importances in a range that float32 holds."""
    return (importance / importance.mean()).float().contiguous()


def _launch(kernel: Any, count: int, *arguments: Any, **constants: Any) -> None:
    """Run a kernel over `count` groups."""
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[(count,)](*arguments, **constants, num_warps=1, **OPTIONS)
