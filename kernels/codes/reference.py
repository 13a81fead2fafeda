"""New codes, scales and table entries in plain torch, on any device: what the kernels give, byte for byte.

Groups are rows [R, V] of V = 16 values (one a code) or 128 (one a weight). The kernel's table is a codebook: entry
j = 0 … 7 is the value of code j − 8, its negative the value of code 8 − j (for j ≥ 1), and code 0 is 0. The entry of
−8 has no counterpart, so its sign and size are free.
"""

from collections.abc import Iterator

import torch

from convert_w4a8.fp8 import CODE_MAX, to_e4m3
from convert_w4a8.linear import GROUP_SIZE, SYMMETRIC_ZERO

_CODES = 16
_VALUES_AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 26}
"""Values worked on together: 1 MiB of float32, which stays in a core's cache; on a GPU as many as there are."""


def gather(
    packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, importance: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count the codes of groups of 128: see `quantization/groups.py` for what is returned.

    packed: int32 [n, K/8]. zeros: uint8 [n, K/128]. scales: float32 [n, K/128]. importance: float32 [K].
    """
    letters = _letters(packed)
    bags, one = letters.int(), torch.eye(_CODES, device=letters.device)
    counts = torch.nn.functional.embedding_bag(bags, one, mode="sum")
    shares = importance.view(1, -1, GROUP_SIZE).expand(len(packed), -1, -1).reshape(letters.shape)
    importances = torch.nn.functional.embedding_bag(bags, one, per_sample_weights=shares, mode="sum")
    values = torch.where(counts > 0, _steps(zeros) * scales.reshape(-1, 1), 0.0)
    return values, counts, importances, letters


def add_energies(packed: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, energies: torch.Tensor) -> None:
    """Add the squares of the weights of groups of 128 to `energies`, float64 [K]; arguments as for `gather`."""
    values = _steps(zeros) * scales.reshape(-1, 1)
    weights = values.gather(1, _letters(packed).long()).view(len(packed), -1)
    energies += weights.square_().sum(dim=0, dtype=torch.float64)


def fit_symmetric(
    values: torch.Tensor,
    importance: torch.Tensor,
    kept: torch.Tensor,
    candidates: list[float],
    codes: torch.Tensor,
    scales: torch.Tensor,
) -> None:
    """Choose symmetric codes and scales for the groups that are not kept.

    values, importance: float32 [R, V]. kept: bool [R]. candidates: what a group whose largest magnitude is 8 is
    multiplied by before it is rounded to codes. Unsigned codes uint8 [R, V] and scales float32 [R] are filled.
    """
    for index in _batches(~kept, values.shape[1]):
        codes[index], scales[index] = _best_scale(values[index], importance[index], candidates)


def _best_scale(
    values: torch.Tensor, importance: torch.Tensor, candidates: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    low, high = values.aminmax(dim=1)
    unit = torch.where(high > -low, -high, -low) / CODE_MAX  # negative: −8 stands for the largest positive value
    unit = torch.where(unit == 0, 1.0, unit)
    normal = values / unit[:, None]
    best = torch.ones_like(unit)
    best_gain = torch.zeros_like(unit)
    for candidate in candidates:
        codes = _round(normal * candidate)
        weighted = codes * importance
        # Under codes q the best scale is Σwq/Σq², and it leaves the error Σw² − (Σwq)²/Σq².
        wq = tree_sum(weighted * normal)
        qq = tree_sum(weighted.mul_(codes))
        scale = torch.where(qq > 0, wq / qq, 0.0)
        gain = wq * scale
        best = torch.where(gain > best_gain, scale, best)
        best_gain = torch.maximum(gain, best_gain)
    codes = _round(normal / best[:, None])
    return (codes + SYMMETRIC_ZERO).to(torch.uint8), best * unit


def refit(
    values: torch.Tensor,
    counts: torch.Tensor,
    importance: torch.Tensor,
    kept: torch.Tensor,
    channel_scale: torch.Tensor,
    codes: torch.Tensor,
    tables: torch.Tensor,
    rounds: int,
) -> tuple[float, float]:
    """Put what `fit` returns into `codes` and `tables`, for the groups that are not kept.

    channel_scale: float32 [n]; the groups are in the order [n, K/128]. tables: float8_e4m3fn [R, 8].
    Returns the energy of the values, and that of their difference from what they became, of all groups.
    """
    channel = channel_scale.repeat_interleave(len(values) // len(channel_scale))[:, None]
    for index in _batches(~kept, values.shape[1]):
        codes[index], fitted = fit(values[index] / channel[index], importance[index], tables[index], rounds)
        tables.view(torch.uint8)[index] = fitted.view(torch.uint8)  # torch does not index FP8 on every device
    difference = values_of(tables.float(), codes).mul_(channel).sub_(values)
    return _energy(values, counts), _energy(difference, counts)


def spell(letters: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return the codes uint8 [R, 16] of the letters uint8 [R, 128], eight a word: int32 [R, 16]."""
    spelled = codes.gather(1, letters.long())
    return (spelled[:, ::2] | spelled[:, 1::2] << 4).contiguous().view(torch.int32)


def fit(
    values: torch.Tensor, importance: torch.Tensor, tables: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the codes of groups nearest to their tables, after improving the tables some rounds (Lloyd's algorithm).

    values: float32 [R, V], in units of the channel scale. importance: of their squared errors, float32 [R, V].
    tables: float8_e4m3fn [R, 8]. No round raises the weighted squared error.
    Returns unsigned codes uint8 [R, V] and tables float8_e4m3fn [R, 8].
    """
    entries = tables.float()
    for _ in range(rounds):
        # The error of an entry is a parabola in it, so the nearest FP8 value to its minimum is the best one.
        entries = to_e4m3(best_entries(values, importance, nearest_codes(values, entries), entries)).float()
    return nearest_codes(values, entries).to(torch.uint8), to_e4m3(entries)


def nearest_codes(values: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Return the unsigned codes, int64 [R, V], whose values under table entries [R, 8] are nearest to [R, V]."""
    by_code = _by_code(entries)
    ordered, order = by_code.sort(dim=1, stable=True)
    middles = (ordered[:, 1:] + ordered[:, :-1]) / 2
    return order.gather(1, torch.searchsorted(middles, values))


def values_of(entries: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Return what unsigned codes uint8 [R, V] stand for under table entries float32 [R, 8]: float32 [R, V]."""
    return _by_code(entries).gather(1, codes.long())


def best_entries(
    values: torch.Tensor, importance: torch.Tensor, codes: torch.Tensor, entries: torch.Tensor
) -> torch.Tensor:
    """Return the entries, float32 [R, 8], with the least weighted squared error under unsigned codes [R, V].

    Entries that no code uses stay as they are.
    """
    signed = importance * torch.where(codes > SYMMETRIC_ZERO, -values, values)
    best = entries.clone()
    for j in range(CODE_MAX):
        # Sums of masked values in a fixed order and not scatter_add, whose order, and so its last bit, varies on a GPU.
        used = (codes == j) | (codes == 2 * CODE_MAX - j)
        total = tree_sum(torch.where(used, importance, 0.0))
        best[:, j] = torch.where(total > 0, tree_sum(torch.where(used, signed, 0.0)) / total, entries[:, j])
    return best


def tree_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum up [R, V], V a power of two, by halves: an order that is the same on every device."""
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    return terms[:, 0]


def _letters(packed: torch.Tensor) -> torch.Tensor:
    """Return the unsigned codes of groups of 128, uint8 [R, 128]."""
    data = packed.contiguous().view(torch.uint8)
    return torch.stack((data & 15, data >> 4), dim=-1).view(-1, GROUP_SIZE)


def _steps(zeros: torch.Tensor) -> torch.Tensor:
    """Return code − zero for all 16 codes of each group, float32 [R, 16]."""
    return torch.arange(_CODES, device=zeros.device) - zeros.reshape(-1, 1).float()


def _by_code(entries: torch.Tensor) -> torch.Tensor:
    """Return the values of all 16 unsigned codes, float32 [R, 16]."""
    return torch.cat((entries, torch.zeros_like(entries[:, :1]), -entries[:, 1:].flip(1)), dim=1)


def _round(x: torch.Tensor) -> torch.Tensor:
    return x.round_().clamp_(-CODE_MAX, CODE_MAX - 1)


def _batches(mask: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Yield the indices where a mask [R] is set, for groups of `width` values, as many as suit the device at a time."""
    yield from torch.split(mask.nonzero()[:, 0], max(1, _VALUES_AT_ONCE[mask.device.type] // width))


def _energy(values: torch.Tensor, counts: torch.Tensor) -> float:
    return float(values.square().mul_(counts).sum(dtype=torch.float64))
