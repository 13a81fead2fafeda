"""Layers that are not quantized yet: nearer than rounding to nearest gets them, and their weights left alone."""

from collections.abc import Callable

import pytest
import torch
from code_groups import dense_layer, same_layer

from convert_w4a8.encoding import dequantize as dequantize_module
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.tables import decode
from convert_w4a8.linear import DenseLinear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.baselines import quantize_reference, round_to_nearest
from convert_w4a8.quantization.codes import choose_codes, input_energies, to_symmetric
from convert_w4a8.quantization.error import sqnr_db
from convert_w4a8.quantization.layer import to_w4a8

pytestmark = pytest.mark.usefixtures("cpu_path")

N, K = 64, 1024
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
MODES = pytest.mark.parametrize("mode", ScalesMode, ids=str)


def distance_db(weights: torch.Tensor, found: torch.Tensor) -> float:
    """Return the SQNR of weights that stand for others."""
    exact = weights.double()
    return sqnr_db(float(exact.square().sum()), float((found.double() - exact).square().sum()))


def rounded_db(weights: torch.Tensor) -> float:
    """Return the SQNR of the plainest quantization, its scales not rounded to FP8."""
    codes, scales = round_to_nearest(weights.float())
    return distance_db(weights, (codes.float() - 8) * scales.t().repeat_interleave(128, dim=1))


@MODES
@DTYPES
def test_a_dense_layer_is_nearer_than_rounding_to_nearest_gets_it(mode: ScalesMode, dtype: torch.dtype) -> None:
    """In spite of FP8 tables; the stated loss is the real one, and the weights stay as they are."""
    w = dense_layer((N, K), dtype)
    before = w.weight.clone()
    w4a8, stats = to_w4a8(w, mode)
    assert torch.equal(w.weight.view(torch.uint8), before.view(torch.uint8))
    assert w4a8.shape_nk == (N, K)
    found = distance_db(w.weight, decode(w4a8))
    assert found > rounded_db(w.weight)
    assert stats.sqnr_db == pytest.approx(found, abs=1e-3)
    assert not stats.codes_kept
    assert (w4a8.group_scale is None) == (w4a8.entries is not None) == (mode is ScalesMode.DIRECT)


def test_better_modes_are_better() -> None:
    """By search nearer than by vLLM's arithmetic, by free entries by another half decibel."""
    w = dense_layer((N, K))
    reference, search, direct = (distance_db(w.weight, decode(to_w4a8(w, mode)[0])) for mode in ScalesMode)
    assert reference < search < direct - 0.5


@pytest.mark.parametrize("mode", [ScalesMode.REFERENCE, ScalesMode.SEARCH], ids=str)
def test_stock_vllm_makes_the_same_tables(mode: ScalesMode) -> None:
    """From the BF16 scales that are stored for it."""
    w = dense_layer((N, K))
    w4a8, _ = to_w4a8(w, mode, stock=True)
    assert w4a8.source_scale is not None
    assert w4a8.group_scale is not None
    group_scale, channel_scale = quantize_reference(w4a8.source_scale)
    assert torch.equal(group_scale.view(torch.uint8), w4a8.group_scale.view(torch.uint8))
    assert torch.equal(channel_scale, w4a8.channel_scale)
    assert distance_db(w.weight, decode(w4a8)) > rounded_db(w.weight)


@DTYPES
@pytest.mark.parametrize("function", [dequantize, input_energies, to_symmetric, lambda w: choose_codes(w, None)])
def test_nothing_is_done_in_place(function: Callable[[DenseLinear], object], dtype: torch.dtype) -> None:
    """A float32 weight could be taken for a copy."""
    w = dense_layer((N, K), dtype)
    before = w.weight.clone()
    result = function(w)
    if isinstance(result, torch.Tensor):
        result.zero_()
    assert torch.equal(w.weight.view(torch.uint8), before.view(torch.uint8))


def test_blocks_of_output_channels_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are worked in blocks of output channels: bytes and energies are the same, however many there are."""
    w = dense_layer((N, K))
    (whole, stats), energies = to_w4a8(w, ScalesMode.REFERENCE), input_energies(w)
    expected = w.weight.float().square().sum(0)
    torch.testing.assert_close(energies, expected / expected.mean())
    monkeypatch.setattr(dequantize_module, "BLOCK_WEIGHTS", 16 * K)
    parts, sums = to_w4a8(w, ScalesMode.REFERENCE)
    assert same_layer(parts, whole)
    assert (sums.signal, sums.noise) == pytest.approx((stats.signal, stats.noise), rel=1e-12)
    torch.testing.assert_close(input_energies(w), energies)
    slices = [w.output_channels(start, start + 16).weight for start in range(0, N, 16)]
    assert torch.equal(torch.cat(slices), w.weight)


def test_a_k_that_is_not_a_multiple_of_128_is_refused() -> None:
    """As with codes."""
    with pytest.raises(ValueError, match="K = 96 is not a multiple of 128"):
        to_symmetric(dense_layer((16, 96)))


@MODES
def test_a_layer_of_zeros_stays_zero(mode: ScalesMode) -> None:
    """Without a NaN."""
    w4a8, stats = to_w4a8(DenseLinear(torch.zeros(N, K, dtype=torch.bfloat16)), mode)
    assert (decode(w4a8) == 0).all()
    assert stats.noise == 0
