"""The LUT layout against vLLM's own bytes, against the index formula written out, and against compressed-tensors."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import GOLDEN_CUT
from safetensors.torch import load_file

from convert_w4a8.encoding import lut_layout
from convert_w4a8.encoding import packing as packing_module
from convert_w4a8.linear import Packing

pytestmark = pytest.mark.usefixtures("cpu_path")

PACKINGS = pytest.mark.parametrize("packing", Packing, ids=str)
SIZES = pytest.mark.parametrize(("n", "k"), [(16, 32), (48, 96), (16, 4096), (208, 32), (160, 224)], ids=str)


def random_codes(n: int, k: int, seed: int = 0) -> torch.Tensor:
    """Return unsigned codes, uint8 [N, K]."""
    return torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pack(codes: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Pack codes uint8 [N, K] as `Packing` documents it, nibble by nibble."""
    u = codes.numpy().astype(np.uint32)
    match packing:
        case Packing.GPTQ:
            words = sum(u[:, i::8].T << 4 * i for i in range(8))
        case Packing.AWQ:
            words = sum(u[column::8].T << 4 * i for i, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
        case Packing.PACK_QUANTIZED:
            words = sum(u[:, i::8] << 4 * i for i in range(8))
    return torch.from_numpy(np.ascontiguousarray(words).view(np.int32))


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
    lut = lut_layout.reorder(packed, Packing.PACK_QUANTIZED)
    assert torch.equal(lut.view(torch.uint8).flatten(), expected)
    assert torch.equal(lut_layout.restore(lut), packed)


@pytest.mark.parametrize("case", ["gauss", "edge"])
def test_repack_gives_the_bytes_of_vllm(case: str) -> None:
    """`cutlass_encode_and_reorder_int4b` wrote these bytes on an H200; the small cut is always here."""
    assert_vllm_bytes(load_file(GOLDEN_CUT), case)


@pytest.mark.parametrize("case", ["gauss", "tiny", "edge"])
def test_repack_gives_all_golden_bytes(shared: Path, case: str) -> None:
    """The same with the full vectors."""
    assert_vllm_bytes(load_file(shared / "golden/vllm_w4a8_dense.safetensors"), case)


@pytest.mark.parametrize(("n", "k"), [(128, 256), (256, 512)])
def test_repack_follows_the_golden_reorder_map(shared: Path, n: int, k: int) -> None:
    """Entry i of the map is the element that CUTLASS put at nibble i."""
    element = load_file(shared / "golden/cutlass_reorder_map.safetensors")[f"{n}x{k}"].long()
    codes = random_codes(n, k)
    data = lut_layout.reorder(pack(codes, Packing.PACK_QUANTIZED), Packing.PACK_QUANTIZED).view(torch.uint8).flatten()
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).flatten()
    assert nibbles.tolist() == [encode(u) for u in codes.flatten()[element].tolist()]


@PACKINGS
@pytest.mark.parametrize("first", range(16))
def test_every_code_is_encoded_in_every_nibble(packing: Packing, first: int) -> None:
    """Over the 16 starts, each of the 512 positions of a tile holds each of the 16 codes."""
    codes = ((torch.arange(512) * 5 + torch.arange(512) // 16 + first) % 16).to(torch.uint8).view(16, 32)
    lut = lut_layout.reorder(pack(codes, packing), packing)
    assert torch.equal(lut.view(torch.uint8).flatten(), lut_by_formula(codes))


@PACKINGS
@SIZES
def test_every_packing_repacks_by_the_formula(packing: Packing, n: int, k: int) -> None:
    """Odd sizes included; the buffer is shaped [K/32, 4·N]."""
    codes = random_codes(n, k)
    lut = lut_layout.reorder(pack(codes, packing), packing)
    assert lut.shape == packing_module.reordered_shape(n, k) == (k // 32, 4 * n)
    assert torch.equal(lut.view(torch.uint8).flatten(), lut_by_formula(codes))


@PACKINGS
@pytest.mark.parametrize("tiles", [1, 3, 8, 65])
def test_blocks_cover_everything(packing: Packing, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that no block divides, in blocks so small that there are many."""
    monkeypatch.setattr(packing_module, "_BLOCK_TILES", tiles)
    monkeypatch.setattr(packing_module, "_BLOCK_WORDS", (tiles, tiles + 1))
    codes = random_codes(176, 416)
    packed = pack(codes, packing)
    lut = lut_layout.reorder(packed, packing)
    assert torch.equal(lut.view(torch.uint8).flatten(), lut_by_formula(codes))
    assert torch.equal(lut_layout.restore(lut), pack(codes, Packing.PACK_QUANTIZED))
    assert torch.equal(packing_module.to_pack_quantized(packed, packing), pack(codes, Packing.PACK_QUANTIZED))


@PACKINGS
def test_blocks_of_their_real_size_join(packing: Packing) -> None:
    """More than one real block along both axes."""
    codes = random_codes(16 * 70, 32 * 130)
    lut = lut_layout.reorder(pack(codes, packing), packing)
    assert torch.equal(lut.view(torch.uint8).flatten(), lut_by_formula(codes))


@PACKINGS
@given(tiles=st.tuples(st.integers(1, 5), st.integers(1, 5)), seed=st.integers(0, 2**32 - 1))
def test_round_trips(packing: Packing, tiles: tuple[int, int], seed: int) -> None:
    """Codes survive every way from one packing to another."""
    codes = random_codes(16 * tiles[0], 32 * tiles[1], seed)
    packed, rows = pack(codes, packing), pack(codes, Packing.PACK_QUANTIZED)
    assert torch.equal(packing_module.unpack_codes(packed, packing), codes)
    assert torch.equal(packing_module.to_pack_quantized(packed, packing), rows)
    assert torch.equal(packing_module.pack_codes(codes), rows)
    assert torch.equal(lut_layout.restore(lut_layout.reorder(packed, packing)), rows)


@PACKINGS
def test_rows_need_no_tiles(packing: Packing) -> None:
    """`to_pack_quantized` and `unpack_codes` serve layers that the kernel cannot take too: N and K multiples of 8."""
    codes = random_codes(24, 40)
    assert torch.equal(
        packing_module.to_pack_quantized(pack(codes, packing), packing), pack(codes, Packing.PACK_QUANTIZED)
    )
    assert torch.equal(packing_module.unpack_codes(pack(codes, packing), packing), codes)


@PACKINGS
def test_inputs_may_be_strided_and_stay_as_they_are(packing: Packing) -> None:
    """A slice of a larger tensor repacks like its copy, and nothing is written to it."""
    whole = torch.cat([pack(random_codes(64, 128), packing)] * 2, dim=1)
    part = whole[:, : whole.shape[1] // 2]
    before = whole.clone()
    for function in (lut_layout.repack, packing_module.to_pack_quantized, packing_module.unpack_codes):
        assert torch.equal(function(part, packing), function(part.clone(), packing))
    assert torch.equal(whole, before)


@PACKINGS
def test_shards_are_slices_of_the_buffer(packing: Packing) -> None:
    """Tensor parallelism: 16 output channels are 64 columns, 32 input channels are one row."""
    codes = random_codes(96, 128)
    lut = lut_layout.reorder(pack(codes, packing), packing)
    assert torch.equal(lut_layout.reorder(pack(codes[32:80], packing), packing), lut[:, 32 * 4 : 80 * 4])
    assert torch.equal(lut_layout.reorder(pack(codes[:, 32:96], packing), packing), lut[1:3])


@PACKINGS
@pytest.mark.parametrize("codes_at_once", [1, 1000, 1 << 14, 1 << 22])
def test_parts_follow_one_another(packing: Packing, codes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their size, parts are the rows of the whole, in order."""
    monkeypatch.setattr(packing_module, "_PART_CODES", codes_at_once)
    monkeypatch.setattr(packing_module, "_ROWS_PART_CODES", codes_at_once)
    packed = pack(random_codes(208, 224), packing)
    for parts, whole in (
        (list(lut_layout.reorder_parts(packed, packing)), lut_layout.reorder(packed, packing)),
        (
            list(packing_module.to_pack_quantized_parts(packed, packing)),
            packing_module.to_pack_quantized(packed, packing),
        ),
    ):
        assert torch.equal(torch.cat(parts), whole)
        assert (len(parts) == 1) == (codes_at_once == 1 << 22)


def test_compressed_tensors_packs_the_same_rows() -> None:
    """The library that defines pack-quantized agrees on `pack_codes` and `unpack_codes`."""
    pack_quantized = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="compressed-tensors is not installed"
    )
    codes = random_codes(48, 96)
    signed = codes.to(torch.int8) - 8
    theirs = pack_quantized.pack_to_int32(signed, 4)
    assert torch.equal(packing_module.pack_codes(codes), theirs)
    back = pack_quantized.unpack_from_int32(theirs, 4, torch.Size(codes.shape))
    assert torch.equal(packing_module.unpack_codes(theirs, Packing.PACK_QUANTIZED).to(torch.int8) - 8, back)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: packing_module.reordered_shape(40, 64), "N = 40 is not a multiple of 16"),
        (lambda: packing_module.reordered_shape(16, 48), "K = 48 is not a multiple of 32"),
        (lambda: packing_module.reordered_shape(0, 32), "N = 0 is not"),
        (lambda: lut_layout.reorder(torch.zeros(8, 40, dtype=torch.int32), Packing.GPTQ), "N = 40 is not"),
        (lambda: lut_layout.reorder(torch.zeros(40, 2, dtype=torch.int32), Packing.AWQ), "K = 40 is not"),
        (lambda: lut_layout.reorder(torch.zeros(16, 4, dtype=torch.int64), Packing.PACK_QUANTIZED), "torch.int64"),
        (
            lambda: packing_module.to_pack_quantized(torch.zeros(12, 2, dtype=torch.int32), Packing.AWQ),
            "K = 12 is not a multiple of 8",
        ),
        (lambda: packing_module.pack_codes(torch.zeros(16, 12, dtype=torch.uint8)), "K = 12 is not a multiple of 8"),
        (lambda: lut_layout.restore(torch.zeros(1, 96, dtype=torch.int32)), "96 columns are not a multiple of 64"),
    ],
)
def test_sizes_that_do_not_fit_are_named(call: Callable[[], object], message: str) -> None:
    """Errors carry the number and what it should divide by."""
    with pytest.raises(ValueError, match=message):
        call()


@PACKINGS
def test_histogram_counts_codes(packing: Packing) -> None:
    """With room for every word the frequencies are exact, whatever the packing."""
    codes = random_codes(48, 96).clamp(min=3)
    expected = torch.bincount(codes.flatten(), minlength=16).double() / codes.numel()
    histogram = packing_module.code_frequencies(pack(codes, packing))
    assert histogram.dtype == torch.float64
    torch.testing.assert_close(histogram, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("max_words", [1, 7, 100, 4095, 4096])
def test_histogram_samples_evenly(max_words: int) -> None:
    """A sample reaches the whole tensor, never exceeds its limit, and is the same each time."""
    words = torch.arange(4096, dtype=torch.int32).view(64, 64)
    step = -(-4096 // max_words)
    looked_at = torch.arange(0, 4096, step)
    assert len(looked_at) <= max_words
    expected = packing_module.code_frequencies(looked_at.int().view(1, -1))
    assert torch.equal(packing_module.code_frequencies(words, max_words), expected)
