"""The LUT layout against vLLM's own bytes, and against the index formula written out."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import packings
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packings import pack, random_codes
from paths import GOLDEN_CUT
from safetensors.torch import load_file

from convert_w4a8.encoding import lut_layout
from convert_w4a8.encoding.lut_layout import reorder, reorder_parts, restore
from convert_w4a8.encoding.packing import to_pack_quantized
from convert_w4a8.linear import Packing
from convert_w4a8.lut_format import reordered_shape

pytestmark = pytest.mark.usefixtures("cpu_path")

PACKINGS = pytest.mark.parametrize("packing", packings.ALL, ids=packings.packing_id)
SIZES = pytest.mark.parametrize(
    ("n", "k"), [(16, 32), (48, 96), (16, 4096), (208, 32), (160, 224), (176, 416)], ids=str
)


def encode(u: int) -> int:
    """Return the unified encoding of one unsigned code."""
    v = u - 8
    return 8 - v if v > 0 else v & 15


def lut_by_formula(codes: torch.Tensor) -> torch.Tensor:
    """Build the LUT buffer, uint8, from codes uint8 [N, K] by the index formula alone."""
    rows, columns = codes.shape
    n, k = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    r, c = n % 16, k % 32
    thread = (r % 8) * 4 + (c % 16) // 4
    value = (c % 4) + 4 * (r // 8) + 8 * (c // 16)
    index = ((n // 16) + (k // 32) * (rows // 16)) * 512 + thread * 16 + value
    nibbles = np.zeros(rows * columns, dtype=np.uint8)
    nibbles[index] = np.array([encode(u) for u in range(16)], dtype=np.uint8)[codes.numpy()]
    return torch.from_numpy(nibbles[0::2] | nibbles[1::2] << 4)


def assert_vllm_bytes(vectors: dict[str, torch.Tensor], case: str) -> None:
    packed, expected = vectors[f"{case}.weight_packed"], vectors[f"{case}.lut_weight_bytes"]
    lut = reorder(packed, Packing.PACK_QUANTIZED)
    assert torch.equal(lut.view(torch.uint8).flatten(), expected)
    assert torch.equal(restore(lut), packed)


@pytest.mark.parametrize("case", ["gauss", "edge"])
def test_reorder_gives_the_bytes_of_vllm(case: str) -> None:
    """`cutlass_encode_and_reorder_int4b` wrote these bytes on an H200; the small cut is always here."""
    assert_vllm_bytes(load_file(GOLDEN_CUT), case)


@pytest.mark.parametrize("case", ["gauss", "tiny", "edge"])
def test_reorder_gives_all_golden_bytes(shared: Path, case: str) -> None:
    """The same with the full vectors."""
    assert_vllm_bytes(load_file(shared / "golden/vllm_w4a8_dense.safetensors"), case)


@pytest.mark.parametrize(("n", "k"), [(128, 256), (256, 512)])
def test_reorder_follows_the_golden_reorder_map(shared: Path, n: int, k: int) -> None:
    """Entry i of the map is the element that CUTLASS put at nibble i."""
    element = load_file(shared / "golden/cutlass_reorder_map.safetensors")[f"{n}x{k}"].long()
    codes = random_codes(n, k)
    data = reorder(pack(codes, Packing.PACK_QUANTIZED), Packing.PACK_QUANTIZED).view(torch.uint8).flatten()
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).flatten()
    assert nibbles.tolist() == [encode(u) for u in codes.flatten()[element].tolist()]


@PACKINGS
@pytest.mark.parametrize("first", range(16))
def test_every_code_is_encoded_in_every_nibble(packing: Packing, first: int) -> None:
    """Over the 16 starts, each of the 512 positions of a tile holds each of the 16 codes, there and back."""
    codes = ((torch.arange(512) * 5 + torch.arange(512) // 16 + first) % 16).to(torch.uint8).view(16, 32)
    lut = reorder(pack(codes, packing), packing)
    assert torch.equal(lut.view(torch.uint8).flatten(), lut_by_formula(codes))
    assert torch.equal(restore(lut), pack(codes, Packing.PACK_QUANTIZED))


@PACKINGS
@SIZES
def test_every_packing_is_reordered_by_the_formula(packing: Packing, n: int, k: int) -> None:
    """Odd sizes included; the buffer is shaped [K/32, 4·N]."""
    codes = random_codes(n, k)
    lut = reorder(pack(codes, packing), packing)
    assert lut.shape == reordered_shape(n, k) == (k // 32, 4 * n)
    assert torch.equal(lut.view(torch.uint8).flatten(), lut_by_formula(codes))
    assert torch.equal(restore(lut), pack(codes, Packing.PACK_QUANTIZED))


@PACKINGS
def test_parts_of_their_real_size_join(packing: Packing) -> None:
    """More codes than one part has, where parts are as large as they are in conversions, except for long ones."""
    codes = random_codes(16 * 70, 32 * 130)
    packed = pack(codes, packing)
    parts = list(reorder_parts(packed, packing))
    assert len(parts) == (1 if packing.axes == "nk" else 2)
    assert torch.equal(torch.cat(parts).view(torch.uint8).flatten(), lut_by_formula(codes))
    assert torch.equal(restore(torch.cat(parts)), pack(codes, Packing.PACK_QUANTIZED))
    assert torch.equal(to_pack_quantized(packed, packing), pack(codes, Packing.PACK_QUANTIZED))


@PACKINGS
@given(tiles=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 2**32 - 1))
def test_round_trips(packing: Packing, tiles: tuple[int, int], seed: int) -> None:
    """Codes survive the way into the kernel's order and back."""
    codes = random_codes(16 * tiles[0], 32 * tiles[1], seed)
    assert torch.equal(restore(reorder(pack(codes, packing), packing)), pack(codes, Packing.PACK_QUANTIZED))


@PACKINGS
def test_inputs_may_be_strided_and_stay_as_they_are(packing: Packing) -> None:
    """A slice of a larger tensor, and a transposed one, are reordered like their copies; nothing is written to them."""
    whole = torch.cat([pack(random_codes(64, 128), packing)] * 2, dim=1)
    before = whole.clone()
    for part in (whole[:, : whole.shape[1] // 2], whole.t().contiguous().t()):
        assert not part.is_contiguous()
        lut = reorder(part, packing)
        assert torch.equal(lut, reorder(part.clone(memory_format=torch.contiguous_format), packing))
        for strided in (torch.cat([lut] * 2, dim=1)[:, : lut.shape[1]], lut.t().contiguous().t()):
            assert not strided.is_contiguous()
            assert torch.equal(restore(strided), restore(lut))
            assert torch.equal(strided, lut)
    assert torch.equal(whole, before)


@PACKINGS
def test_shards_are_slices_of_the_buffer(packing: Packing) -> None:
    """Tensor parallelism: 16 output channels are 64 columns, 32 input channels are one row."""
    codes = random_codes(96, 128)
    lut = reorder(pack(codes, packing), packing)
    assert torch.equal(reorder(pack(codes[32:80], packing), packing), lut[:, 32 * 4 : 80 * 4])
    assert torch.equal(reorder(pack(codes[:, 32:96], packing), packing), lut[1:3])
    assert torch.equal(restore(lut[1:3, 32 * 4 : 80 * 4]), pack(codes[32:80, 32:96], Packing.PACK_QUANTIZED))


@PACKINGS
@pytest.mark.parametrize("codes_at_once", [1, 1000, 1 << 14, 1 << 22])
def test_parts_follow_one_another(packing: Packing, codes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size, parts are the rows of the whole, in order."""
    monkeypatch.setattr(lut_layout, "PART_CODES", codes_at_once)
    monkeypatch.setattr(lut_layout, "_LONG_PART_CODES", codes_at_once)
    packed = pack(random_codes(208, 224), packing)
    parts = list(reorder_parts(packed, packing))
    assert torch.equal(torch.cat(parts), reorder(packed, packing))
    assert (len(parts) == 1) == (codes_at_once == 1 << 22)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reordered_shape(40, 64), "N = 40 is not a multiple of 16"),
        (lambda: reordered_shape(16, 48), "K = 48 is not a multiple of 32"),
        (lambda: reordered_shape(0, 32), "N = 0 is not"),
        (lambda: reorder(torch.zeros(8, 40, dtype=torch.int32), Packing.GPTQ), "N = 40 is not"),
        (lambda: reorder(torch.zeros(40, 2, dtype=torch.int32), Packing.AWQ), "K = 40 is not"),
        (lambda: reorder(torch.zeros(16, 4, dtype=torch.int64), Packing.PACK_QUANTIZED), "torch.int64"),
        (lambda: restore(torch.zeros(1, 96, dtype=torch.int32)), "96 columns, not a multiple of 64"),
    ],
)
def test_sizes_that_do_not_fit_are_named(call: Callable[[], object], message: str) -> None:
    """Errors carry the number and what it should divide by."""
    with pytest.raises(ValueError, match=message):
        call()
