"""Codebooks and codes for groups of 128 weights: plain torch on any device, and the oracle for the kernels.

A table has eight entries e[0] … e[7]; the unsigned code u means e[u] below 8, 0 at 8, −e[16 − u] above. Free entries
fall into seven magnitudes that come with both signs, −e[1] … −e[7], and a lone e[0].

Each row [128] is one group of an output channel, in units of the channel scale. Arithmetic is in float64, and sums run
from the first weight to the last.
"""

from collections.abc import Iterator

import torch

from convert_w4a8.fp8 import CODE_MAX, to_e4m3
from convert_w4a8.kernels.codes.reference import nearest_codes, values_of

LARGEST = 126
"""The byte of 448."""
GAIN = 1e-3
"""A step of the descent must gain at least this part of its own square: less may be rounding."""
STEPS = range(-4, 5)
"""Which neighbours of the nearest FP8 scale are tried."""
ROUNDS = 12
"""The most rounds over the entries of a table in the descent."""
_CLUSTERS = 7
_GROUPS_AT_ONCE = 512


def fit(values: torch.Tensor, importance: torch.Tensor, rounds: int) -> torch.Tensor:
    """Return the entries, not rounded, with the least Σ h·(w − ŵ)²: float64 [R, 8].

    The best table without a lone entry, {0, ±m₁ … ±m₇}, cuts the sorted magnitudes into eight runs, the first of them
    zeros: found exactly, by dynamic programming. The lone entry then becomes the mean of that run of one sign from
    which one more value takes most error. `rounds` of Lloyd's algorithm follow.
    """
    shares = _rows(importance, values)
    parts = [slice(start, start + _GROUPS_AT_ONCE) for start in range(0, len(values), _GROUPS_AT_ONCE)]
    return torch.cat([_fit(values[part].double(), shares[part], rounds) for part in parts])


def _rows(importance: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return importance.repeat(-(-len(values) // len(importance)), 1)[: len(values)]


def _fit(w: torch.Tensor, h: torch.Tensor, rounds: int) -> torch.Tensor:
    rows = torch.arange(len(w), device=w.device)
    magnitude, order = w.abs().sort(dim=1, stable=True)
    sums = _prefix_sums(h.gather(1, order), magnitude)
    costs = _run_costs(sums)
    best = [sums[2]]
    for _ in range(_CLUSTERS):
        new = best[-1].clone()
        for j in range(w.shape[1]):
            new = torch.minimum(new, best[-1][:, j, None] + costs[:, j])
        best.append(new)
    entries = torch.zeros(len(w), CODE_MAX, dtype=torch.float64, device=w.device)
    means = torch.zeros_like(w)  # of the run that each magnitude is in
    place = torch.arange(w.shape[1], device=w.device)
    stop = torch.full_like(rows, w.shape[1])
    for c in range(_CLUSTERS, 0, -1):
        previous = best[c - 1]
        is_first = previous[:, :-1] + costs[rows, :, stop] == best[c][rows, stop, None]
        start = torch.where(previous[rows, stop] == best[c][rows, stop], stop, is_first.int().argmax(dim=1))
        mean = _mean(sums, rows, start, stop)
        entries[:, CODE_MAX - c] = -mean
        means = torch.where((place >= start[:, None]) & (place < stop[:, None]), mean[:, None], means)
        stop = start
    lone = torch.zeros_like(entries[:, 0])
    gain = torch.zeros_like(lone)
    for sign in (-1.0, 1.0):
        found, mean = _lone(w.gather(1, order) * sign, h.gather(1, order), means)
        lone = torch.where(found > gain, sign * mean, lone)
        gain = torch.maximum(found, gain)
    entries[:, 0] = lone
    for _ in range(rounds):
        entries = _centres(w, h, nearest_codes(w, entries), entries)
    return entries


def _prefix_sums(h: torch.Tensor, magnitude: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sums of h, h·m and h·m² before each place, float64 [R, V + 1]."""
    first = h * magnitude
    p0, p1, p2 = (torch.nn.functional.pad(terms.cumsum(dim=1), (1, 0)) for terms in (h, first, first * magnitude))
    return p0, p1, p2


def _run_costs(sums: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return the error of replacing the places j … i − 1 by their mean, [R, j, i]; infinite unless j < i."""
    d0, d1, d2 = (p[:, None, :] - p[:, :-1, None] for p in sums)
    costs = d2 - (d1 * d1) / torch.where(d0 > 0, d0, 1.0)
    return costs.masked_fill_(torch.ones_like(costs[0], dtype=torch.bool).tril(), torch.inf)


def _mean(sums: tuple[torch.Tensor, ...], rows: torch.Tensor, start: torch.Tensor, stop: torch.Tensor) -> torch.Tensor:
    d0, d1 = (p[rows, stop] - p[rows, start] for p in sums[:2])
    return torch.where(d0 > 0, d1 / torch.where(d0 > 0, d0, 1.0), 0.0)


def _lone(w: torch.Tensor, h: torch.Tensor, means: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much the best run of the positive ones among sorted w gains by its own mean, and that mean."""
    rows = torch.arange(len(w), device=w.device)
    order = (w <= 0).to(torch.uint8).argsort(dim=1, stable=True)  # the positive ones first
    w, h, means = (x.gather(1, order) for x in (w, h, means))
    h = torch.where(w > 0, h, 0.0)
    w = torch.where(w > 0, w, 0.0)
    sums = _prefix_sums(h, w)
    d = w - means
    errors = torch.nn.functional.pad((h * d * d).cumsum(dim=1), (1, 0))
    gains = (errors[:, None, :] - errors[:, :-1, None]) - _run_costs(sums)
    gain, stop = gains.amax(dim=1).max(dim=1)
    start = (gains[rows, :, stop] == gain[:, None]).int().argmax(dim=1)
    return gain.clamp(min=0), _mean(sums, rows, start, stop)


def _centres(w: torch.Tensor, h: torch.Tensor, codes: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Return the best entries under these codes; those that no code uses stay as they are."""
    best = entries.clone()
    signed = h * torch.where(codes > CODE_MAX, -w, w)
    for j in range(CODE_MAX):
        used = (codes == j) | (codes == 2 * CODE_MAX - j)
        down = torch.where(used, h, 0.0).cumsum(dim=1)[:, -1]
        up = torch.where(used, signed, 0.0).cumsum(dim=1)[:, -1]
        best[:, j] = torch.where(down > 0, up / torch.where(down > 0, down, 1.0), entries[:, j])
    return best


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return to_e4m3(x.float()).double()


def _error(w: torch.Tensor, h: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Return the error under the nearest codes, float64 [R]."""
    d = w - values_of(entries, nearest_codes(w, entries))
    return (h * d * d).cumsum(dim=1)[:, -1]


def _neighbours(entries: torch.Tensor, direction: int) -> torch.Tensor:
    """Return the next E4M3 numbers, below or above."""
    place = to_e4m3(entries.abs().float()).view(torch.uint8).long()
    place = torch.where(entries < 0, -place, place) + direction
    step = place.abs().clamp(max=LARGEST).to(torch.uint8).view(torch.float8_e4m3fn).double()
    return torch.where(place < 0, -step, step)


def refine(
    values: torch.Tensor, importance: torch.Tensor, entries: torch.Tensor, codes: torch.Tensor, passes: int
) -> None:
    """Round entries to E4M3, then improve them on that grid; fill the nearest codes.

    Lloyd's rounds first: under given codes the error is a parabola in each entry, whose nearest E4M3 number to the
    minimum is the best one. Then each entry in turn moves to a neighbour where that lowers the error of the nearest
    codes, `passes` times over, with Lloyd's rounds in between.
    """
    w, h = values.double(), _rows(importance, values)
    e = _rounded(entries)
    active = torch.ones(len(w), dtype=torch.bool, device=w.device)
    for attempt in range(passes + 1):
        for _ in range(2 if attempt else 4):
            e = torch.where(active[:, None], _rounded(_centres(w, h, nearest_codes(w, e), e)), e)
        if attempt == passes:
            break
        best = _error(w, h, e)
        moved = torch.zeros_like(active)
        for j in range(CODE_MAX):
            for direction in (-1, 1):
                trial = e.clone()
                trial[:, j] = _neighbours(e[:, j], direction)
                error = _error(w, h, trial)
                better = active & (error < best)
                e, best = torch.where(better[:, None], trial, e), torch.where(better, error, best)
                moved |= better
        active &= moved
    entries.copy_(e)
    codes.copy_(nearest_codes(w, e))


def fit_scale(
    values: torch.Tensor, importance: torch.Tensor, scales: torch.Tensor, limits: torch.Tensor, codes: torch.Tensor
) -> torch.Tensor:
    """Return the entries e4m3(f·(j − 8)) of the FP8 scale f with the least error among those nearest to `scales`.

    limits: the least and the largest byte of |f|, uint8 [R, 2]. float64 [R, 8]; fills the nearest codes.
    """
    w, h = values.double(), _rows(importance, values)
    middle = to_e4m3(scales.abs()).view(torch.uint8).long()
    sign = torch.where(scales < 0, -1.0, 1.0).double()
    j = torch.arange(-CODE_MAX, 0, device=w.device)
    entries = torch.empty(len(w), CODE_MAX, dtype=torch.float64, device=w.device)
    best = torch.full_like(sign, torch.inf)
    for step in STEPS:
        place = torch.minimum(torch.maximum(middle + step, limits[:, 0].long()), limits[:, 1].long())
        f = sign * place.to(torch.uint8).view(torch.float8_e4m3fn).double()
        trial = _rounded(f[:, None] * j)
        error = _error(w, h, trial)
        better = error < best
        entries, best = torch.where(better[:, None], trial, entries), torch.where(better, error, best)
    codes.copy_(nearest_codes(w, entries))
    return entries


def feedback(
    goal: torch.Tensor,
    start: torch.Tensor,
    factor: torch.Tensor,
    entries: torch.Tensor,
    codes: torch.Tensor,
    errors: torch.Tensor,
) -> None:
    """Choose the nearest code column by column, after the errors of the columns before were made up for.

    Column k rounds x[k] = start[k] − Σ_{j<k} errors[j]·factor[j, k], and leaves errors[k] = q[k] − goal[k].
    """
    for part, m in _parts(factor):
        x, e, u = start[part].double(), entries[part], codes[part]
        for k in range(x.shape[1]):
            u[:, k] = nearest_codes(x[:, k : k + 1].contiguous(), e)[:, 0]
            errors[part, k] = values_of(e, u[:, k : k + 1])[:, 0] - goal[part, k]
            x[:, k + 1 :] -= errors[part, k, None].double() * m[k, k + 1 :]


def _parts(matrices: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield for each of C matrices the rows that have it, and the matrix."""
    for c, matrix in enumerate(matrices):
        yield slice(c, None, len(matrices)), matrix


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
    """Improve codes, then entries, one at a time, where that lowers the objective e·H·eᵀ of the output channel.

    gradient: of half the objective, e·H, for these columns. moment: H's block, damped. A step d of column k changes
    the objective by d·(2·gradient[k] + d·H[k, k]), and one of an entry by the same of its columns taken together.
    """
    for part, m in _parts(moment):
        found = _descend(gradient[part].double(), m, entries[part].clone(), codes[part].long(), rounds, free)
        x, entries[part], codes[part] = found
        errors[part] = (x - goal[part]).to(errors.dtype)


def _descend(
    y: torch.Tensor, moment: torch.Tensor, e: torch.Tensor, u: torch.Tensor, rounds: int, free: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return values, entries and codes for a gradient y, entries e and codes u, all of which are changed."""
    x = values_of(e, u)
    for _ in range(rounds):
        for k in range(x.shape[1]):
            h = moment[k, k]
            if float(h) <= 0:
                continue
            aim = nearest_codes((x[:, k] - y[:, k] / h)[:, None], e)
            d = values_of(e, aim)[:, 0] - x[:, k]
            moves = d * (2 * y[:, k] + d * h) < -GAIN * (d * d * h)
            u[:, k] = torch.where(moves, aim[:, 0], u[:, k])
            d = torch.where(moves, d, 0.0)
            x[:, k] += d
            y += d[:, None] * moment[k]
        x = values_of(e, u)
        if free:
            _move_entries(x, y, moment, e, u)
    return x, e, u.to(torch.uint8)


def _move_entries(x: torch.Tensor, y: torch.Tensor, moment: torch.Tensor, e: torch.Tensor, u: torch.Tensor) -> None:
    """Move entries on the E4M3 grid, and with them values x and gradient y, all in place."""
    entry = torch.where(u < CODE_MAX, u, 2 * CODE_MAX - u) & (CODE_MAX - 1)
    sign = torch.where(u < CODE_MAX, 1.0, torch.where(u == CODE_MAX, 0.0, -1.0)).double()
    rows = torch.arange(len(x), device=x.device)
    products = torch.zeros(len(x), CODE_MAX, x.shape[1], dtype=torch.float64, device=x.device)
    a = torch.zeros(len(x), CODE_MAX, CODE_MAX, dtype=torch.float64, device=x.device)
    b = torch.zeros_like(e)
    for k in range(x.shape[1]):
        b[rows, entry[:, k]] += sign[:, k] * y[:, k]
        products[rows, entry[:, k]] += sign[:, k, None] * moment[k]
    for k in range(x.shape[1]):
        a[rows, :, entry[:, k]] += sign[:, k, None] * products[:, :, k]
    before = e.clone()
    active = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(ROUNDS):
        moved = torch.zeros_like(active)
        for j in range(CODE_MAX):
            h = a[:, j, j]
            d = _rounded(e[:, j] - b[:, j] / torch.where(h > 0, h, 1.0)) - e[:, j]
            moves = active & (h > 0) & (d * (2 * b[:, j] + d * h) < -GAIN * (d * d * h))
            d = torch.where(moves, d, 0.0)
            e[:, j] += d
            b += d[:, None] * a[:, :, j]
            moved |= moves
        active &= moved
    for j in range(CODE_MAX):
        y += (e[:, j] - before[:, j])[:, None] * products[:, j]
    x.copy_(values_of(e, u))
