"""Packings against their words written out and against compressed-tensors; and how often each code occurs."""

from collections.abc import Callable

import packings
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packings import pack, pack_by_fields, random_codes

from convert_w4a8.encoding import packing as packing_module
from convert_w4a8.encoding.packing import (
    code_frequencies,
    pack_codes,
    to_pack_quantized,
    to_pack_quantized_parts,
    unpack_codes,
)
from convert_w4a8.linear import Packing

pytestmark = pytest.mark.usefixtures("cpu_path")

PACKINGS = pytest.mark.parametrize("packing", packings.ALL, ids=packings.packing_id)


@pytest.mark.parametrize("packing", packings.WITH_KERNELS, ids=packings.packing_id)
def test_the_fields_of_a_packing_say_how_its_tools_pack(packing: Packing) -> None:
    """Axes, the packed axis and the order, as documented, give the words that are written out for each packing."""
    codes = random_codes(48, 96)
    assert torch.equal(pack_by_fields(codes, packing), pack(codes, packing))
    assert packing.shape_nk(pack(codes, packing).shape) == (48, 96)
    assert str(packing) == packing.name


@PACKINGS
def test_slices_are_those_of_the_codes(packing: Packing) -> None:
    """Some input channels, some output channels."""
    codes = random_codes(48, 96)
    packed = pack(codes, packing)
    assert torch.equal(packing.slice_inputs(packed, 16, 72), pack(codes[:, 16:72], packing))
    assert torch.equal(packing.slice_outputs(packed, 8, 40), pack(codes[8:40], packing))


@PACKINGS
@given(eighths=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 2**32 - 1))
def test_round_trips(packing: Packing, eighths: tuple[int, int], seed: int) -> None:
    """Codes survive every way from one packing to another, in layers that the kernel cannot take, too."""
    codes = random_codes(8 * eighths[0], 8 * eighths[1], seed)
    packed, rows = pack(codes, packing), pack(codes, Packing.PACK_QUANTIZED)
    assert torch.equal(unpack_codes(packed, packing), codes)
    assert torch.equal(to_pack_quantized(packed, packing), rows)
    assert torch.equal(pack_codes(codes), rows)


@PACKINGS
def test_what_is_packed_already_comes_back_as_it_is(packing: Packing) -> None:
    """Without a copy; of everything else there is one, even if its words lie alike."""
    packed = pack(random_codes(16, 64), packing)
    assert (to_pack_quantized(packed, packing) is packed) == (packing == Packing.PACK_QUANTIZED)


@PACKINGS
def test_runs_of_their_real_size_join(packing: Packing) -> None:
    """More packed bytes than are handled at a time, and not a whole number of runs."""
    codes = random_codes(16 * 70, 32 * 130)
    packed, rows = pack(codes, packing), pack(codes, Packing.PACK_QUANTIZED)
    assert codes.numel() // 2 > 8 * packing_module._RUN
    assert codes.numel() // 2 % packing_module._RUN
    assert torch.equal(unpack_codes(packed, packing), codes)
    assert torch.equal(pack_codes(codes), rows)
    parts = list(to_pack_quantized_parts(packed, packing))
    assert len(parts) == 2
    assert torch.equal(torch.cat(parts), rows)


@PACKINGS
def test_inputs_may_be_strided_and_stay_as_they_are(packing: Packing) -> None:
    """A slice of a larger tensor, and a transposed one, are read like their copies, and nothing is written to them."""
    codes = random_codes(64, 128)
    whole = torch.cat([pack(codes, packing)] * 2, dim=1)
    before = whole.clone()
    for part in (whole[:, : whole.shape[1] // 2], whole[:, : whole.shape[1] // 2].t().contiguous().t()):
        assert not part.is_contiguous()
        assert torch.equal(unpack_codes(part, packing), codes)
        assert torch.equal(to_pack_quantized(part, packing), pack(codes, Packing.PACK_QUANTIZED))
    assert torch.equal(pack_codes(codes.t().contiguous().t()), pack(codes, Packing.PACK_QUANTIZED))
    assert torch.equal(whole, before)


@PACKINGS
@pytest.mark.parametrize("codes_at_once", [1, 1000, 1 << 14, 1 << 22])
def test_parts_follow_one_another(packing: Packing, codes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size, parts are the rows of the whole, in order."""
    monkeypatch.setattr(packing_module, "PART_CODES", codes_at_once)
    packed = pack(random_codes(208, 224), packing)
    parts = list(to_pack_quantized_parts(packed, packing))
    assert torch.equal(torch.cat(parts), to_pack_quantized(packed, packing))
    assert (len(parts) == 1) == (codes_at_once == 1 << 22)


def test_compressed_tensors_packs_the_same_rows() -> None:
    """The library that defines pack-quantized agrees on `pack_codes` and `unpack_codes`."""
    pack_quantized = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    codes = random_codes(48, 96)
    signed = codes.to(torch.int8) - 8
    theirs = pack_quantized.pack_to_int32(signed, 4)
    assert torch.equal(pack_codes(codes), theirs)
    back = pack_quantized.unpack_from_int32(theirs, 4, torch.Size(codes.shape))
    assert torch.equal(unpack_codes(theirs, Packing.PACK_QUANTIZED).to(torch.int8) - 8, back)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: to_pack_quantized(torch.zeros(12, 2, dtype=torch.int32), Packing.AWQ), "K = 12 is not"),
        (lambda: pack_codes(torch.zeros(16, 12, dtype=torch.uint8)), "K = 12 is not a multiple of 8"),
    ],
)
def test_sizes_that_do_not_fit_are_named(call: Callable[[], object], message: str) -> None:
    """Errors carry the number and what it should divide by."""
    with pytest.raises(ValueError, match=message):
        call()


@PACKINGS
def test_frequencies_count_codes(packing: Packing) -> None:
    """With room for every word the frequencies are exact, whatever the packing."""
    codes = random_codes(48, 96).clamp(min=3)
    expected = torch.bincount(codes.flatten(), minlength=16).double() / codes.numel()
    found = code_frequencies(pack(codes, packing))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("max_words", [1, 7, 100, 4095, 4096])
def test_frequencies_are_sampled_evenly(max_words: int) -> None:
    """A sample reaches the whole tensor, never exceeds its limit, and is the same each time."""
    words = torch.arange(4096, dtype=torch.int32).view(64, 64)
    step = -(-4096 // max_words)
    looked_at = torch.arange(0, 4096, step)
    assert len(looked_at) <= max_words
    expected = code_frequencies(looked_at.int().view(1, -1))
    assert torch.equal(code_frequencies(words, max_words), expected)
