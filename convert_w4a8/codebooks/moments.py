"""The second moment of a layer's inputs, H = E[x xᵀ], made ready: damped, and factored for error feedback.

With the damped H = R·Rᵀ, R upper triangular, the error of an output channel in its outputs is

    e·H·eᵀ = Σ_k R[k, k]²·(e_k + Σ_{j<k} e_j·M[j, k])²,  M[j, k] = R[j, k] / R[k, k]

so the weight of column k is best rounded after M has taken the errors of the columns before it from it, and what is
left of its error counts R[k, k]². This is GPTQ's rounding (Frantar et al., 2022) in the form of QuIP's LDLQ (Chee et
al., 2023), which needs no inverse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convert_w4a8.codebooks.method import Method
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.threads import one_thread_each, side_by_side

_BLOCK = 256
"""Columns of a step of the factorization, and rows of a product."""
_EXACT = 8192
"""Up to so many inputs the factorization is in float64."""
_FLOOR = 1e-3
_ATTEMPTS = 6
"""Each with ten times the damping."""


@dataclass(frozen=True)
class Curvature:
    """What the objective is made of: a damped second moment with its factor, or only a diagonal.

    importance: R[k, k]², or the diagonal, float64 [K].
    moment: H as it was measured, float32 [K, K]. factor: M with its unit diagonal, float32 [K, K]. None for a diagonal.
    damping: what is added to H's diagonal.
    Those of E matrices that are worked together have one more dimension [E, …]; see `stacked`.
    """

    importance: torch.Tensor
    moment: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    damping: float = 0.0

    @property
    def groups(self) -> torch.Tensor:
        """The importance by groups, float64 [G, 128]; of matrices that are worked together [E, G, 128]."""
        return self.importance.view(*self.importance.shape[:-1], -1, GROUP_SIZE)


def stacked(known: Sequence[Curvature]) -> Curvature:
    """Return what is known of the inputs of E matrices together: [E, …], with H damped already."""
    importance = torch.stack([each.importance for each in known])
    if any(each.moment is None or each.factor is None for each in known):
        return Curvature(importance)
    moment = torch.stack([each.moment for each in known if each.moment is not None])
    for one, each in zip(moment, known, strict=True):
        one.diagonal().add_(each.damping)
    return Curvature(importance, moment, torch.stack([each.factor for each in known if each.factor is not None]))


Moment = Curvature | torch.Tensor | None
"""What is known of a layer's inputs: H = E[x xᵀ] [K, K], made ready or not; their energies [K]; or nothing."""


def ready(moment: Moment, k: int, method: Method, device: torch.device) -> Curvature:
    """Return what is known of K inputs as the method needs it. Raises ValueError where that does not fit."""
    if moment is None:
        moment = torch.ones(k, device=device)
    found = len(moment.importance if isinstance(moment, Curvature) else moment)
    if found != k:
        raise ValueError(f"the statistics are of {found} inputs, the matrix has {k}")
    has_moment = moment.moment is not None if isinstance(moment, Curvature) else moment.dim() == 2
    if (method.feedback or method.sweeps) and not has_moment:
        raise ValueError("error feedback and descent need the second moment of the inputs, not only their energies")
    if isinstance(moment, Curvature):
        return moment
    return curvature(moment, method.damping) if method.feedback or method.sweeps else diagonal(moment)


def diagonal(energies: torch.Tensor) -> Curvature:
    """Let a squared error count as much as its input's energy, E[x²] [K], or the diagonal of a second moment [K, K].

    Inputs that were hardly ever seen count a thousandth of the mean: they may be seen later.
    """
    found = (energies.diagonal() if energies.dim() == 2 else energies).double()
    with one_thread_each():
        mean = float(found.cpu().mean())
    if not math.isfinite(mean) or bool((found < 0).any()):
        raise ValueError("the energies of the inputs are not finite, or negative")
    return Curvature(found.clamp(min=_FLOOR * mean) if mean > 0 else torch.ones_like(found))


def curvature(moment: torch.Tensor, damping: float) -> Curvature:
    """Damp and factor a second moment [K, K], float32 or float64, K a multiple of 128; it stays as it is.

    damping: relative to the mean of the diagonal; ten times as much where the factor does not exist.
    Memory beside the moment: its copy if that was not float32, and one matrix of its size, which is float64 up to
    K = 8192 and float32 above: 4.6 GB for K = 33,792. The result is the same on any number of threads.
    Raises ValueError on a moment that is not square or finite, or with which no damping helps.
    """
    if moment.dim() != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"a second moment of shape {list(moment.shape)} is not square")
    with one_thread_each():
        mean = float(moment.diagonal().double().mean())
        is_finite = all(bool(torch.isfinite(part.sum(dtype=torch.float64))) for part in torch.split(moment, _BLOCK))
    if not is_finite:
        raise ValueError("the second moment of the inputs is not finite")
    if bool((moment.diagonal() < 0).any()):
        raise ValueError("the second moment of the inputs has negative energies")
    for attempt in range(_ATTEMPTS):
        added = max(damping, 1e-4 if attempt else 0.0) * 10**attempt * (mean if mean > 0 else 1.0)
        factor = _factor(moment, added)
        if factor is not None:
            r = factor.diagonal().clone()
            return Curvature(r.double().square(), moment.float(), factor.float().div_(r.float()), added)
    raise ValueError("the second moment of the inputs is not positive definite, whatever is added to its diagonal")


def _factor(moment: torch.Tensor, added: float) -> torch.Tensor | None:
    """Return the upper triangular R of H + added·I = R·Rᵀ, or None where there is none."""
    dtype = torch.float64 if len(moment) <= _EXACT or moment.is_cuda else torch.float32
    a = moment.to(dtype, copy=True)
    a.diagonal().add_(added)
    if a.is_cuda:
        a = a.flip(0, 1)
        low, info = torch.linalg.cholesky_ex(a)
        del a
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
    weight: torch.Tensor, moment: torch.Tensor | Curvature, cross: torch.Tensor, alpha: float, damping: float
) -> torch.Tensor:
    """Return W + α·W·(C − H)·H⁻¹, float32 [N, K]: at α = 1 the weights that best give W's outputs from other inputs.

    weight: bfloat16, float16 or float32 [N, K]. moment: H = E[x̂ x̂ᵀ] of the inputs that the quantized layer sees, or
    what `curvature` made of it, with a damping of its own. cross: C = E[x x̂ᵀ], x the original model's.
    Raises ValueError where `curvature` does.
    """
    known = moment if isinstance(moment, Curvature) else curvature(moment, damping)
    assert known.moment is not None
    assert known.factor is not None
    h, factor = known.moment, known.factor
    # H·z = R·Rᵀ·z, with R = M·diag(r): two triangular solves for each row.
    scale = known.importance.float()
    result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)

    def solve(row: int) -> None:
        part = weight[row : row + _BLOCK].float()
        right = part @ cross.float() - part @ h
        right = torch.linalg.solve_triangular(factor.t(), right, upper=False, left=False, unitriangular=True)
        right /= scale
        right = torch.linalg.solve_triangular(factor, right, upper=True, left=False, unitriangular=True)
        result[row : row + _BLOCK] = part + alpha * right

    side_by_side(solve, range(0, len(weight), _BLOCK))
    return result
