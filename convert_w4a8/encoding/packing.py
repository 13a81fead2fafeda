"""INT4 codes in the memory order of vLLM's W4A8 CUTLASS kernel, and back.

One tile holds 16 output channels (n) by 32 input channels (k) in 256 bytes. Nibble index of element (n, k), low
nibble of a byte first (CUTLASS `compute_memory_reordering_atom<float_e4m3_t>`, one atom):

    r = n % 16;  c = k % 32
    thread = (r % 8)·4 + (c % 16) // 4
    value  = (c % 4) + 4·(r // 8) + 8·(c // 16)
    index  = ((n // 16) + (k // 32)·(N // 16))·512 + thread·16 + value

Bit by bit, with rh = r // 8, rl = r % 8, ch = c // 16, cq = c % 16 // 4:

    index within a tile   8  7  6 │ 5  4 │ 3  │ 2  │ 1  0
    is made of              rl    │  cq  │ ch │ rh │ c % 4
                          └─── thread ───┘└── value ──────┘

Four consecutive k stay together, and n-tiles vary fastest; so the buffer is int32 [K/32, 4·N], a pure permutation
of 16-bit units, and a tile is 64 int32 words in the order (rl, cq, ch), each with rh = 0 in its low half.

A nibble is stored in CUTLASS's "unified encoding". With v = u − 8: v in −8 … 0 keeps its two's complement, v in 1 … 7
becomes 8 − v. So the low three bits index a table of scale·(−8 … −1), and the top bit is the sign.

The functions here are plain torch and run on any device; `repack` and `to_rows` hand over to compiled kernels, Triton's
on CUDA and numba's on a CPU.
"""

import math
from collections.abc import Iterator

import torch

from convert_w4a8 import devices
from convert_w4a8.encoding.lut_layout import _PAD
from convert_w4a8.linear import Packing

_RUN = 1 << 18
"""Bytes of packed codes handled at a time where they only change width."""
_BLOCK_WORDS = 64, 512
"""Words along k and n, times 8 for n, that `to_rows` transposes at a time: 1 MiB."""
_PART_CODES = 1 << 22
"""Codes in a part of a layer: 2 MiB, which stay in a core's cache from reading to writing."""


def to_rows_parts(packed: torch.Tensor, packing: Packing) -> Iterator[torch.Tensor]:
    """Yield what `to_rows` returns in parts, some rows after others, made one at a time on a CPU."""
    if packed.device.type == "cuda":
        yield from _cut(to_rows(packed, packing))
        return
    n, k = packing.shape_nk(packed.shape)
    for start, stop in channel_ranges(n, k, 8, _PART_CODES):
        yield to_rows(packing.slice_outputs(packed, start, stop), packing)


def _cut(words: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cut int32 [R, C] into parts of some rows."""
    return (words[start:stop] for start, stop in channel_ranges(len(words), 8 * words.shape[1], 1, _PART_CODES))


def channel_ranges(size: int, other: int, step: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut `size` channels of `other` codes into ranges (start, stop) of at most `most` codes, but `step` channels."""
    length = max(1, most // (other * step)) * step
    return ((start, min(size, start + length)) for start in range(0, size, length))


def to_rows(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the unsigned codes of any packing in ROWS packing, int32 [N, K/8]; ROWS comes back as it is."""
    k = packing.shape_nk(packed.shape)[1]
    if k % 8:
        raise ValueError(f"K = {k} is not a multiple of 8")
    if packing is Packing.ROWS:
        return packed
    kernels = devices.kernels("repack", packed.device)
    rows: torch.Tensor = to_rows_reference(packed, packing) if kernels is None else kernels.to_rows(packed, packing)
    return rows


def to_rows_reference(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Do what `to_rows` does in torch operations, on any device."""
    match packing:
        case Packing.ROWS:
            return packed
        case Packing.GPTQ:
            return packed.contiguous().t().contiguous()  # torch transposes fast only what is contiguous
        case Packing.AWQ:
            return _awq_to_rows(packed)


def unpack_codes(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the unsigned codes of any packing as uint8 [N, K]."""
    rows = to_rows(packed, packing).contiguous()
    codes = torch.empty(rows.shape[0], rows.shape[1] * 8, dtype=torch.uint8, device=rows.device)
    pairs, source = codes.view(torch.int16).view(-1), rows.view(torch.uint8).view(-1)
    for part in _parts(source):
        spread = source[part].to(torch.int16)
        spread |= spread << 4
        torch.bitwise_and(spread, 0x0F0F, out=pairs[part])
    return codes


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Pack unsigned codes uint8 [N, K] into ROWS, int32 [N, K/8], low nibble first; ValueError unless K % 8 == 0."""
    if codes.shape[1] % 8:
        raise ValueError(f"K = {codes.shape[1]} is not a multiple of 8")
    rows = torch.empty(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32, device=codes.device)
    pairs, target = codes.contiguous().view(torch.int16).view(-1), rows.view(torch.uint8).view(-1)
    for part in _parts(target):
        target[part] = pairs[part] | pairs[part] >> 4  # the low byte of it
    return rows


def code_histogram(packed: torch.Tensor, max_words: int = 1 << 16) -> torch.Tensor:
    """Return the frequencies of the 16 unsigned codes, float64 [16] with sum 1, from evenly strided words.

    Every packing has the same codes in its words, so none needs to be named. At most `max_words` are looked at.
    """
    words = packed.flatten()
    sample = words[:: max(1, math.ceil(words.numel() / max_words))]
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=packed.device)
    counts = torch.bincount(((sample[:, None] >> shifts) & 15).flatten(), minlength=16)
    return counts.double() / counts.sum()


def _parts(data: torch.Tensor) -> Iterator[slice]:
    """Cut a one-dimensional tensor into runs whose temporaries stay in the cache; a GPU works best on all of it."""
    run = _RUN if data.device.type == "cpu" else max(1, data.numel())
    return (slice(start, start + run) for start in range(0, data.numel(), run))


def _swap_(block: torch.Tensor, axis: int, shift: int, scratch: torch.Tensor) -> None:
    """Trade two index bits in place: the one that numbers `shift`-bit fields within a word for an axis of length 2.

    That is, the odd fields of the words at 0 change places with the even fields of the words at 1.
    """
    low, high = block.unbind(axis)
    even = {4: 0x0F0F0F0F, 8: 0x00FF00FF, 16: 0x0000FFFF}[shift]  # also masks what an arithmetic shift drags in
    t = scratch.view(-1)[: low.numel()].view(low.shape)
    torch.bitwise_right_shift(low, shift, out=t).bitwise_xor_(high).bitwise_and_(even)
    high ^= t
    low ^= t.bitwise_left_shift_(shift)


def _awq_to_rows(packed: torch.Tensor) -> torch.Tensor:
    """Transpose AWQ's words int32 [K, N/8] into ROWS, int32 [N, K/8]."""
    k, columns = packed.shape
    rows = torch.empty(columns * 8, k // 8, dtype=torch.int32, device=packed.device)
    # As in `repack`: a word has (n0, n2, n1) inside, and trades them for (k2, k1, k0).
    source = packed.reshape(k // 8, 2, 2, 2, columns).permute(2, 3, 1, 0, 4)  # [k1, k0, k2, ...] → [n2, n1, n0, ...]
    target = rows.view(columns, 2, 2, 2, k // 8).permute(1, 2, 3, 4, 0)
    most = _BLOCK_WORDS if packed.device.type == "cpu" else (k // 8, columns)
    k_block, n_block = min(k // 8, most[0]), min(columns, most[1])
    block = torch.zeros(2, 2, 2, k_block, n_block + _PAD, dtype=torch.int32, device=packed.device)
    scratch = torch.empty(block.numel() // 2, dtype=torch.int32, device=packed.device)
    for first_n in range(0, columns, n_block):
        for first_k in range(0, k // 8, k_block):
            part = (..., slice(first_k, first_k + k_block), slice(first_n, first_n + n_block))
            kb, nb = source[part].shape[-2:]
            words = block[..., :kb, :nb]
            words.copy_(source[part])
            for axis, shift in ((1, 4), (0, 8), (2, 16)):
                _swap_(block, axis, shift, scratch)
            target[part].copy_(words)
    return rows
