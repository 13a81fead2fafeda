"""Some output channels of a matrix: tables, codes and channel scales, by feedback and descent."""

from dataclasses import dataclass

import torch

from convert_w4a8 import devices
from convert_w4a8.codebooks.curvature import Curvature
from convert_w4a8.codebooks.method import Method
from convert_w4a8.codebooks.start import Uniform, free_channel_scale
from convert_w4a8.fp8 import CODE_MAX
from convert_w4a8.linear import GROUP_SIZE

_INNER = 2
"""Rounds of descent on a group before the next."""
_LLOYD = 8
"""The most rounds of Lloyd's algorithm before entries are rounded."""


@dataclass(frozen=True)
class Energies:
    """Sums over the columns of n output channels, float64 [n]: of the target g, of the error e, and of their product.

    The error is what was chosen less the target.
    """

    target: torch.Tensor
    cross: torch.Tensor
    error: torch.Tensor

    def scaled(self, ratio: torch.Tensor) -> "Energies":
        """Return what they become if what was chosen is multiplied by 1 + ratio."""
        chosen = self.error + 2 * self.cross + self.target
        error = self.error + 2 * ratio * (self.error + self.cross) + ratio.square() * chosen
        return Energies(self.target, self.cross + ratio * (self.cross + self.target), error)


class Rows:
    """Output channels [n, K] on their way; what is chosen is in `codes`, `entries`, `channel`.

    codes: uint8 [n, K]. entries: E4M3 numbers in float32 [G, n, 8]. channel: channel scales, float32 [n].
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
            fitted = self._kernels.fit(weight.view(-1, GROUP_SIZE), known.groups, _LLOYD).view(n, -1)
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
        for _ in range(method.sweeps):
            self._descend()

    def _tables(
        self, values: torch.Tensor, groups: slice, entries: torch.Tensor | None, codes: torch.Tensor
    ) -> torch.Tensor:
        """Choose the tables of these groups, values [R, 128], and their nearest codes. entries: where to begin."""
        importance = self._known.groups[groups]
        if self._uniform is None:
            entries = self._kernels.fit(values, importance, _LLOYD) if entries is None else entries
            self._kernels.refine(values, importance, entries, codes, self._method.passes)
            return entries
        return self._uniform.tables(values, importance, groups, codes)

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
            start = goal - self._errors[:, : s.start] @ factor[: s.start, s]
            codes, errors = torch.empty_like(goal, dtype=torch.uint8), torch.empty_like(goal)
            entries = self._tables(start, slice(g, g + 1), None, codes)
            self._kernels.feedback(goal, start, factor[s, s].double(), entries, codes, errors)
            self._keep(g, s, entries, codes, errors)

    def _descend(self) -> None:
        moment, damping = self._known.moment, self._known.damping
        assert moment is not None
        for g, s in enumerate(self._groups()):
            gradient = (self._errors @ moment[:, s]).add_(self._errors[:, s], alpha=damping)
            block = moment[s, s].double()
            block.diagonal().add_(damping)
            goal = self._goal[:, s].contiguous()
            entries, codes, errors = self.entries[g].double(), self.codes[:, s].contiguous(), torch.empty_like(goal)
            free = self._uniform is None
            self._kernels.descend(goal, gradient, block, entries, codes, errors, _INNER, free)
            self._keep(g, s, entries, codes, errors)

    def _keep(self, g: int, s: slice, entries: torch.Tensor, codes: torch.Tensor, errors: torch.Tensor) -> None:
        self.entries[g], self.codes[:, s], self._errors[:, s] = entries, codes, errors

    def energies(self) -> tuple[Energies, Energies]:
        """Return energies under the objective, and of the weights themselves."""
        return self._in_units(self._objective()), self._in_units((self._goal, self._errors))

    def _objective(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return target and errors times R, H = R·Rᵀ: half the work of products with H."""
        root = self._known.importance.sqrt()
        parts = []
        for part in (self._goal, self._errors):
            product = part
            if self._known.factor is not None:
                product = torch.empty_like(part)
                for s in self._groups():
                    product[:, s] = part[:, : s.stop] @ self._known.factor[: s.stop, s]
            parts.append(product * root.float())
        return parts[0], parts[1]

    def _in_units(self, parts: tuple[torch.Tensor, torch.Tensor]) -> Energies:
        target, error = parts
        unit = self.channel.double().square()

        def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a * b).sum(1, dtype=torch.float64) * unit

        return Energies(dot(target, target), dot(target, error), dot(error, error))
