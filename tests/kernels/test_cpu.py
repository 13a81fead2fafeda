"""numba's kernels give the bytes that torch gives, for values that real layers have and for those that none has."""

from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import numpy as np
import pytest
import torch
from code_groups import KINDS, LAYERS, groups, layer, same, same_layer, switch_kernels_off
from hypothesis import given
from hypothesis import strategies as st

from convert_w4a8 import devices
from convert_w4a8.encoding import lut_layout
from convert_w4a8.fp8 import E4M3, to_e4m3
from convert_w4a8.linear import Packing
from convert_w4a8.options import ScalesMode
from convert_w4a8.quantization import codebook
from convert_w4a8.quantization import codes as requantize
from convert_w4a8.quantization.layer import to_w4a8

numba = pytest.importorskip("numba", reason="numba is not installed")
KERNELS = import_module("convert_w4a8.kernels.codes.cpu")
WIDTHS = pytest.mark.parametrize("width", [16, 128])


@WIDTHS
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True], ids=["counted", "weighted"])
def test_scales_and_codes(kind: str, width: int, weighted: bool) -> None:
    """`fit_symmetric`, with weights of zero among the others."""
    values = groups(kind, width, 1)
    weights = torch.rand(values.shape).sub(0.2).clamp(min=0) if weighted else torch.ones(values.shape)
    expected = requantize.fit_symmetric(values, weights)
    kept = torch.arange(len(values)) % 5 == 3
    codes, scales = torch.full(values.shape, 99, dtype=torch.uint8), torch.full((len(values),), 99.0)
    KERNELS.fit_symmetric(values, weights, kept, requantize.FACTORS, codes, scales)
    assert (codes[kept] == 99).all()
    assert (scales[kept] == 99).all()
    assert same(codes[~kept], expected[0][~kept])
    assert same(scales[~kept], expected[1][~kept])


@WIDTHS
@pytest.mark.parametrize("rounds", [0, 1, 3])
@given(data=st.data())
def test_codes_and_entries(width: int, rounds: int, data: st.DataObject) -> None:
    """`codebook.fit` from tables of any finite bytes, equal entries and both zeros among them."""
    byte = st.integers(0, 255).filter(lambda b: b & 0x7F != 0x7F)
    rows = data.draw(st.lists(st.lists(byte, min_size=8, max_size=8), min_size=1, max_size=8), label="tables")
    tables = torch.tensor(rows, dtype=torch.uint8).view(E4M3)
    values = groups(data.draw(st.sampled_from(KINDS)), width, data.draw(st.integers(0, 99)), len(rows))
    values *= 10.0 ** data.draw(st.integers(-3, 3))
    weights = torch.rand(values.shape).sub(0.2).clamp(min=0)
    codes, fitted = torch.empty(values.shape, dtype=torch.uint8), tables.clone()
    none = torch.zeros(len(rows), dtype=torch.bool)
    KERNELS.refit(values, weights, weights, none, torch.ones(len(rows)), codes, fitted, rounds)
    expected = codebook.fit(values, weights, tables, rounds)
    assert same(codes, expected[0])
    assert same(fitted, expected[1])


def round_all(values: np.ndarray, found: np.ndarray) -> None:
    """Fill `found` with the bytes of the E4M3 numbers nearest to float32 values."""
    to_e4m3 = KERNELS._to_e4m3

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
    w = layer(**LAYERS[kind])
    found, stats = to_w4a8(w, mode)
    switch_kernels_off(monkeypatch)
    expected, plain_stats = to_w4a8(w, mode)
    assert same_layer(found, expected)
    assert stats.noise == pytest.approx(plain_stats.noise, rel=1e-12)


@pytest.fixture
def nothing_loaded() -> Iterator[None]:
    """Forget which kernels there are, before and after."""
    devices._cpu_kernels.cache_clear()
    yield
    devices._cpu_kernels.cache_clear()


@pytest.mark.usefixtures("nothing_loaded")
@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("numba", ImportError("Numba needs NumPy 2.4 or less")),
        ("convert_w4a8.kernels.repack.cpu", RuntimeError("cannot cache function '_swap': no locator available")),
    ],
    ids=["numba refuses", "no place for its cache"],
)
def test_without_kernels_torch_does_the_work(module: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps numba from working keeps nobody from converting."""

    def failing(name: str) -> ModuleType:
        if name == module:
            raise error
        return import_module(name)

    monkeypatch.setattr(devices, "import_module", failing)
    assert devices.kernels("repack", torch.device("cpu")) is None
    packed = torch.arange(64, dtype=torch.int32).view(4, 16)
    assert torch.equal(lut_layout.reorder(packed, Packing.GPTQ), lut_layout.repack_reference(packed, Packing.GPTQ))


@pytest.mark.usefixtures("nothing_loaded")
def test_a_bug_in_a_kernel_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other errors come out."""

    def failing(name: str) -> ModuleType:
        raise RuntimeError(name)

    monkeypatch.setattr(
        devices, "import_module", lambda name: import_module(name) if name == "numba" else failing(name)
    )
    with pytest.raises(RuntimeError, match="cpu_repack"):
        devices.kernels("repack", torch.device("cpu"))
