"""The second moment of a layer's inputs, H = E[x xᵀ], made ready: damped, and factored for error feedback.

With the damped H = R·Rᵀ, R upper triangular, the error of an output channel in its outputs is

    e·H·eᵀ = Σ_k R[k, k]²·(e_k + Σ_{j<k} e_j·M[j, k])²,  M[j, k] = R[j, k] / R[k, k]

so the weight of column k is best rounded after M has taken the errors of the columns before it from it, and what is
left of its error counts R[k, k]². This is GPTQ's rounding (Frantar et al., 2022) in the form of QuIP's LDLQ (Chee et
al., 2023), which needs no inverse.
"""

import math
from dataclasses import dataclass

import torch

from convert_w4a8.threads import one_thread_each, side_by_side

_BLOCK = 256
"""Columns of a step of the factorization; a multiple of the group size."""
_EXACT = 8192
"""Up to so many inputs the factorization is in float64."""
_ATTEMPTS = 6
"""Each with ten times the damping."""


@dataclass(frozen=True)
class Curvature:
    """A damped second moment and its factor.

    moment: float32 [K, K], as it was measured. damping: what is added to its diagonal.
    factor: M with its unit diagonal, float32 [K, K]. importance: R[k, k]², float64 [K].
    """

    moment: torch.Tensor
    damping: float
    factor: torch.Tensor
    importance: torch.Tensor

    def to(self, device: torch.device) -> "Curvature":
        """Return the same on another device."""
        return Curvature(self.moment.to(device), self.damping, self.factor.to(device), self.importance.to(device))


def curvature(moment: torch.Tensor, damping: float) -> Curvature:
    """Factor a second moment [K, K], float32 or float64, K a multiple of 128; it stays as it is.

    damping: relative to the mean of the diagonal; ten times as much where the factor does not exist.
    Memory beside the moment: one matrix of its size, float64 up to K = 8192, else float32, and half as much again
    where that was float64. The result is the same on any number of threads. Raises ValueError on a moment that is not
    square or finite, or with which no damping helps.
    """
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"a second moment of shape {list(moment.shape)} is not square")
    diagonal = moment.diagonal().double()
    with one_thread_each():
        mean = float(diagonal.mean())
        finite = all(bool(torch.isfinite(part.sum())) for part in moment.split(_BLOCK))
    if not finite or not math.isfinite(mean):
        raise ValueError("the second moment of the inputs is not finite")
    unit = mean if mean > 0 else 1.0
    for attempt in range(_ATTEMPTS):
        added = max(damping, 1e-6 if attempt else 0.0) * 10**attempt * unit
        factored = _factor(moment, added)
        if factored is not None:
            r = factored.diagonal().clone()
            factor = factored.float() if factored.dtype != torch.float32 else factored
            del factored
            factor /= r.to(factor.dtype)
            return Curvature(moment.float(), added, factor, r.double().square())
    raise ValueError("the second moment of the inputs is not positive definite, whatever is added to its diagonal")


def _factor(moment: torch.Tensor, added: float) -> torch.Tensor | None:
    """Return the upper triangular R of H + added·I = R·Rᵀ, or None where there is none."""
    dtype = torch.float64 if len(moment) <= _EXACT or moment.is_cuda else torch.float32
    a = moment.to(dtype, copy=True)
    a.diagonal().add_(added)
    if a.is_cuda:
        low, info = torch.linalg.cholesky_ex(a.flip(0, 1))
        return low.flip(0, 1) if int(info) == 0 else None
    k = len(a)
    for start in reversed(range(0, k, _BLOCK)):
        stop = min(k, start + _BLOCK)
        with one_thread_each():
            low, info = torch.linalg.cholesky_ex(a[start:stop, start:stop].flip(0, 1))
        if int(info) != 0 or not bool(torch.isfinite(low).all()):
            return None
        corner = low.flip(0, 1)
        a[start:stop, start:stop] = corner
        a[stop:, start:stop] = 0  # below the diagonal
        above = a[:start, start:stop]

        def solve(row: int, above: torch.Tensor = above, corner: torch.Tensor = corner) -> None:
            part = above[row : row + _BLOCK]
            part.copy_(torch.linalg.solve_triangular(corner.t(), part, upper=False, left=False))

        def subtract(row: int, above: torch.Tensor = above) -> None:
            part = a[row : row + _BLOCK, row : len(above)]
            part.addmm_(above[row : row + _BLOCK], above[row:].t(), alpha=-1)

        rows = range(0, start, _BLOCK)
        side_by_side(solve, rows)
        side_by_side(subtract, rows)
    return a


def mixed_target(
    weight: torch.Tensor, moment: Curvature | torch.Tensor, cross: torch.Tensor, alpha: float, damping: float
) -> torch.Tensor:
    """Return W + α·W·(C − H)·H⁻¹, float32 [N, K]: at α = 1 the weights that best give W's outputs from other inputs.

    moment: H = E[x̂ x̂ᵀ] of the inputs that the quantized layer sees, factored already or not. cross: C = E[x x̂ᵀ], x the original model's.
    """
    ready = moment if isinstance(moment, Curvature) else curvature(moment, damping)
    # H·z = R·Rᵀ·z, with R = M·diag(r): two triangular solves for each row.
    scale = ready.importance.float()
    result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)

    def solve(row: int) -> None:
        part = weight[row : row + _BLOCK].float()
        right = part @ cross.float() - part @ ready.moment
        right = torch.linalg.solve_triangular(ready.factor.t(), right, upper=False, left=False, unitriangular=True)
        right /= scale
        right = torch.linalg.solve_triangular(ready.factor, right, upper=True, left=False, unitriangular=True)
        result[row : row + _BLOCK] = part.add_(right, alpha=alpha)

    side_by_side(solve, range(0, len(weight), _BLOCK))
    return result
