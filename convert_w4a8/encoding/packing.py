"""INT4 codes out of any packing, one a byte or as compressed-tensors packs them, and how often each code occurs."""

import math
from collections.abc import Iterator

import torch

from convert_w4a8 import devices
from convert_w4a8.linear import Packing

PART_CODES = 1 << 22
"""Codes in a part of a layer: 2 MiB, which stay in a core's cache from reading to writing."""
_RUN = 1 << 18
"""Bytes of packed codes handled at a time where they only change width."""


def to_pack_quantized(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the unsigned codes of any packing as compressed-tensors packs them, int32 [N, K/8].

    What is packed so already comes back as it is. Raises ValueError unless K is a multiple of 8.
    """
    k = packing.shape_nk(packed.shape)[1]
    if k % 8:
        raise ValueError(f"K = {k} is not a multiple of 8")
    if packing == Packing.PACK_QUANTIZED:
        return packed
    return devices.repack(packed.device).to_pack_quantized(packed, packing)


def to_pack_quantized_parts(packed: torch.Tensor, packing: Packing) -> Iterator[torch.Tensor]:
    """Yield what `to_pack_quantized` returns in parts, some rows after others, made one at a time on a CPU."""
    if packed.device.type == "cuda":
        yield from cut(to_pack_quantized(packed, packing))
        return
    n, k = packing.shape_nk(packed.shape)
    for start, stop in channel_ranges(n, k, 8, PART_CODES):
        yield to_pack_quantized(packing.slice_outputs(packed, start, stop), packing)


def cut(words: torch.Tensor) -> Iterator[torch.Tensor]:
    """Cut int32 [R, C] into parts of some rows."""
    return (words[start:stop] for start, stop in channel_ranges(len(words), 8 * words.shape[1], 1, PART_CODES))


def channel_ranges(size: int, other: int, step: int, most: int) -> Iterator[tuple[int, int]]:
    """Cut `size` channels of `other` codes into ranges (start, stop) of at most `most` codes, but `step` channels."""
    length = max(1, most // (other * step)) * step
    return ((start, min(size, start + length)) for start in range(0, size, length))


def unpack_codes(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the unsigned codes of any packing as uint8 [N, K]."""
    words = to_pack_quantized(packed, packing).contiguous()
    codes = torch.empty(words.shape[0], words.shape[1] * 8, dtype=torch.uint8, device=words.device)
    pairs, source = codes.view(torch.int16).view(-1), words.view(torch.uint8).view(-1)
    for part in _parts(source):
        spread = source[part].to(torch.int16)
        spread |= spread << 4
        torch.bitwise_and(spread, 0x0F0F, out=pairs[part])
    return codes


def pack_codes(codes: torch.Tensor) -> torch.Tensor:
    """Pack unsigned codes uint8 [N, K] as compressed-tensors does, int32 [N, K/8], low nibble first.

    Raises ValueError unless K is a multiple of 8.
    """
    if codes.shape[1] % 8:
        raise ValueError(f"K = {codes.shape[1]} is not a multiple of 8")
    words = torch.empty(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32, device=codes.device)
    pairs, target = codes.contiguous().view(torch.int16).view(-1), words.view(torch.uint8).view(-1)
    for part in _parts(target):
        target[part] = pairs[part] | pairs[part] >> 4  # the low byte of it
    return words


def code_frequencies(packed: torch.Tensor, max_words: int = 1 << 16) -> torch.Tensor:
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
