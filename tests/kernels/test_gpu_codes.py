"""Triton's new codes, scales and entries against the reference: interpreted without a GPU, compiled with one.

The reference runs on the CPU in either case: a GPU has to give its bytes.
"""

import importlib

import pytest
import torch
from code_groups import KINDS, LAYERS, fit_symmetric, groups, layer, layer_of, same, same_layer

from convert_w4a8 import devices
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.fp8 import E4M3, E4M3_MAX
from convert_w4a8.kernels.codes import reference
from convert_w4a8.linear import W4Linear
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization.layer import to_w4a8

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="Triton is not installed")
KERNELS = importlib.import_module("convert_w4a8.kernels.codes.gpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WIDTHS = pytest.mark.parametrize("width", [16, 128])


@WIDTHS
@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_codes(kind: str, width: int) -> None:
    """`fit_symmetric`, with weights of zero among the others, and groups that are kept; rows that fill no block."""
    values = groups(kind, width, 1, rows=77)
    weights = torch.rand(values.shape, generator=torch.Generator().manual_seed(2)).sub(0.2).clamp(min=0)
    expected = fit_symmetric(reference, values, weights)
    kept = torch.arange(len(values)) % 5 == 3
    found = fit_symmetric(KERNELS, values.to(DEVICE), weights.to(DEVICE), kept)
    codes, scales = (tensor.cpu() for tensor in found)
    assert (codes[kept] == 99).all()
    assert (scales[kept] == 99).all()
    assert same(codes[~kept], expected[0][~kept])
    assert same(scales[~kept], expected[1][~kept])


@WIDTHS
@pytest.mark.parametrize("rounds", [0, 3])
@pytest.mark.parametrize("kind", ["gauss", "few values", "tiny", "mostly zero"])
def test_codes_and_entries(kind: str, width: int, rounds: int) -> None:
    """`fit` from tables of any finite bytes: both zeros, equal entries, either sign; and energies."""
    generator = torch.Generator().manual_seed(width + rounds)
    rows, channels = 36, 4
    tables = torch.randint(0, 256, (rows, 8), dtype=torch.uint8, generator=generator)
    tables = torch.where(tables & 0x7F == 0x7F, 0x80, tables)
    tables[::4] = tables[::4] & 0x83  # zeros and subnormal numbers
    tables[1::4] = tables[1::4, :1]
    tables = tables.view(E4M3)
    values = groups(kind, width, 3, rows) * 10.0 ** torch.arange(-3, 3).repeat(rows // 6)[:, None]
    weights = torch.rand(values.shape, generator=generator).sub(0.2).clamp(min=0)
    counts = torch.randint(0, 5, values.shape, generator=generator).float()
    channel = torch.rand(channels, generator=generator) + 0.1
    kept = torch.arange(rows) % 7 == 2
    before = torch.randint(0, 16, values.shape, dtype=torch.uint8, generator=generator)

    spread = channel.repeat_interleave(rows // channels)[:, None]
    codes, fitted = reference.fit(values / spread, weights, tables, rounds)
    codes[kept] = before[kept]
    fitted.view(torch.uint8)[kept] = tables.view(torch.uint8)[kept]
    found_codes, found_tables = before.to(DEVICE), tables.clone().to(DEVICE)
    inputs = (tensor.to(DEVICE) for tensor in (values, counts, weights, kept, channel))
    signal, noise = KERNELS.refit(*inputs, found_codes, found_tables, rounds)
    assert same(found_codes, codes)
    assert same(found_tables, fitted)
    difference = reference.values_of(fitted.float(), codes) * spread - values
    energies = [float((x.square() * counts).sum(dtype=torch.float64)) for x in (values, difference)]
    assert [signal, noise] == pytest.approx(energies, rel=1e-9)


def test_fp8_numbers_are_rounded_as_torch_rounds_them() -> None:
    """A group of one code gets the nearest E4M3 number as its entry: all of these, the middles, their neighbours."""
    exact = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    some = torch.cat([exact, (exact[1:] + exact[:-1]) / 2, torch.tensor([463.0, 464.0, 465.0, 1e9])])
    some = torch.cat([some, some.nextafter(some * 2), some.nextafter(some * 0)])
    some = some[some > exact[1]]  # nearer to their entries than to the code that is always 0
    expected = (-some).clamp(-E4M3_MAX).to(E4M3)
    tables = torch.zeros(len(some), 8, dtype=torch.uint8)
    tables[:, 0] = torch.where(expected.view(torch.uint8) == 0xFE, 0xFD, expected.view(torch.uint8) + 1)
    values, weights = torch.zeros(2, len(some), 16)
    values[:, 0], weights[:, 0] = -some, 1
    found = tables.view(E4M3).to(DEVICE)
    codes, none = torch.zeros(values.shape, dtype=torch.uint8), torch.zeros(len(some), dtype=torch.bool)
    inputs = (tensor.to(DEVICE) for tensor in (values, weights, weights, none, torch.ones(len(some)), codes))
    KERNELS.refit(*inputs, found, 1)
    assert same(found[:, 0], expected)


def by_output_channel(w: W4Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, zero-points and scales as the kernels take them, on the CPU."""
    assert w.zeros is not None
    return w.packed, w.zeros.t(), w.scales.t().float()


def test_groups_by_their_codes() -> None:
    """`gather` and the sums of energies; then the codes of all weights from those of the values."""
    w = layer(zeros=True, shape=(48, 384))
    importance = torch.rand(384, generator=torch.Generator().manual_seed(5))
    inputs = by_output_channel(w)
    expected = reference.gather(*inputs, importance)
    on_device = [tensor.to(DEVICE) for tensor in inputs]
    found = KERNELS.gather(*on_device, importance.to(DEVICE))
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    codes = torch.randint(0, 16, expected[0].shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    assert same(KERNELS.spell(found[3], codes.to(DEVICE)), reference.spell(expected[3], codes))
    energies = torch.full((384,), 2.5, dtype=torch.float64, device=DEVICE)
    KERNELS.add_energies(*on_device, energies)
    plain = torch.zeros(384, dtype=torch.float64)
    reference.add_energies(*inputs, plain)
    torch.testing.assert_close(energies.cpu() - 2.5, plain, rtol=1e-9, atol=0)


def test_energies_of_many_channels() -> None:
    """More than one program has, and a number that fills neither a program nor a step of it."""
    w = layer(zeros=True, shape=(520, 128))
    energies = torch.zeros(128, dtype=torch.float64, device=DEVICE)
    KERNELS.add_energies(*(tensor.to(DEVICE) for tensor in by_output_channel(w)), energies)
    torch.testing.assert_close(
        energies.cpu(), dequantize(w).square().sum(dim=0, dtype=torch.float64), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("mode", ScalesMode, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_whole_layers(mode: ScalesMode, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a conversion, from codes to codes, on the device and on the CPU."""
    w = layer_of(kind, (176, 384) if DEVICE.type == "cuda" else (32, 256))
    expected, stats = to_w4a8(w, mode)
    if DEVICE.type == "cpu":  # let Triton's kernels do what kernels do, where there is no GPU to dispatch by
        monkeypatch.setattr(devices, "_OPERATIONS", {name: {"cpu": "gpu"} for name in devices._OPERATIONS})
        monkeypatch.setattr(devices, "_triton_works", lambda: True)
    assert devices.codes(DEVICE) is KERNELS
    found, found_stats = to_w4a8(w.to(DEVICE), mode)
    assert same_layer(found, expected)
    assert found_stats.noise == pytest.approx(stats.noise, rel=1e-9)
