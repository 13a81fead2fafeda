"""INT4 codes in the memory order of vLLM's W4A8 CUTLASS kernel, and back.

One tile holds 16 output channels (n) by 32 input channels (k) in 256 bytes. Nibble index of element (n, k), low
nibble of a byte first (CUTLASS `compute_memory_reordering_atom<float_e4m3_t>`, one atom):

    r = n % 16;  c = k % 32
    thread = (r % 8)·4 + (c % 16) // 4
    value  = (c % 4) + 4·(r // 8) + 8·(c // 16)
    index  = ((n // 16) + (k // 32)·(N // 16))·512 + thread·16 + value

    bit of index:   8  7  6 │  5  4 │  3  │  2  │  1  0
    comes from:      r % 8  │ cq    │ ch  │ rh  │ c % 4         ch = c // 16, cq = c % 16 // 4, rh = r // 8
                    └ thread ───────┘└ value ────────────┘

Four consecutive k stay together, so in units of 16 bits it is a pure permutation of [nt, rh, rl, kt, ch, cq] (row-major
codes) to [kt, nt, rl, cq, ch, rh]. n-tiles vary fastest: the buffer is int32 [K/32, 4·N].

A code is stored in CUTLASS's "unified encoding": with v = u − 8, the nibble of v in 1…7 is 8 − v, and v in −8…0
keeps its two's complement. The low three bits then index the table of e4m3(scale·−8 … −1), the top bit is the sign.
"""

import torch

from convert_w4a8.weights import Packing

TILE_N = 16
"""Output channels of one tile of the LUT layout."""
TILE_K = 32
"""Input channels of one tile of the LUT layout."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word is column AWQ_ORDER[i] of its eight."""


def lut_shape(n: int, k: int) -> tuple[int, int]:
    """Return the shape of the int32 LUT buffer of an [N, K] layer; ValueError where the tiles do not fit."""
    for name, size, tile in (("N", n, TILE_N), ("K", k, TILE_K)):
        if size < tile or size % tile:
            raise ValueError(f"{name} = {size} is not a multiple of {tile}")
    return k // TILE_K, 4 * n


def unpack_codes(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the unsigned codes, uint8 [N, K], of int32 words in any packing."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    codes = ((packed[..., None] >> shifts) & 15).to(torch.uint8)
    match packing:
        case Packing.ROWS:
            return codes.flatten(1)
        case Packing.GPTQ:
            return codes.permute(1, 0, 2).flatten(1)
        case Packing.AWQ:
            inverse = [AWQ_ORDER.index(i) for i in range(8)]
            return codes[..., inverse].flatten(1).t().contiguous()


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Pack unsigned codes uint8 [N, K] into int32 [N, K/8], low nibble first; ValueError unless K % 8 == 0."""
    n, k = codes.shape
    if k % 8:
        raise ValueError(f"K = {k} is not a multiple of 8")
    pairs = codes.view(n, k // 2, 2)
    return (pairs[..., 0] | (pairs[..., 1] << 4)).view(torch.int32)


def to_rows(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the same unsigned codes in ROWS packing, int32 [N, K/8]."""
    if packing is Packing.ROWS:
        return packed
    return pack_rows(unpack_codes(packed, packing))


def repack(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Encode and reorder int32 codes of any packing into the LUT buffer, int32 [K/32, 4·N]."""
    n, k = packing.shape_nk(packed.shape)
    shape = lut_shape(n, k)
    units = to_rows(packed, packing).contiguous().view(torch.int16)
    units = units.view(n // 16, 2, 8, k // 32, 2, 4).permute(3, 0, 2, 5, 4, 1)
    return _encode(units.contiguous().view(torch.int32)).view(shape)


def unpack(weight_packed: torch.Tensor) -> torch.Tensor:
    """Invert `repack`: the LUT buffer int32 [K/32, 4·N] to unsigned codes in ROWS packing, int32 [N, K/8]."""
    n, k = weight_packed.shape[1] // 4, weight_packed.shape[0] * TILE_K
    if weight_packed.shape[1] != lut_shape(n, k)[1]:
        raise ValueError(f"LUT buffer of {weight_packed.shape[1]} columns is not a multiple of 64")
    units = _decode(weight_packed.contiguous()).view(torch.int16)
    units = units.view(k // 32, n // 16, 8, 4, 2, 2).permute(1, 5, 2, 0, 4, 3)
    return units.contiguous().view(torch.int32).view(n, k // 8)


def code_histogram(packed: torch.Tensor, max_words: int = 1 << 16) -> torch.Tensor:
    """Return the frequencies of the 16 unsigned codes, float64 [16] with sum 1, from an evenly strided sample of words."""
    words = packed.flatten()
    sample = words[:: max(1, -(-words.numel() // max_words))]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    codes = (sample[:, None] >> shifts) & 15
    counts = torch.bincount(codes.flatten(), minlength=16)
    return counts.double() / counts.sum()


_ONES, _EIGHTS = 0x11111111, -0x77777778


def _negate_low(y: torch.Tensor) -> torch.Tensor:
    """In each nibble whose top bit is set, negate the low three bits (mod 8)."""
    h = (y >> 3) & _ONES
    low = (y ^ (h * 15)) + h  # 7 − t + 1, in 1 … 8
    return (low & ~(h * 8)) | (h * 8)


def _encode(u: torch.Tensor) -> torch.Tensor:
    return _negate_low(u) ^ _EIGHTS


def _decode(e: torch.Tensor) -> torch.Tensor:
    return _negate_low(e ^ _EIGHTS)
