"""A weight matrix → as the W4A8 kernel takes it, with the least error in its outputs that was found."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from convert_w4a8.codebooks.method import Method, Tables
from convert_w4a8.codebooks.moments import Curvature, Moment, ready, stacked
from convert_w4a8.codebooks.rows import Rows
from convert_w4a8.codebooks.start import UniformStart, by_rows, uniform_start
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.fp8 import CODE_MAX, E4M3
from convert_w4a8.linear import GROUP_SIZE, Packing, W4A8Linear
from convert_w4a8.quantization.error import sqnr_db
from convert_w4a8.threads import side_by_side

_CHECKED = 1 << 10
"""Output channels that are looked at at a time."""


@dataclass(frozen=True)
class MatrixStats:
    """What quantization did to a matrix.

    signal, noise: what a token's outputs have of the target's energy, and of the difference from them, Σ_n w·H·wᵀ.
    weight_signal, weight_noise: the same of the weights themselves, H being the identity.
    objective: what was minimised, under the damped moment; it is `noise` without a moment.
    damping: what was added to the second moment's diagonal.
    """

    signal: float
    noise: float
    weight_signal: float
    weight_noise: float
    objective: float
    damping: float

    @classmethod
    def of(cls, sums: torch.Tensor, damping: float) -> "MatrixStats":
        """Return what the `sums` of all output channels (`Rows`) say, float64 [4, N]."""
        signal, objective, weight_signal, weight_noise = (float(total) for total in sums.cpu().sum(1))
        noise = max(0.0, objective - damping * weight_noise)
        return cls(signal - damping * weight_signal, noise, weight_signal, weight_noise, objective, damping)

    @property
    def relative_error(self) -> float:
        """Noise over signal in the outputs."""
        return self.noise / self.signal if self.signal else 0.0

    @property
    def sqnr_db(self) -> float:
        """Signal over noise in the outputs, in dB."""
        return sqnr_db(self.signal, self.noise)


def quantize_matrix(
    weight: torch.Tensor,
    moment: Moment,
    method: Method,
    target: torch.Tensor | None = None,
    *,
    stock: bool = False,
) -> tuple[W4A8Linear, MatrixStats]:
    """Choose codes, tables and channel scales for a matrix; on the device that it is on.

    weight: bfloat16, float16 or float32 [N, K], N a multiple of 8 and K of 128. target: what to approximate instead,
    float32 [N, K]. moment: `curvature(H, method.damping)`, for matrices that share their inputs; or H itself, float32
    or float64 [K, K]; or the energies of the inputs [K]; or None.
    stock: the FP8 step is left to vLLM's load-time path, so `source_scale` is set, as `to_w4a8` does.
    The same bytes on any number of threads. Memory beside the arguments and the result: that of `curvature`, and some
    rows of the matrix in float32 for each thread; on a GPU the whole matrix three times in float32.
    Raises ValueError where a number is not finite, where shapes do not fit, where the method needs a second moment
    that there is not, and for free tables with `stock`.
    """
    goal = weight if target is None else target
    check_weights(goal)
    if stock and method.tables is Tables.FREE:
        raise ValueError("stock vLLM cannot load tables that are not multiples of a scale")
    known = ready(moment, goal.shape[1], method, goal.device)
    uniform = None
    if method.tables is Tables.SCALE:
        uniform = uniform_start(goal, known.groups, headroom=method.feedback, stock=stock)
    matrix = _Matrix(goal, known, method, uniform)
    return matrix.layer(), matrix.stats()


def quantize_matrices(
    weights: Sequence[torch.Tensor],
    moments: Sequence[Moment],
    method: Method,
    targets: Sequence[torch.Tensor | None],
    *,
    stock: bool = False,
) -> list[tuple[W4A8Linear, MatrixStats]]:
    """Do what `quantize_matrix` does to matrices of one shape that are small, such as those of experts.

    On a CPU side by side, with the same bytes as one after the other. On a GPU in one go where tables are free: a
    small matrix alone keeps few of its processors busy, and each step of it waits for the one before.
    """
    goals = [weight if target is None else target for weight, target in zip(weights, targets, strict=True)]
    device = goals[0].device
    if device.type != "cpu" and method.tables is Tables.FREE and len(goals) > 1:
        return _together(goals, moments, method)
    found: list[tuple[W4A8Linear, MatrixStats]] = [None] * len(goals)  # type: ignore[list-item]

    def do(place: int) -> None:
        found[place] = quantize_matrix(goals[place], moments[place], method, stock=stock)

    if device.type == "cpu":
        side_by_side(do, range(len(goals)))
    else:
        for place in range(len(goals)):
            do(place)
    return found


def _together(
    goals: Sequence[torch.Tensor], moments: Sequence[Moment], method: Method
) -> list[tuple[W4A8Linear, MatrixStats]]:
    """Return what free tables make of several matrices, whose channels take turns."""
    for goal in goals:
        check_weights(goal)
    known = [ready(moment, goals[0].shape[1], method, goals[0].device) for moment in moments]
    turns = torch.stack([goal.float() for goal in goals], dim=1).flatten(0, 1)
    matrix = _Matrix(turns, stacked(known), method, None)
    return [matrix.part(place, len(known), each.damping) for place, each in enumerate(known)]


def check_weights(weight: torch.Tensor) -> None:
    """Raise ValueError where a weight is infinite or NaN, or K not a multiple of 128."""
    n, k = weight.shape
    if k % GROUP_SIZE:
        raise ValueError(f"K = {k} is not a multiple of {GROUP_SIZE}")
    if not all(bool(torch.isfinite(part.sum(dtype=torch.float64))) for part in torch.split(weight, _CHECKED)):
        bad = n * k - int(torch.isfinite(weight).sum())
        raise ValueError(f"{bad} of {n * k} weights are not finite")


class _Matrix:
    """A matrix, some output channels after others, and what was chosen for it."""

    def __init__(self, goal: torch.Tensor, known: Curvature, method: Method, uniform: UniformStart | None) -> None:
        n, k = goal.shape
        self._goal, self._known, self._method, self._uniform = goal, known, method, uniform
        self._packed = torch.empty(n, k // 8, dtype=torch.int32, device=goal.device)
        self._entries = torch.empty(k // GROUP_SIZE, n, CODE_MAX, dtype=E4M3, device=goal.device)
        self._channel = torch.empty(n, device=goal.device)
        self._sums = torch.empty(4, n, dtype=torch.float64, device=goal.device)
        by_rows(self._do, goal, together=len(known.importance) if known.importance.dim() == 2 else 1)

    def _do(self, part: slice) -> None:
        uniform = None if self._uniform is None else self._uniform.rows(part)
        rows = Rows(self._goal[part], self._known, self._method, uniform)
        self._packed[part] = pack_codes(rows.codes)
        self._entries.view(torch.uint8)[:, part] = rows.entries.to(E4M3).view(torch.uint8)
        self._channel[part] = rows.channel
        self._sums[:, part] = rows.sums

    def layer(self) -> W4A8Linear:
        """Return the layer."""
        if self._uniform is None:
            return W4A8Linear(self._packed, Packing.PACK_QUANTIZED, None, self._entries, self._channel)
        scale = (self._entries[..., 0].float() / -CODE_MAX).to(E4M3)
        source = self._uniform.source_scale(scale)
        return W4A8Linear(self._packed, Packing.PACK_QUANTIZED, scale, None, self._channel, source)

    def stats(self) -> MatrixStats:
        """Return what that cost."""
        return MatrixStats.of(self._sums, self._known.damping)

    def part(self, place: int, count: int, damping: float) -> tuple[W4A8Linear, MatrixStats]:
        """Return one of `count` matrices that were worked together with free tables."""
        packed, entries = self._packed[place::count].contiguous(), self._entries.view(torch.uint8)[:, place::count]
        layer = W4A8Linear(
            packed,
            Packing.PACK_QUANTIZED,
            None,
            entries.contiguous().view(E4M3),
            self._channel[place::count].contiguous(),
        )
        return layer, MatrixStats.of(self._sums[:, place::count], damping)
