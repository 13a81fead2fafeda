"""The squared error of a group as a function of its FP8 scale, in closed form.

A group with scale s, whose code magnitude m = 1 … 8 occurs with frequency h[m], gets the table entries C·q(f·m):
C the channel scale, f the FP8 group scale, q the rounding to E4M3. With x = |s|/C, error and energy per weight are

    Σ h[m]·(s·m − C·q(f·m))² = C²·(A[f] − 2·x·B[f] + x²·H),   s²·H
    A[f] = Σ h[m]·q(f·m)²,  B[f] = Σ h[m]·m·q(f·m),  H = Σ h[m]·m²

A and B are tables over the FP8 values, and for each f the error less x²·H is a straight line in x. The best f is
therefore the lower envelope of at most 103 lines: piecewise constant in x with exact thresholds, so one binary search
a group finds the global optimum, subnormals included.
"""

from dataclasses import dataclass

import torch

from convert_w4a8.fp8 import CODE_MAX, E4M3, SCALE_MAX, to_e4m3

_FINITE = 127
"""Bit patterns 0 … 126 are the non-negative finite E4M3 values, in increasing order."""
_CELL_SHIFT = 16
"""Float32 bits shifted away by truncation to BF16: 128 cells an octave."""
_CELLS = (int(torch.tensor(2 * SCALE_MAX).view(torch.int32)) >> _CELL_SHIFT) + 1
"""Cells up to 112, well beyond the last threshold, which lies below 56."""


def magnitude_frequencies(frequencies: torch.Tensor) -> torch.Tensor:
    """Fold frequencies of the unsigned codes u = 0 … 15, [..., 16], into those of the magnitudes 1 … 8, [..., 8].

    The value of a code is u − 8; zeros cost nothing, whatever the scale.
    """
    magnitudes = frequencies[..., :CODE_MAX].flip(-1).clone()
    magnitudes[..., : CODE_MAX - 1] += frequencies[..., CODE_MAX + 1 :]
    return magnitudes


@dataclass(frozen=True)
class ErrorTable:
    """What the error of a group needs to know of each FP8 scale f, for one set of magnitude frequencies.

    The form is (x − f)²·H − 2·(x − f)·D1[f] + D2[f] with the entries' own rounding d = q(f·m) − f·m,
    D1 = Σ h·m·d, D2 = Σ h·d²: the same polynomial, without the cancellation that float32 would not survive.

    values, d1, d2: float32 [127], indexed by the bits of f.
    winners, thresholds: int64 and float32 [L]: winners[i] is best for x up to thresholds[i], the last of which is inf.
    cells: int64, for each BF16 number x truncates to (its bits), the winner at the beginning of that cell.
    steps: the most thresholds that one cell holds.
    energy: H, a float.
    """

    values: torch.Tensor
    d1: torch.Tensor
    d2: torch.Tensor
    winners: torch.Tensor
    thresholds: torch.Tensor
    cells: torch.Tensor
    steps: int
    energy: float

    def best(self, x: torch.Tensor) -> torch.Tensor:
        """Return int64 bits of the FP8 scale up to 56 with the smallest error at each x ≥ 0."""
        # bucketize(x, thresholds) by a table: a third of the time on a CPU, where this is most of the search.
        cell = (x.contiguous().view(torch.int32) >> _CELL_SHIFT).clamp_(max=len(self.cells) - 1)
        i = self.cells.take(cell.long())
        for _ in range(self.steps):
            i += x > self.thresholds.take(i)
        return self.winners.take(i)

    def error(self, x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
        """Return the squared error a weight in units of C², float32, of the FP8 scale with these bits at each x ≥ 0."""
        d = x - self.values.take(bits)
        return d * (d * self.energy - 2 * self.d1.take(bits)) + self.d2.take(bits)


def error_table(frequencies: torch.Tensor) -> ErrorTable:
    """Build the error table of magnitude frequencies [8], on the CPU. Cheap: 127 × 8 entries, 103 lines."""
    m = torch.arange(1, CODE_MAX + 1, dtype=torch.float64)
    h = frequencies.to("cpu", torch.float64)
    values = torch.arange(_FINITE, dtype=torch.uint8).view(E4M3).double()
    entries = to_e4m3(values[:, None] * m).double()
    d = entries - values[:, None] * m
    fits = values <= SCALE_MAX
    lines, changes = _lower_envelope((entries.square() @ h)[fits].tolist(), (entries @ (h * m))[fits].tolist())
    thresholds = torch.tensor([*changes, torch.inf], dtype=torch.float32)
    cell = thresholds[:-1].view(torch.int32) >> _CELL_SHIFT
    cells = torch.searchsorted(cell, torch.arange(_CELLS, dtype=torch.int32))
    return ErrorTable(
        values=values.float(),
        d1=(d @ (h * m)).float(),
        d2=(d.square() @ h).float(),
        winners=torch.tensor(lines, dtype=torch.int64),
        thresholds=thresholds,
        cells=cells,
        steps=int(torch.bincount(cell).max()) if len(cell) else 0,
        energy=float(h @ m.square()),
    )


def _lower_envelope(a: list[float], b: list[float]) -> tuple[list[int], list[float]]:
    """Return which lines a[i] − 2·x·b[i] (b ascending) are lowest for some x ≥ 0, and where one follows another."""
    lines, starts = [0], [0.0]
    for i in range(1, len(a)):
        while lines:
            j = lines[-1]
            # Equal slopes (the entries that differ never occur): only the lower line can win; the first if both are.
            start = (a[i] - a[j]) / (2 * (b[i] - b[j])) if b[i] > b[j] else (float("inf") if a[i] >= a[j] else -1.0)
            if start > starts[-1]:
                break
            lines.pop()
            starts.pop()
        else:
            start = 0.0
        if start < float("inf"):
            lines.append(i)
            starts.append(start)
    return lines, starts[1:]
