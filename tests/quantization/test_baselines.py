"""The FP8 scale arithmetic against vLLM's own results, and what no input may break."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import GOLDEN_CUT
from safetensors.torch import load_file

from convert_w4a8.fp8 import E4M3, SCALE_MAX, to_e4m3
from convert_w4a8.quantization.baselines import quantize_naive, quantize_reference, round_to_nearest

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)

groups = st.lists(st.lists(st.floats(-6e4, 6e4, width=16), min_size=3, max_size=3), min_size=1, max_size=8).map(
    lambda rows: torch.tensor(rows, dtype=torch.float32)
)


def assert_is_golden(tensors: dict[str, torch.Tensor], case: str) -> None:
    """Compare `quantize_reference` with one case of the golden vectors, whose scales lie [N, G]."""
    group_scale, channel_scale = quantize_reference(tensors[f"{case}.weight_scale"].t().contiguous())
    assert torch.equal(group_scale.view(torch.uint8).t(), tensors[f"{case}.fp8_group_scale"])
    assert torch.equal(channel_scale, tensors[f"{case}.channel_scale"])


@pytest.mark.parametrize("case", ["gauss", "tiny", "edge"])
def test_reference_gives_the_bytes_of_vllm(shared: Path, case: str) -> None:
    """FP8 group scales and channel scales are those of vLLM's load-time path, byte for byte."""
    assert_is_golden(load_file(shared / "golden" / "vllm_w4a8_dense.safetensors"), case)


@pytest.mark.parametrize("case", ["gauss", "edge"])
def test_reference_gives_the_bytes_of_vllm_in_the_stored_cut(case: str) -> None:
    """The same over the part of the golden vectors that is kept in this repository."""
    assert_is_golden(load_file(GOLDEN_CUT), case)


def test_to_e4m3_takes_the_nearest_value_and_saturates() -> None:
    """Every FP8 value is a fixed point, midpoints go to the even neighbour, and what is beyond 448 becomes 448."""
    finite = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    assert torch.equal(to_e4m3(finite).float(), finite)
    even = torch.arange(0, 126, 2)
    middles = torch.cat(((finite[even] + finite[even + 1]) / 2, (finite[even + 1] + finite[even + 2]) / 2))
    assert torch.equal(to_e4m3(middles).float(), torch.cat((finite[even], finite[even + 2])))
    assert to_e4m3(torch.tensor([1e9, -1e9])).tolist() == [448, -448]


@given(scales=groups)
def test_no_table_entry_can_clip(scales: torch.Tensor) -> None:
    """Eight times a group scale stays within 448, whatever the scales are."""
    for quantize in (quantize_reference, quantize_naive):
        group_scale, channel_scale = quantize(scales)
        assert (group_scale.float().abs() <= SCALE_MAX).all()
        assert torch.isfinite(channel_scale).all()


@given(scales=groups)
def test_signs_are_kept(scales: torch.Tensor) -> None:
    """Negated scales give the same FP8 scales, negated."""
    group_scale, channel_scale = quantize_reference(scales)
    negated, same = quantize_reference(-scales)
    assert torch.equal(negated.float(), -group_scale.float())
    assert torch.equal(same, channel_scale)


@DTYPES
def test_scales_are_used_with_their_stored_values(dtype: torch.dtype) -> None:
    """A dtype is not narrowed on the way: the result is that of the same values in float32."""
    scales = torch.rand(8, 32, generator=torch.Generator().manual_seed(0)).mul(0.01).to(dtype)
    for quantize in (quantize_reference, quantize_naive):
        stored, widened = quantize(scales), quantize(scales.float())
        assert torch.equal(stored[0].view(torch.uint8), widened[0].view(torch.uint8))
        assert torch.equal(stored[1], widened[1])


def test_a_channel_of_zeros_stays_zero() -> None:
    """A channel without any scale has zero tables and a finite, positive channel scale."""
    group_scale, channel_scale = quantize_reference(torch.zeros(4, 2))
    assert (group_scale.float() == 0).all()
    assert (channel_scale > 0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("quantize", [quantize_reference, quantize_naive])
@DTYPES
def test_scales_that_are_not_finite_are_refused(quantize: object, bad: float, dtype: torch.dtype) -> None:
    """Infinity would silently become 448; opposite infinities do not hide each other."""
    scales = torch.ones(3, 4, dtype=dtype)
    scales[1, 2], scales[2, 0] = bad, -bad
    with pytest.raises(ValueError, match="2 of 12 group scales are not finite"):
        quantize(scales)  # type: ignore[operator]


def test_huge_finite_scales_are_not_taken_for_infinite() -> None:
    """The largest float32 values pass, although their float32 sum would overflow."""
    scales = torch.full((4, 4), torch.finfo(torch.float32).max)
    group_scale, _ = quantize_reference(scales)
    assert (group_scale.float() == SCALE_MAX).all()


def test_the_naive_cast_leaves_a_handful_of_distinct_scales() -> None:
    """Scales of the size that real models have fall into FP8's subnormals; the reference method keeps them apart."""
    scales = 0.002 + 0.006 * torch.rand(32, 256, generator=torch.Generator().manual_seed(0))
    naive, ones = quantize_naive(scales)
    reference, _ = quantize_reference(scales)
    assert len(torch.unique(naive.float())) <= 5
    assert len(torch.unique(reference.float())) > 15
    assert (ones == 1).all()


def test_rounding_to_nearest_is_within_half_a_step() -> None:
    """Symmetric codes, scales of amax/7.5 a group, zeros for a group of zeros; the weights stay as they are."""
    weights = torch.randn(48, 512, generator=torch.Generator().manual_seed(0))
    weights[5, 128:256] = 0
    before = weights.clone()
    codes, scales = round_to_nearest(weights)
    assert torch.equal(weights, before)
    assert codes.dtype is torch.uint8
    assert codes.shape == (48, 512)
    assert scales.shape == (4, 48)
    assert torch.equal(scales, weights.view(48, 4, 128).abs().amax(dim=-1).t() / 7.5)
    assert set(codes.flatten().tolist()) == set(range(16))
    step = scales.t().repeat_interleave(128, dim=1)
    assert ((codes.float() - 8) * step - weights).abs().le(0.5 * step + 1e-5 * step).all()
    assert (codes[5, 128:256] == 8).all()
