"""The groups of a layer by their distinct values, so that work on 128 weights becomes work on 16.

Under a zero-point a group of 128 weights has at most 16 values, one for each code. Choosing a scale, codes and table
entries for it needs only these and how much each of them counts; each weight then gets what its code got. Groups that
a g_idx or another group size scatters have no such alphabet: each weight is a value of its own.
"""

from dataclasses import dataclass

import torch

from convert_w4a8 import devices
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.packing import pack_rows, to_rows, unpack_codes
from convert_w4a8.linear import GROUP_SIZE, W4Linear

_CODES = 16


@dataclass(frozen=True)
class Groups:
    """R = N·K/128 groups, in the order [N, K/128], with V values each.

    values: float32 [R, V]; 0 where no weight has the value. counts: how many weights have it, float32 [R, V].
    weights: the sum of their importances, float32 [R, V].
    letters: which value each weight has, uint8 [R, 128]; None where V = 128 and weight i has value i.
    """

    values: torch.Tensor
    counts: torch.Tensor
    weights: torch.Tensor
    letters: torch.Tensor | None

    def rows(self, codes: torch.Tensor, n: int) -> torch.Tensor:
        """Return the codes of all weights in ROWS packing, int32 [n, K/8], from those of the values, uint8 [R, V]."""
        kernels = devices.kernels("requantize", codes.device)
        if self.letters is None or kernels is None:
            return pack_rows(self._spell(codes).view(n, -1))
        words: torch.Tensor = kernels.spell(self.letters, codes)
        return words.view(n, -1)

    def _spell(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the code of each weight, uint8 [R, 128], from the codes of the values, uint8 [R, V]."""
        if self.letters is None:
            return codes
        offsets = torch.arange(0, codes.numel(), _CODES, dtype=torch.int32, device=codes.device)
        index = offsets[:, None] + self.letters
        return codes.flatten().index_select(0, index.flatten()).view(index.shape)


def gather(w: W4Linear, importance: torch.Tensor | None) -> Groups:
    """Gather the groups of 128 of a layer, or of some of its output channels.

    importance: what a squared error in each input channel counts, float32 [K]; the same for all if None.
    """
    n, k = w.shape_nk
    if w.g_idx is not None or w.group_size != GROUP_SIZE or w.zeros is None:
        values = dequantize(w).view(-1, GROUP_SIZE)
        counts = torch.ones_like(values)
        weights = counts if importance is None else importance.expand(n, k).reshape(values.shape)
        return Groups(values, counts, weights, None)
    zeros, scales = w.zeros.t().contiguous(), w.scales.t().float().contiguous()
    kernels = devices.kernels("requantize", w.packed.device)
    if kernels is not None:
        shares = torch.ones(k, device=zeros.device) if importance is None else importance
        return Groups(*kernels.gather(to_rows(w.packed, w.packing), zeros, scales, shares))
    letters = unpack_codes(w.packed, w.packing).view(-1, GROUP_SIZE)
    bags, one = letters.int(), torch.eye(_CODES, device=letters.device)
    counts = torch.nn.functional.embedding_bag(bags, one, mode="sum")
    weights = counts
    if importance is not None:
        shares = importance.expand(n, k).reshape(letters.shape)
        weights = torch.nn.functional.embedding_bag(bags, one, per_sample_weights=shares, mode="sum")
    steps = torch.arange(_CODES, device=letters.device) - zeros.view(-1, 1).float()
    values = torch.where(counts > 0, steps * scales.view(-1, 1), 0.0)
    return Groups(values, counts, weights, letters)


def tree_sum(terms: torch.Tensor) -> torch.Tensor:
    """Sum up [R, V], V a power of two, by halves: an order that is the same on every device."""
    while terms.shape[1] > 1:
        half = terms.shape[1] // 2
        terms = terms[:, :half] + terms[:, half:]
    return terms[:, 0]
