"""Tables, decoded weights and products against vLLM's bytes and outputs on an H200."""

import bisect
from pathlib import Path

import pytest
import torch
from paths import GOLDEN_CUT
from safetensors.torch import load_file

from convert_w4a8.encoding import tables
from convert_w4a8.encoding.packing import pack_codes, unpack_codes
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.linear import Packing, W4A8Linear

ALL_BYTES = torch.arange(256, dtype=torch.uint8)
CASES = pytest.mark.parametrize("case", ["gauss", "tiny", "edge"])
TOKENS = pytest.mark.parametrize("tokens", ["m1", "m17", "m64"])


def layer(vectors: dict[str, torch.Tensor], case: str) -> W4A8Linear:
    """Return a golden layer, with vLLM's own scales."""
    scale = vectors[f"{case}.fp8_group_scale"].t().contiguous().view(torch.float8_e4m3fn)
    return W4A8Linear(
        vectors[f"{case}.weight_packed"], Packing.PACK_QUANTIZED, scale, None, vectors[f"{case}.channel_scale"]
    )


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    """All golden vectors of the dense op."""
    return load_file(shared / "golden/vllm_w4a8_dense.safetensors")


def exact_accumulation(tokens: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Multiply FP8 values [M, K] by [N, K] as Hopper's tensor cores accumulate: float32 [M, N].

    32 products at a time and the running sum are aligned to the largest exponent among them, cut off (towards zero)
    13 bits below it, and added; the sum is cut to 13 fraction bits. These numbers were found by fitting the golden
    outputs, and reproduce every one of them.
    """

    def exponent(x: torch.Tensor, least: float) -> torch.Tensor:
        return torch.where(x == 0, -1e3, (torch.frexp(x)[1] - 1).double().clamp(min=least))

    x, w = tokens.double(), weights.double()
    total = torch.zeros(len(x), len(w), dtype=torch.float64)
    for k in range(0, x.shape[1], 32):
        a, b = x[:, None, k : k + 32], w[None, :, k : k + 32]
        largest = torch.maximum((exponent(a, -6) + exponent(b, -6)).amax(-1), exponent(total, -1e3))
        unit = torch.exp2(largest.clamp(min=-100) - 13)
        total = ((a * b / unit[..., None]).trunc().sum(-1) + (total / unit).trunc()) * unit
        unit = torch.exp2(exponent(total, -100).clamp(min=-100) - 13)
        total = (total / unit).trunc() * unit
    return total.float()


def as_tensor_core(act: torch.Tensor, w: W4A8Linear) -> torch.Tensor:
    """Do what `tables.gemm` does, with the accumulation of the hardware."""
    tokens, scale = quantize_tokens(act)
    ones = torch.ones_like(w.channel_scale)
    entries = tables.decode(W4A8Linear(w.packed, w.packing, w.group_scale, w.entries, ones))
    return (scale * (w.channel_scale * exact_accumulation(tokens.float(), entries))).bfloat16()


@pytest.mark.parametrize("case", ["gauss", "edge"])
def test_cut_vectors_hold(case: str) -> None:
    """Table bytes and outputs of vLLM's ops, in the small cut that is always here."""
    vectors = load_file(GOLDEN_CUT)
    w = layer(vectors, case)
    assert w.group_scale is not None
    found = tables.expand_tables(w.group_scale).view(torch.uint8)
    assert torch.equal(found.flatten(), vectors[f"{case}.lut_scale_bytes"])
    assert torch.equal(as_tensor_core(vectors[f"{case}.m17.act"], w), vectors[f"{case}.m17.out"])


@CASES
def test_tables_have_the_bytes_of_vllm(golden: dict[str, torch.Tensor], case: str) -> None:
    """`cutlass_pack_scale_fp8`, byte for byte."""
    w = layer(golden, case)
    assert w.group_scale is not None
    found = tables.expand_tables(w.group_scale)
    assert found.shape == (*w.group_scale.shape, 8)
    assert torch.equal(found.view(torch.uint8).flatten(), golden[f"{case}.lut_scale_bytes"])


@CASES
@TOKENS
def test_operands_are_those_of_the_kernel(golden: dict[str, torch.Tensor], case: str, tokens: str) -> None:
    """With the hardware's accumulation, every output is bit-equal: so scales, tables and codes are right."""
    act, out = golden[f"{case}.{tokens}.act"][:17], golden[f"{case}.{tokens}.out"][:17]
    assert torch.equal(as_tensor_core(act, layer(golden, case)), out)


@CASES
@TOKENS
def test_gemm_agrees_with_the_kernel(golden: dict[str, torch.Tensor], case: str, tokens: str) -> None:
    """FP32 accumulation differs from the hardware's 13 bits by a few units in the last place of the largest output."""
    act, out = golden[f"{case}.{tokens}.act"], golden[f"{case}.{tokens}.out"]
    w = layer(golden, case)
    found = tables.gemm(act, w)
    assert found.dtype == torch.bfloat16
    assert (found == out).double().mean() > 0.9
    # At each of the K/32 steps up to 33 addends lose less than a unit each; the unit is at most 2⁻¹³ of Σ|a·w|.
    quantized, scale = quantize_tokens(act)
    magnitude = (quantized.float() * scale).abs() @ tables.decode(w).abs().t()
    bound = magnitude * 2**-13 * 8 + out.float().abs() * 2**-7
    assert ((found.float() - out.float()).abs() <= bound).all()


def test_every_scale_expands_to_the_nearest_entries() -> None:
    """All 254 finite scale bytes, against a search among the E4M3 values; ties go to the even byte, excess to 448."""
    values = ALL_BYTES[:127].view(torch.float8_e4m3fn).double().tolist()
    found = tables.expand_tables(ALL_BYTES.view(torch.float8_e4m3fn)).view(torch.uint8)
    for byte in range(256):
        if byte & 0x7F == 0x7F:
            assert found[byte].tolist() == [0x7F] * 8  # NaN
            continue
        for entry, magnitude in enumerate(range(8, 0, -1)):
            exact = values[byte & 0x7F] * magnitude
            above = min(bisect.bisect_left(values, exact), 126)
            nearest = min((above - 1, above), key=lambda i: (abs(values[max(i, 0)] - exact), i % 2))
            sign = ~byte & 0x80
            assert found[byte, entry] == max(nearest, 0) | sign, (byte, magnitude)


@pytest.mark.parametrize("groups_at_once", [1, 7, 1 << 24])
def test_multiplied_tables_are_the_same(groups_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scales that checkpoints have, both zeros among them; in any order of memory, and in parts."""
    monkeypatch.setattr(tables, "_GROUPS_AT_ONCE", groups_at_once)
    scales = ALL_BYTES.view(torch.float8_e4m3fn)
    usable = scales[scales.float().abs() <= 56]
    assert len(usable) == 2 * 103
    for scale in (usable, usable.view(2, -1), usable.view(2, -1).t()):
        found, expected = tables.multiply_tables(scale), tables.expand_tables(scale)
        assert found.shape == expected.shape
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_indices_stand_for_the_same_tables() -> None:
    """Bytes of scales for multiplied tables; of any other tables too, where 256 of them are distinct, and no more."""
    scale = ALL_BYTES.view(torch.float8_e4m3fn)[torch.randint(256, (5, 48))]
    index, distinct = tables.index_scales(scale)
    assert index.data_ptr() == scale.data_ptr()
    assert torch.equal(distinct.view(torch.uint8)[index.long()], tables.multiply_tables(scale).view(torch.uint8))
    every = torch.randint(256, (257, 8)).to(torch.uint8).view(torch.float8_e4m3fn)
    for distinct_ones, fits in ((1, True), (256, True), (257, False)):
        which = torch.cat((torch.arange(distinct_ones), torch.randint(distinct_ones, (63,))))[:320]
        some = every[which].view(1, -1, 8)
        found = tables.index_tables(some)
        assert (found is not None) == fits
        if found is not None:
            index, distinct = found
            assert (index.dtype, index.shape, distinct.shape) == (torch.uint8, some.shape[:2], (256, 8))
            assert torch.equal(distinct.view(torch.uint8)[index.long()], some.view(torch.uint8))


@pytest.mark.parametrize("chunk", [1, 700, 1 << 22])
@pytest.mark.parametrize("direct", [False, True], ids=["scale", "entries"])
def test_decode_looks_each_code_up(direct: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Entry v + 8 for v < 0, entry −v negated for v > 0, 0 for 0; then the channel scale. Entries have any sign."""
    monkeypatch.setattr(tables, "_CHUNK_WEIGHTS", chunk)
    generator = torch.Generator().manual_seed(3)
    n, k = 24, 256
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    finite = ALL_BYTES[(ALL_BYTES & 0x7F) != 0x7F]
    channel = torch.rand(n, generator=generator) + 0.5
    shape = (k // 128, n, 8) if direct else (k // 128, n)
    data = finite[torch.randint(0, len(finite), shape, generator=generator)].view(torch.float8_e4m3fn)
    w = W4A8Linear(
        pack_codes(codes), Packing.PACK_QUANTIZED, None if direct else data, data if direct else None, channel
    )
    lut = (data if direct else tables.expand_tables(data)).float()
    expected = torch.empty(n, k)
    for i in range(n):
        for j in range(k):
            v = int(codes[i, j]) - 8
            entry = 0.0 if v == 0 else float(lut[j // 128, i, v + 8] if v < 0 else -lut[j // 128, i, 8 - v])
            expected[i, j] = entry * channel[i]
    assert torch.equal(tables.decode(w), expected)


@pytest.mark.parametrize("packing", [Packing.GPTQ, Packing.AWQ], ids=str)
def test_decode_takes_every_packing(packing: Packing) -> None:
    """The same words mean other codes in another packing; the tables are looked up all the same."""
    generator = torch.Generator().manual_seed(4)
    shape = (16, 32) if packing is Packing.GPTQ else (128, 4)
    packed = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32, generator=generator)
    scale = torch.full((1, 32), 2.0).to(torch.float8_e4m3fn)
    w = W4A8Linear(packed, packing, scale, None, torch.full((32,), 0.5))
    assert torch.equal(tables.decode(w), unpack_codes(packed, packing).float() - 8)


def test_a_layer_without_tables_is_refused() -> None:
    """Neither scales nor entries: nothing to multiply by."""
    packed = torch.zeros(16, 16, dtype=torch.int32)
    with pytest.raises(ValueError, match="group_scale or entries"):
        tables.decode(W4A8Linear(packed, Packing.PACK_QUANTIZED, None, None, torch.ones(16)))


def test_tokens_are_quantized_by_their_own_maximum() -> None:
    """The largest value becomes ±448, and a zero token has vLLM's least scale rather than a division by zero."""
    act = torch.tensor([[0.5, -2.0, 1.0], [0.0, 0.0, 0.0]]).bfloat16()
    tokens, scale = quantize_tokens(act)
    assert tokens.float().tolist() == [[112.0, -448.0, 224.0], [0.0, 0.0, 0.0]]
    torch.testing.assert_close(scale.flatten(), torch.tensor([2 / 448, 1 / (448 * 512)]))
