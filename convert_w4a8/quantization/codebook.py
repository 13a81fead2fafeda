"""Codes and FP8 tables chosen together, for layers whose codes are not kept.

The kernel's table is a codebook: entry j = 0 … 7 is the value of code j − 8, its negative the value of code 8 − j
(for j ≥ 1), and code 0 is 0. The entry of −8 has no counterpart, so its sign and size are free.
"""

import torch

from convert_w4a8.fp8 import CODE_MAX, to_e4m3
from convert_w4a8.linear import SYMMETRIC_ZERO
from convert_w4a8.quantization.groups import tree_sum


def fit(
    values: torch.Tensor, weights: torch.Tensor, tables: torch.Tensor, rounds: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the codes of groups nearest to their tables, after improving the tables some rounds (Lloyd's algorithm).

    values: float32 [R, V], in units of the channel scale. weights: of their squared errors, float32 [R, V].
    tables: float8_e4m3fn [R, 8]. No round raises the weighted squared error.
    Returns unsigned codes uint8 [R, V] and tables float8_e4m3fn [R, 8].
    """
    entries = tables.float()
    for _ in range(rounds):
        # The error of an entry is a parabola in it, so the nearest FP8 value to its minimum is the best one.
        entries = to_e4m3(best_entries(values, weights, nearest_codes(values, entries), entries)).float()
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


def _by_code(entries: torch.Tensor) -> torch.Tensor:
    """Return the values of all 16 unsigned codes, float32 [R, 16]."""
    return torch.cat((entries, torch.zeros_like(entries[:, :1]), -entries[:, 1:].flip(1)), dim=1)


def best_entries(
    values: torch.Tensor, weights: torch.Tensor, codes: torch.Tensor, entries: torch.Tensor
) -> torch.Tensor:
    """Return the entries, float32 [R, 8], with the least weighted squared error under unsigned codes [R, V].

    Entries that no code uses stay as they are.
    """
    signed = weights * torch.where(codes > SYMMETRIC_ZERO, -values, values)
    best = entries.clone()
    for j in range(CODE_MAX):
        # Sums of masked values in a fixed order and not scatter_add, whose order, and so its last bit, varies on a GPU.
        used = (codes == j) | (codes == 2 * CODE_MAX - j)
        weight = tree_sum(torch.where(used, weights, 0.0))
        best[:, j] = torch.where(weight > 0, tree_sum(torch.where(used, signed, 0.0)) / weight, entries[:, j])
    return best
