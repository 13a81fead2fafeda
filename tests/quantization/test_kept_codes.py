"""`linear.kept_groups`, the one definition of kept codes, against what a conversion does to every kind of group."""

from dataclasses import dataclass

import pytest
import torch
from code_groups import dense_layer

from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.packing import pack_codes, unpack_codes
from convert_w4a8.encoding.tables import decode
from convert_w4a8.linear import DenseLinear, Packing, W4A8Linear, W4Linear, keeps_codes, kept_groups, kept_zeros
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.codes import choose_codes, expand_groups, to_symmetric
from convert_w4a8.quantization.layer import to_w4a8

N, K = 16, 512
MODES = pytest.mark.parametrize("mode", ScalesMode, ids=str)
GROUP_SIZES = (32, 64, 128, 256, K)
GROUPS = pytest.mark.parametrize(
    ("group_size", "g_idx"),
    [(size, g_idx) for size in GROUP_SIZES for g_idx in ("none", "scattered") if (size, g_idx) != (K, "scattered")],
)
"""One group of all input channels cannot be scattered."""
ZEROS = [None, *range(16), "mixed"]
"""Symmetric; each zero-point in all groups; all of them in one layer."""


@dataclass(frozen=True)
class Case:
    """A layer, and what tells its groups of 128 apart: steps code − zero-point [N, K], and scales [N, K]."""

    layer: W4Linear
    steps: torch.Tensor
    scales: torch.Tensor

    def kept_by(self, w: W4A8Linear) -> torch.Tensor:
        """Return which groups have the same values under the codes of `w`, but for one scale or its negative."""
        found = unpack_codes(w.packed, w.packing).int() - 8
        same = self._all(found == self.steps) | self._all(found == -self.steps)
        scales = self.scales.view(N, -1, 128)
        return same & (scales == scales[..., :1]).all(dim=-1)

    def _all(self, equal: torch.Tensor) -> torch.Tensor:
        return equal.view(N, -1, 128).all(dim=-1)


def make_case(zero: int | str | None, group_size: int, g_idx: str) -> Case:
    """Return a layer in which every group of 16 weights has all 16 codes, and neighbouring groups other scales.

    g_idx: "none", "scattered", or "trivial", which says only k // group_size.
    """
    generator = torch.Generator().manual_seed(group_size)
    groups = K // group_size
    codes = torch.rand(N, K // 16, 16, generator=generator).argsort(dim=-1).to(torch.uint8).flatten(1)
    scales = (torch.rand(groups, N, generator=generator) + 1) * (1 + torch.arange(groups)[:, None] % 3) / 512
    match zero:
        case None:
            zeros = None
        case "mixed":
            zeros = ((torch.arange(groups)[:, None] * 5 + torch.arange(N)) % 16).to(torch.uint8)
        case _:
            zeros = torch.full((groups, N), int(zero), dtype=torch.uint8)
    index = torch.arange(K, dtype=torch.int32) // group_size
    if g_idx == "scattered":
        index = index[torch.randperm(K, generator=generator)]
    w = W4Linear(
        pack_codes(codes), Packing.PACK_QUANTIZED, scales, zeros, None if g_idx == "none" else index, group_size
    )
    points = torch.full((groups, N), 8) if zeros is None else zeros.int()
    return Case(w, codes.int() - points[index.long()].t(), scales[index.long()].t())


def test_zero_points_whose_values_the_kernel_has() -> None:
    """8, and 7, whose values are those of 8 with the other sign."""
    zeros = torch.arange(16, dtype=torch.uint8).view(4, 4)
    assert zeros[kept_zeros(zeros)].tolist() == [7, 8]


@MODES
@GROUPS
def test_kept_groups_are_those_that_a_conversion_keeps(mode: ScalesMode, group_size: int, g_idx: str) -> None:
    """Group by group, for every zero-point; and the statistics say the same of the layer."""
    for zero in ZEROS:
        case = make_case(zero, group_size, g_idx)
        before = case.layer.packed.clone()
        kept = kept_groups(case.layer)
        w4a8, stats = to_w4a8(case.layer, mode)
        assert torch.equal(kept, case.kept_by(w4a8)), zero
        assert stats.codes_kept == keeps_codes(case.layer) == bool(kept.all()), zero
        can_keep = group_size % 128 == 0 and g_idx == "none"
        assert bool(kept.any()) == (can_keep and zero in (None, 7, 8, "mixed")), zero
        assert bool(kept.all()) == (can_keep and zero in (None, 7, 8)), zero
        # Scale and entries are rounded to FP8's three bits, each once or twice; no value becomes that of another code.
        inside = kept.repeat_interleave(128, dim=1)
        torch.testing.assert_close(decode(w4a8)[inside], dequantize(case.layer)[inside], rtol=0.2, atol=0)
        assert torch.equal(case.layer.packed, before)


@GROUPS
def test_new_codes_and_symmetric_layers_keep_the_same_groups(group_size: int, g_idx: str) -> None:
    """`choose_codes` and `to_symmetric` ask the same definition; what they keep, they keep to the bit."""
    for zero in ZEROS:
        w = make_case(zero, group_size, g_idx).layer
        expected = kept_groups(w)
        symmetric, is_kept = to_symmetric(w)
        assert is_kept == bool(expected.all()), zero
        equal = (dequantize(symmetric) == dequantize(w)).view(N, -1, 128).all(dim=-1)
        assert torch.equal(equal, expected), zero
        assert torch.equal(choose_codes(expand_groups(w), None).kept.view(N, -1), expected), zero


@MODES
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_g_idx_that_says_nothing_costs_nothing(mode: ScalesMode, group_size: int) -> None:
    """Sources leave none; a conversion drops it, and then keeps what it keeps without."""
    for zero in ZEROS:
        case, plain = (make_case(zero, group_size, g_idx) for g_idx in ("trivial", "none"))
        assert case.layer.g_idx is not None
        assert torch.equal(kept_groups(expand_groups(case.layer)), kept_groups(plain.layer)), zero
        w4a8, stats = to_w4a8(case.layer, mode)
        assert torch.equal(case.kept_by(w4a8), kept_groups(plain.layer)), zero
        assert stats.codes_kept == keeps_codes(plain.layer), zero


@MODES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_layer_without_codes_keeps_none(mode: ScalesMode, dtype: torch.dtype) -> None:
    """Even if its weights are those of a layer with codes that could be kept."""
    symmetric = make_case(8, 128, "none").layer
    for w in (dense_layer((N, K), dtype), DenseLinear(dequantize(symmetric).to(dtype))):
        assert kept_groups(w).shape == (N, K // 128)
        assert not kept_groups(w).any()
        assert not keeps_codes(w)
        assert not to_w4a8(w, mode)[1].codes_kept
        assert not to_symmetric(w)[1]
