"""numba's new codes give the bytes of the reference, for values that real layers have and for those that none has."""

from importlib import import_module

import numpy as np
import numpy.typing as npt
import pytest
import torch
from code_groups import KINDS, LAYERS, fit_symmetric, groups, layer, layer_of, same, same_layer, switch_kernels_off
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8 import devices
from convert_w4a8.fp8 import E4M3, to_e4m3
from convert_w4a8.kernels.codes import reference
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.layer import to_w4a8

numba = pytest.importorskip("numba", reason="numba is not installed")
KERNELS = import_module("convert_w4a8.kernels.codes.cpu")
WIDTHS = pytest.mark.parametrize("width", [16, 128])


@WIDTHS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True], ids=["counted", "weighted"])
def test_scales_and_codes(kind: str, width: int, weighted: bool) -> None:
    """`fit_symmetric`, with weights of zero among the others, and groups that are kept."""
    values = groups(kind, width, 1)
    weights = torch.rand(values.shape).sub(0.2).clamp(min=0) if weighted else torch.ones(values.shape)
    expected = fit_symmetric(reference, values, weights)
    kept = torch.arange(len(values)) % 5 == 3
    for operations in (KERNELS, reference):
        codes, scales = fit_symmetric(operations, values, weights, kept)
        assert (codes[kept] == 99).all()
        assert (scales[kept] == 99).all()
        assert same(codes[~kept], expected[0][~kept])
        assert same(scales[~kept], expected[1][~kept])


@WIDTHS
@pytest.mark.parametrize("rounds", [0, 1, 3])
@given(data=st.data())
def test_codes_and_entries(width: int, rounds: int, data: st.DataObject) -> None:
    """`fit` from tables of any finite bytes, equal entries and both zeros among them."""
    byte = st.integers(0, 255).filter(lambda b: b & 0x7F != 0x7F)
    rows = data.draw(st.lists(st.lists(byte, min_size=8, max_size=8), min_size=1, max_size=8), label="tables")
    tables = torch.tensor(rows, dtype=torch.uint8).view(E4M3)
    values = groups(data.draw(st.sampled_from(KINDS)), width, data.draw(st.integers(0, 99)), len(rows))
    values *= 10.0 ** data.draw(st.integers(-3, 3))
    weights = torch.rand(values.shape).sub(0.2).clamp(min=0)
    codes, fitted = torch.empty(values.shape, dtype=torch.uint8), tables.clone()
    none = torch.zeros(len(rows), dtype=torch.bool)
    KERNELS.refit(values, weights, weights, none, torch.ones(len(rows)), codes, fitted, rounds)
    expected = reference.fit(values, weights, tables, rounds)
    assert same(codes, expected[0])
    assert same(fitted, expected[1])


@WIDTHS
@pytest.mark.parametrize("rounds", [0, 3])
def test_groups_that_are_kept_are_not_fitted(width: int, rounds: int) -> None:
    """Codes and tables of these stay, those of the others are in units of their channel; energies are of all."""
    generator = torch.Generator().manual_seed(width + rounds)
    rows, channels = 36, 4
    tables = torch.randint(0, 0x7F, (rows, 8), dtype=torch.uint8, generator=generator).view(E4M3)
    values = groups("gauss", width, 3, rows)
    weights = torch.rand(values.shape, generator=generator).sub(0.2).clamp(min=0)
    counts = torch.randint(0, 5, values.shape, generator=generator).float()
    channel = torch.rand(channels, generator=generator) + 0.1
    kept = torch.arange(rows) % 7 == 2
    before = torch.randint(0, 16, values.shape, dtype=torch.uint8, generator=generator)
    spread = channel.repeat_interleave(rows // channels)[:, None]
    codes, fitted = reference.fit(values / spread, weights, tables, rounds)
    codes[kept] = before[kept]
    fitted.view(torch.uint8)[kept] = tables.view(torch.uint8)[kept]
    difference = reference.values_of(fitted.float(), codes) * spread - values
    energies = [float((x.square() * counts).sum(dtype=torch.float64)) for x in (values, difference)]
    for operations in (KERNELS, reference):
        found_codes, found_tables = before.clone(), tables.clone()
        found = operations.refit(values, counts, weights, kept, channel, found_codes, found_tables, rounds)
        assert same(found_codes, codes)
        assert same(found_tables, fitted)
        assert found == pytest.approx(energies, rel=1e-12)


def test_groups_by_their_codes() -> None:
    """`gather` and the sums of energies; then the codes of all weights from those of the values."""
    w = layer(zeros=True, shape=(48, 384))
    assert w.zeros is not None
    importance = torch.rand(384, generator=torch.Generator().manual_seed(5))
    inputs = w.packed, w.zeros.t(), w.scales.t().float()
    found, expected = (operations.gather(*inputs, importance) for operations in (KERNELS, reference))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    codes = torch.randint(0, 16, found[0].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    assert same(KERNELS.spell(found[3], codes), reference.spell(found[3], codes))
    energies = torch.full((2, 384), 2.5, dtype=torch.float64)
    for operations, sums in zip((KERNELS, reference), energies, strict=True):
        operations.add_energies(*inputs, sums)
    torch.testing.assert_close(energies[0], energies[1], rtol=1e-12, atol=0)
    assert (energies > 2.5).all()


def round_all(values: npt.NDArray[np.float32], found: npt.NDArray[np.uint8]) -> None:
    """Fill `found` with the bytes of the E4M3 numbers nearest to float32 values."""
    to_e4m3 = import_module("convert_w4a8.kernels.fp8_cpu").to_e4m3

    @numba.njit
    def fill(values, found, scratch, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        for i in range(len(values)):
            found[i] = to_e4m3(values[i], scratch, bits)

    scratch = np.empty(1, np.float32)
    fill(values, found, scratch, scratch.view(np.uint32))


def test_every_float_between_two_fp8_numbers_is_rounded_as_torch_rounds_it() -> None:
    """The kernel's own rounding: all 65,536 bfloat16 numbers but NaN, the middles among them, and their neighbours."""
    some = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    some = some[~some.isnan()]
    values = torch.cat([some, some.nextafter(some + 1), some.nextafter(some - 1)]).clamp(-1e30, 1e30)
    found = torch.empty(len(values), dtype=torch.uint8)
    round_all(values.numpy(), found.numpy())
    assert torch.equal(found, to_e4m3(values).view(torch.uint8))


@pytest.mark.parametrize("mode", ScalesMode, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_whole_layers(mode: ScalesMode, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a conversion, from codes to codes."""
    w = layer_of(kind)
    assert devices.codes(w.device) is KERNELS
    found, stats = to_w4a8(w, mode)
    switch_kernels_off(monkeypatch)
    assert devices.codes(w.device) is reference
    expected, plain_stats = to_w4a8(w, mode)
    assert same_layer(found, expected)
    assert stats.noise == pytest.approx(plain_stats.noise, rel=1e-12)
