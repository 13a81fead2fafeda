"""The groups of a layer by their distinct values, so that work on 128 weights becomes work on 16.

Under a zero-point a group of 128 weights has at most 16 values, one for each code. Choosing a scale, codes and table
entries for it needs only these and how much each of them counts; each weight then gets what its code got. Groups that
a g_idx or another group size scatters, and those of a dense layer, have no such alphabet: each weight is a value of its
own.
"""

from dataclasses import dataclass

import torch

from convert_w4a8 import devices
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.packing import pack_codes, to_pack_quantized
from convert_w4a8.linear import GROUP_SIZE, DenseLinear, W4Linear


@dataclass(frozen=True)
class Groups:
    """R = N·K/128 groups, in the order [N, K/128], with V values each.

    values: float32 [R, V]; 0 where no weight has the value. counts: how many weights have it, float32 [R, V].
    importance: the sum of their importances, float32 [R, V].
    letters: which value each weight has, uint8 [R, 128]; None where V = 128 and weight i has value i.
    """

    values: torch.Tensor
    counts: torch.Tensor
    importance: torch.Tensor
    letters: torch.Tensor | None

    def packed(self, codes: torch.Tensor, n: int) -> torch.Tensor:
        """Return the codes of all weights, int32 [n, K/8], from those of the values, uint8 [R, V]."""
        if self.letters is None:
            return pack_codes(codes.view(n, -1))
        return devices.codes(codes.device).spell(self.letters, codes).view(n, -1)


def has_alphabet(w: W4Linear | DenseLinear) -> bool:
    """Whether each group of 128 weights has at most 16 values, one for each code."""
    return isinstance(w, W4Linear) and w.zeros is not None and w.g_idx is None and w.group_size == GROUP_SIZE


def gather(w: W4Linear | DenseLinear, importance: torch.Tensor | None) -> Groups:
    """Gather the groups of 128 of a layer, or of some of its output channels.

    importance: what a squared error in each input channel counts, float32 [K]; the same for all if None.
    """
    n, k = w.shape_nk
    if not has_alphabet(w):
        values = dequantize(w).view(-1, GROUP_SIZE)
        counts = torch.ones_like(values)
        return Groups(
            values, counts, counts if importance is None else importance.expand(n, k).reshape(values.shape), None
        )
    shares = torch.ones(k, device=w.device) if importance is None else importance
    return Groups(*devices.codes(w.device).gather(*by_output_channel(w), shares))


def by_output_channel(w: W4Linear | DenseLinear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes int32 [N, K/8], zero-points uint8 [N, G], scales float32 [N, G] of a layer that has an alphabet."""
    assert isinstance(w, W4Linear)
    assert w.zeros is not None
    return to_pack_quantized(w.packed, w.packing), w.zeros.t().contiguous(), w.scales.t().float().contiguous()
