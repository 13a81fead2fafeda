"""Scaling of input channels, as AWQ does (Lin et al., 2023): weights times s, inputs over s.

Here s are powers of two: then norms, routers and biases that take a part of it are exact in 16 bits, and all outputs of
the model in 16 bits stay what they were, bit by bit.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from convert_w4a8.codebooks.matrix import quantize_matrix
from convert_w4a8.codebooks.method import Method
from convert_w4a8.codebooks.moments import diagonal
from convert_w4a8.encoding.tables import decode

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
"""Exponents that are tried."""
_ROWS = 512
"""Output channels of a matrix that are tried, evenly spread."""
_FLOOR = 1e-12
_LEAST, _MOST = -3, 8
"""Binary exponents of scales. Inputs are never made more than 8 times larger: those that were hardly seen may come."""


def awq_exponent(
    weights: Sequence[torch.Tensor],
    moment: torch.Tensor,
    method: Method,
    ratios: Sequence[float] = RATIOS,
    tie: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Return s, float32 [K], and the ratio r with the least output error.

    s is E[x²]^(r/2) over its geometric mean, rounded to the nearest power of two, from 1/8 to 256.

    weights: matrices [N, K] that share their inputs. moment: H [K, K], under which errors are measured, or energies
    [K]. method: its tables; codes are chosen by energies alone. tie: channels with the same number, int64 [K], get the
    same scale: the heads that share a value head. Use the result as `weight * s`, H / (s·sᵀ), and inputs over s.
    """
    is_full = moment.dim() == 2
    energies = (moment.diagonal() if is_full else moment).double()
    energies = energies.clamp(min=_FLOOR * float(energies.max()) if bool((energies > 0).any()) else 1.0)
    if tie is not None:
        number = int(tie.max()) + 1
        total = torch.zeros(number, dtype=torch.float64, device=energies.device).index_add_(0, tie, energies)
        energies = (total / torch.bincount(tie, minlength=number))[tie]
    fast = replace(method, feedback=False, sweeps=0, passes=0)
    best: tuple[float, torch.Tensor, float] | None = None
    for ratio in ratios:
        s = energies.log().mul_(ratio / 2)
        s = (s - s.mean()).div_(math.log(2)).round_().clamp_(_LEAST, _MOST).exp2_().float()
        if best is not None and torch.equal(s, best[1]):
            continue
        error = sum(_error(weight, s, moment, fast) for weight in weights)
        if best is None or error < best[0]:
            best = error, s, ratio
    if best is None:
        raise ValueError("there is no ratio to try")
    return best[1], best[2]


def _error(weight: torch.Tensor, s: torch.Tensor, moment: torch.Tensor, method: Method) -> float:
    """Return the output error of a scaled matrix, from some of its output channels."""
    n = len(weight)
    index = torch.linspace(0, n - 1, min(n, _ROWS), device=weight.device).long()
    part = weight[index].float() * s
    energies = (moment.diagonal() if moment.dim() == 2 else moment) / s.square()
    layer, _ = quantize_matrix(part, diagonal(energies), method)
    error = (decode(layer) - part) / s
    outputs = error @ moment.float() if moment.dim() == 2 else error * moment
    return float((outputs.double() * error).sum()) * n / len(index)
