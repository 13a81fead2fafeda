"""Some output channels of a matrix: tables, codes and channel scales, by feedback and descent."""

import torch

from convert_w4a8 import devices
from convert_w4a8.codebooks.method import Method
from convert_w4a8.codebooks.moments import Curvature
from convert_w4a8.codebooks.start import Uniform, free_channel_scale
from convert_w4a8.fp8 import CODE_MAX
from convert_w4a8.linear import GROUP_SIZE

_INNER = 2
"""Rounds of descent on a group before the next."""
_LLOYD = 8
"""The most rounds of Lloyd's algorithm before entries are rounded."""


class Rows:
    """Output channels [n, K] on their way; what is chosen is in `codes`, `entries`, `channel`.

    Where E matrices are worked together, their channels take turns: row r is one of matrix r % E.

    codes: uint8 [n, K]. entries: E4M3 numbers in float32 [G, n, 8]. channel: channel scales, float32 [n].
    sums: of the squares of target and error under the objective, and of their own, float64 [4, n].
    """

    def __init__(self, weight: torch.Tensor, known: Curvature, method: Method, uniform: Uniform | None) -> None:
        """Choose everything. uniform: what makes tables of multiples of a scale; None where they are free."""
        self._known, self._method, self._uniform = known, method, uniform
        self._kernels = devices.codebooks(weight.device)
        n, k = weight.shape
        self.codes = torch.empty(n, k, dtype=torch.uint8, device=weight.device)
        self.entries = torch.empty(k // GROUP_SIZE, n, CODE_MAX, device=weight.device)
        weight = weight.float().contiguous()
        if uniform is None:
            fitted = self._kernels.fit(weight.view(-1, GROUP_SIZE), self._importance(slice(None)), _LLOYD).view(n, -1)
            self.channel = free_channel_scale(fitted, headroom=method.feedback)
            fitted /= self.channel[:, None]
        else:
            self.channel = uniform.channel_scale
        self._goal = weight / self.channel[:, None]
        self._errors = torch.empty_like(self._goal)
        if method.feedback:
            self._feed_back()
        else:
            self._choose_nearest(None if uniform is not None else fitted.view(-1, CODE_MAX))
        # The target times R, H = R·Rᵀ, in units of the channel scales: half the work of products with H.
        self._target_product = self._times_root(self._goal)
        if method.sweeps:
            self._rescale()
        for _ in range(method.sweeps):
            self._descend()
        error_product = self._rescale()
        pairs = (self._target_product, error_product, self._goal, self._errors)
        squares = [(part * part).sum(1, dtype=torch.float64) for part in pairs]
        self.sums = torch.stack(squares) * self.channel.double().square()

    def _tables(
        self, values: torch.Tensor, groups: slice, entries: torch.Tensor | None, codes: torch.Tensor
    ) -> torch.Tensor:
        """Choose the tables of these groups, values [R, 128], and their nearest codes. entries: where to begin."""
        importance = self._importance(groups)
        if self._uniform is None:
            entries = self._kernels.fit(values, importance, _LLOYD) if entries is None else entries
            self._kernels.refine(values, importance, entries, codes, self._method.passes)
            return entries
        return self._uniform.tables(values, importance, groups, codes)

    def _importance(self, groups: slice) -> torch.Tensor:
        """Return the importances of these groups, float64 [C, 128]: row r of their values has those in row r % C."""
        return self._known.groups[..., groups, :].reshape(-1, GROUP_SIZE)

    def _choose_nearest(self, entries: torch.Tensor | None) -> None:
        n, k = self._goal.shape
        values = self._goal.view(-1, GROUP_SIZE)
        codes = self.codes.view(-1, GROUP_SIZE)
        entries = self._tables(values, slice(0, k // GROUP_SIZE), entries, codes)
        self.entries.copy_(entries.view(n, -1, CODE_MAX).transpose(0, 1))
        by_code = torch.cat((entries, torch.zeros_like(entries[:, :1]), -entries[:, 1:].flip(1)), dim=1)
        self._errors.view(-1, GROUP_SIZE).copy_(by_code.gather(1, codes.long()) - values)

    def _groups(self) -> list[slice]:
        return [slice(start, start + GROUP_SIZE) for start in range(0, self._goal.shape[1], GROUP_SIZE)]

    def _feed_back(self) -> None:
        factor = self._known.factor
        assert factor is not None
        for g, s in enumerate(self._groups()):
            goal = self._goal[:, s].contiguous()
            start = goal - _times(self._errors[:, : s.start], factor[..., : s.start, s])
            codes, errors = torch.empty_like(goal, dtype=torch.uint8), torch.empty_like(goal)
            # What the columns would become if none of this group had to be rounded: e = (start − goal) − e·(M − I).
            block = factor[..., s, s]
            change = _solved(block, start - goal)
            entries = self._tables(goal + change, slice(g, g + 1), None, codes)
            self._kernels.feedback(goal, start, _stack(block).double(), entries, codes, errors)
            self._keep(g, s, entries, codes, errors)

    def _descend(self) -> None:
        moment, damping = self._known.moment, self._known.damping
        assert moment is not None
        for g, s in enumerate(self._groups()):
            gradient = _times(self._errors, moment[..., s]).add_(self._errors[:, s], alpha=damping)
            block = _stack(moment[..., s, s]).double()
            block.diagonal(dim1=1, dim2=2).add_(damping)
            goal = self._goal[:, s].contiguous()
            entries, codes, errors = self.entries[g].double(), self.codes[:, s].contiguous(), torch.empty_like(goal)
            free = self._uniform is None
            self._kernels.descend(goal, gradient, block, entries, codes, errors, _INNER, free)
            self._keep(g, s, entries, codes, errors)

    def _keep(self, g: int, s: slice, entries: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor) -> None:
        self.entries[g], self.codes[:, s], self._errors[:, s] = entries, codes, errors

    def _times_root(self, part: torch.Tensor) -> torch.Tensor:
        """Return rows [n, K] times R, whose square is their energy under the objective."""
        product = part
        if self._known.factor is not None:
            product = torch.empty_like(part)
            for s in self._groups():
                product[:, s] = _times(part[:, : s.stop], self._known.factor[..., : s.stop, s])
        root = self._known.importance.sqrt().float()
        return (product.view(-1, *root.shape) * root).view(part.shape) if root.dim() == 2 else product * root

    def _rescale(self) -> torch.Tensor:
        """Change the channel scales to the best for what was chosen, unless they are fixed. Returns the errors times R.

        The objective is a parabola in a channel's scale.
        """
        error, target = self._times_root(self._errors), self._target_product
        if self._uniform is not None and self._uniform.is_fixed:
            return error
        chosen = error + target
        down = (chosen * chosen).sum(1, dtype=torch.float64)
        up = (chosen * target).sum(1, dtype=torch.float64)
        channel = (self.channel * torch.where(down > 0, up / torch.where(down > 0, down, 1.0), 1.0)).float()
        usable = torch.isfinite(channel) & (channel > 0)
        change = 1 - torch.where(usable, self.channel / channel, 1.0)[:, None]
        self.channel = torch.where(usable, channel, self.channel)
        self._errors += self._goal * change
        error += target * change
        self._goal -= self._goal * change
        target -= target * change
        return error


def _stack(matrices: torch.Tensor) -> torch.Tensor:
    """Return one matrix [K, m], or several [E, K, m], as several."""
    return matrices if matrices.dim() == 3 else matrices[None]


def _times(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Return rows [n, K] times a matrix [K, m]; row r times matrix r % E where there are E, [E, K, m]."""
    if matrices.dim() == 2:
        return rows @ matrices
    found = _apart(rows, len(matrices)) @ matrices
    return found.transpose(0, 1).flatten(0, 1)


def _solved(blocks: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return x with x·M = rows [n, 128], M upper triangular with a unit diagonal; row r has M of r % E."""
    right = rows if blocks.dim() == 2 else _apart(rows, len(blocks))
    found: torch.Tensor = torch.linalg.solve_triangular(blocks, right, upper=True, left=False, unitriangular=True)
    return found if blocks.dim() == 2 else found.transpose(0, 1).flatten(0, 1)


def _apart(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return rows [n, K] of matrices that take turns by matrix: [E, n / E, K]."""
    n, k = rows.shape
    return rows.view(n // count, count, k).transpose(0, 1)
