"""A weight matrix as plain W4A16: symmetric INT4 codes and BF16 scales, by the same feedback and descent."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from convert_w4a8.codebooks.matrix import MatrixStats, check_weights
from convert_w4a8.codebooks.method import Method
from convert_w4a8.codebooks.moments import Moment, ready
from convert_w4a8.codebooks.rows import Rows
from convert_w4a8.codebooks.start import by_rows
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.fp8 import CODE_MAX
from convert_w4a8.linear import GROUP_SIZE, Packing, W4Linear
from convert_w4a8.quantization.codes import SCALE_CANDIDATES


def w4a16(
    weight: torch.Tensor, moment: Moment, method: Method, target: torch.Tensor | None = None
) -> tuple[W4Linear, MatrixStats]:
    """Choose symmetric INT4 codes and positive BF16 scales for groups of 128: what any W4A16 kernel takes.

    Arguments and errors are those of `quantize_matrix`; the method's tables do not matter.
    """
    goal = weight if target is None else target
    check_weights(goal)
    n, k = goal.shape
    known = ready(moment, k, method, goal.device)
    packed = torch.empty(n, k // 8, dtype=torch.int32, device=goal.device)
    scales = torch.empty(k // GROUP_SIZE, n, dtype=torch.bfloat16, device=goal.device)
    sums = torch.empty(4, n, dtype=torch.float64, device=goal.device)

    def do(part: slice) -> None:
        rows = Rows(goal[part], known, method, _Integers(torch.ones(len(goal[part]), device=goal.device)))
        packed[part] = pack_codes(rows.codes)
        scales[:, part] = rows.entries[..., 0] / -CODE_MAX
        sums[:, part] = rows.sums

    by_rows(do, goal)
    layer = W4Linear(packed, Packing.PACK_QUANTIZED, scales, None, None, GROUP_SIZE)
    return layer, MatrixStats.of(sums, known.damping)


@dataclass(frozen=True)
class _Integers:
    """Tables s·v of positive BF16 scales s; there are no channel scales, they are 1."""

    channel_scale: torch.Tensor
    is_fixed: ClassVar[bool] = True

    def tables(
        self,
        values: torch.Tensor,
        importance: torch.Tensor,
        groups: slice,  # noqa: ARG002 - every group is as free as the others
        codes: torch.Tensor,
    ) -> torch.Tensor:
        """Return the entries of the best of some scales, each the best for its codes; see `quantization/codes.py`."""
        w, h = values.double(), importance.repeat(len(values) // len(importance), 1)
        unit = w.abs().amax(1, keepdim=True) / CODE_MAX
        normal = w / torch.where(unit > 0, unit, 1.0)
        best_gain = torch.zeros_like(unit)
        best = torch.ones_like(unit)
        for candidate in SCALE_CANDIDATES:
            code = (normal * candidate).round().clamp(-CODE_MAX, CODE_MAX - 1)
            wq, qq = (h * code * normal).sum(1, keepdim=True), (h * code * code).sum(1, keepdim=True)
            scale = torch.where(qq > 0, wq / torch.where(qq > 0, qq, 1.0), 0.0)
            best = torch.where(wq * scale > best_gain, scale, best)
            best_gain = torch.maximum(wq * scale, best_gain)
        scale = (best * unit).bfloat16().double()
        steps = (w / torch.where(scale > 0, scale, 1.0)).round().clamp(-CODE_MAX, CODE_MAX - 1)
        codes.copy_(steps + CODE_MAX)
        return scale * torch.arange(-CODE_MAX, 0, device=w.device)
