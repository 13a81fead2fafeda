"""Whole layers through `to_w4a8`: what each mode gains, and that the stated loss is the real one."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.encoding import dequantize as dequantize_module
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.packing import pack_codes
from convert_w4a8.encoding.tables import decode, table_entries
from convert_w4a8.linear import Packing, W4A8Linear, W4Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.baselines import quantize_reference
from convert_w4a8.quantization.codes import to_symmetric
from convert_w4a8.quantization.error import sqnr_db
from convert_w4a8.quantization.layer import LayerStats, to_w4a8
from convert_w4a8.sources import find_source

MODES = pytest.mark.parametrize("mode", ScalesMode, ids=str)


def gaussian(n: int, k: int, *, zero: int = 8, seed: int = 0) -> W4Linear:
    """Quantize Gaussian weights to symmetric codes with scale = amax/7.5, then say that the zero-point is another."""
    weights = torch.randn(n, k // 128, 128, generator=torch.Generator().manual_seed(seed)) * 0.02
    scales = weights.abs().amax(-1) / 7.5
    codes = (weights / scales[..., None]).round().clamp(-8, 7) + 8
    zeros = None if zero == 8 else torch.full((k // 128, n), zero, dtype=torch.uint8)
    packed = pack_codes(codes.to(torch.uint8).flatten(1))
    return W4Linear(packed, Packing.PACK_QUANTIZED, scales.t().contiguous(), zeros, None, 128)


def real_sqnr_db(w: W4Linear, w4a8: W4A8Linear) -> float:
    """Return the SQNR of the decoded weights against the dequantized source."""
    source = dequantize(w).double()
    return sqnr_db(float(source.square().sum()), float((decode(w4a8).double() - source).square().sum()))


def trained_layers(shared: Path, model: str) -> Iterator[W4Linear]:
    """Read every fourth quantized layer of a trained checkpoint: one of each kind."""
    checkpoint = open_checkpoint(shared / "models" / model)
    source = find_source(checkpoint)
    specs = source.find_layers(checkpoint, [])
    assert len(specs) == 28
    for spec in specs[::4]:
        w = source.read_layer(spec, read_tensor)
        assert isinstance(w, W4Linear)
        yield w


def test_gains_on_gaussian_weights() -> None:
    """Decoded from the tables, K = 4096: search is 1.6 dB and direct 2.9 dB better than vLLM's own conversion."""
    w = gaussian(512, 4096)
    reference, search, direct = (real_sqnr_db(w, to_w4a8(w, mode)[0]) for mode in ScalesMode)
    assert reference == pytest.approx(29.5, abs=0.2)
    assert search - reference > 1.6
    assert direct - reference > 2.9


@pytest.mark.parametrize(
    ("mode", "stock"),
    [(mode, stock) for mode in ScalesMode for stock in (False, True) if (mode, stock) != (ScalesMode.DIRECT, True)],
    ids=str,
)
def test_a_kernel_ready_layer_keeps_its_codes(mode: ScalesMode, *, stock: bool) -> None:
    """The packed codes are passed on untouched, and the loss estimated from the histogram is the real one."""
    w = gaussian(64, 1024)
    w4a8, stats = to_w4a8(w, mode, stock=stock)
    assert w4a8.packed is w.packed
    assert stats.codes_kept
    assert stats.sqnr_db == pytest.approx(real_sqnr_db(w, w4a8), abs=0.5)
    assert (w4a8.entries is None) == (mode is not ScalesMode.DIRECT)
    assert (w4a8.group_scale is None) == (mode is ScalesMode.DIRECT)
    if w4a8.group_scale is not None:
        assert stats.distinct_scales == len(torch.unique(w4a8.group_scale.float().abs()))
    assert (w4a8.source_scale is not None) == stock


@pytest.mark.parametrize("mode", [ScalesMode.REFERENCE, ScalesMode.SEARCH], ids=str)
@pytest.mark.parametrize("zero", [5, 7, 8])
def test_stock_scales_are_what_vllm_computes_from(mode: ScalesMode, zero: int) -> None:
    """The BF16 scales give exactly the tables that the codes were chosen for, also with zero-points."""
    w4a8, _ = to_w4a8(gaussian(32, 512, zero=zero), mode, stock=True)
    assert w4a8.source_scale is not None
    assert w4a8.group_scale is not None
    group_scale, channel_scale = quantize_reference(w4a8.source_scale)
    assert torch.equal(group_scale.view(torch.uint8), w4a8.group_scale.view(torch.uint8))
    assert torch.equal(channel_scale, w4a8.channel_scale)


def test_the_reference_mode_is_vllms_arithmetic() -> None:
    """Without `stock` from the stored scales, with it from their BF16 copies, as vLLM reads them."""
    w = gaussian(32, 512)
    for stock, scales in ((False, w.scales), (True, w.scales.bfloat16())):
        w4a8, _ = to_w4a8(w, ScalesMode.REFERENCE, stock=stock)
        group_scale, channel_scale = quantize_reference(scales)
        assert w4a8.group_scale is not None
        assert torch.equal(w4a8.group_scale.view(torch.uint8), group_scale.view(torch.uint8))
        assert torch.equal(w4a8.channel_scale, channel_scale)


@MODES
def test_a_zero_point_of_7_costs_no_more_than_one_of_8(mode: ScalesMode) -> None:
    """Its values are kept by a negated scale, so only the FP8 step is lost, and the layer counts as exact."""
    w = gaussian(64, 1024, zero=7)
    w4a8, stats = to_w4a8(w, mode)
    assert stats.codes_kept
    assert real_sqnr_db(w, w4a8) > 29
    assert not table_entries(w4a8).float().isnan().any()


@MODES
@pytest.mark.parametrize("zero", [0, 3, 6, 9, 15])
def test_other_zero_points_report_their_real_loss(mode: ScalesMode, zero: int) -> None:
    """What the statistics say is what the decoded weights show."""
    w = gaussian(32, 512, zero=zero)
    w4a8, stats = to_w4a8(w, mode)
    assert not stats.codes_kept
    assert stats.sqnr_db == pytest.approx(real_sqnr_db(w, w4a8), abs=1e-3)
    assert stats.sqnr_db > 15


@pytest.mark.parametrize("zero", [5, 6, 9, 10])
def test_free_tables_hold_most_of_an_asymmetric_group(zero: int) -> None:
    """Seven shared magnitudes and one free entry lose far less than the best symmetric grid."""
    w = gaussian(64, 1024, zero=zero)
    search, direct = (real_sqnr_db(w, to_w4a8(w, mode)[0]) for mode in (ScalesMode.SEARCH, ScalesMode.DIRECT))
    assert direct > search + 2


def test_large_input_channels_count_more() -> None:
    """Where a few channels hold the ends of every group's range, as AWQ leaves them, their error is kept small."""
    codes = torch.randint(3, 9, (64, 512), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    codes[:, ::128] = 15  # value 10 of −5 … 10
    zeros = torch.full((4, 64), 5, dtype=torch.uint8)
    w = W4Linear(pack_codes(codes), Packing.PACK_QUANTIZED, torch.full((4, 64), 0.01), zeros, None, 128)
    source = dequantize(w)
    weighted, plain = (decode(to_w4a8(x, ScalesMode.SEARCH)[0]) for x in (w, to_symmetric(w)[0]))
    large = [float((decoded - source)[:, ::128].square().mean()) for decoded in (weighted, plain)]
    assert large[0] < 0.5 * large[1]


def test_one_block_that_is_not_exact_makes_the_layer_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are worked in blocks of output channels; their statistics are summed, and exactness is for all of them."""
    w = gaussian(64, 256, zero=7)
    assert w.zeros is not None
    w.zeros[:, 48:] = 4
    whole, stats = to_w4a8(w, ScalesMode.REFERENCE)
    monkeypatch.setattr(dequantize_module, "BLOCK_WEIGHTS", 16 * 256)
    blocks, sums = to_w4a8(w, ScalesMode.REFERENCE)
    assert not stats.codes_kept
    assert not sums.codes_kept
    assert sums.signal == pytest.approx(stats.signal)
    assert sums.noise == pytest.approx(stats.noise)
    assert torch.equal(decode(blocks), decode(whole))


def test_direct_tables_do_not_exist_for_stock_vllm() -> None:
    """The request is refused rather than ignored."""
    with pytest.raises(ValueError, match="stock vLLM cannot load tables"):
        to_w4a8(gaussian(16, 128), ScalesMode.DIRECT, stock=True)


@MODES
@pytest.mark.parametrize("zero", [6, 8])
def test_scales_that_are_not_finite_are_refused(mode: ScalesMode, zero: int) -> None:
    """For layers whose codes are kept and for those requantized."""
    w = gaussian(16, 256, zero=zero)
    w.scales[0, 3] = math.inf
    with pytest.raises(ValueError, match="1 of 32 group scales are not finite"):
        to_w4a8(w, mode)


@MODES
@pytest.mark.parametrize("zero", [6, 8])
def test_a_layer_of_zeros_stays_zero(mode: ScalesMode, zero: int) -> None:
    """Scales of zero decode to zeros, without a NaN, and the loss is said to be none."""
    w = gaussian(16, 256, zero=zero)
    w.scales.zero_()
    w4a8, stats = to_w4a8(w, mode)
    assert (decode(w4a8) == 0).all()
    assert stats.sqnr_db == math.inf


def test_the_sqnr_of_nothing_lost_is_infinite() -> None:
    """Neither an exact layer nor a layer of zeros divides by zero."""
    assert sqnr_db(1.0, 0.0) == sqnr_db(0.0, 0.0) == math.inf
    assert sqnr_db(100.0, 1.0) == pytest.approx(20)
    assert LayerStats(codes_kept=False, signal=1.0, noise=0.01, distinct_scales=None).sqnr_db == pytest.approx(20)


@pytest.mark.parametrize("model", ["llama-31m-gptq", "llama-31m-ct"])
def test_trained_symmetric_layers_gain(shared: Path, model: str) -> None:
    """Decoded from the tables: mean gains of 2.8 dB by search and 3.8 dB by free entries; every layer over 1.9 dB."""
    gains = []
    for w in trained_layers(shared, model):
        reference, search, direct = (real_sqnr_db(w, to_w4a8(w, mode)[0]) for mode in ScalesMode)
        gains.append((search - reference, direct - reference))
    by_search, by_entries = torch.tensor(gains).t()
    assert by_search.mean() > 2.8
    assert by_entries.mean() > 3.8
    assert by_search.min() > 1.9


def test_trained_layers_with_zero_points(shared: Path) -> None:
    """A quarter of the groups of this AWQ checkpoint have a zero-point other than 7 and 8."""
    found = {mode: [to_w4a8(w, mode)[1] for w in trained_layers(shared, "llama-31m-awq-zp")] for mode in ScalesMode}
    mean = {mode: sum(stats.sqnr_db for stats in layers) / len(layers) for mode, layers in found.items()}
    worst = {mode: min(stats.sqnr_db for stats in layers) for mode, layers in found.items()}
    assert mean[ScalesMode.REFERENCE] > 27.5
    assert mean[ScalesMode.SEARCH] > 29
    assert mean[ScalesMode.DIRECT] > 32.5
    assert worst[ScalesMode.DIRECT] > 30
