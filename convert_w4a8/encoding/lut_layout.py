"""INT4 codes in the memory order of vLLM's W4A8 CUTLASS kernel, and back."""

import math
from collections.abc import Iterator
from itertools import product

import torch

from convert_w4a8 import devices
from convert_w4a8.encoding.packing import _PART_CODES, _cut, _swap_, channel_ranges
from convert_w4a8.linear import Packing
from convert_w4a8.lut_format import TILE_K, TILE_N, lut_shape

_BLOCK_TILES = 4096
"""Tiles handled at a time: 1 MiB, large enough to hide what a torch call costs, small enough for the cache."""
_ROWS_PART_CODES = 1 << 25
"""The same where parts cut through the rows of ROWS packing: 16 MiB, for long pieces of each row."""
_PAD = 16
"""Words added to each row of scratch memory, lest a transposition's strides fall on the same few cache sets."""
_EVERY_1 = 0x11111111
_EVERY_8 = -0x77777778  # 0x88888888 as int32


def repack(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Encode and reorder the int32 codes of an [N, K] layer, in any packing, into its LUT buffer int32 [K/32, 4·N].

    Raises ValueError unless N % 16 == 0 and K % 32 == 0.
    """
    if packed.dtype is not torch.int32:
        raise ValueError(f"packed codes are {packed.dtype}, not torch.int32")
    kernels = devices.kernels("repack", packed.device)
    lut: torch.Tensor = repack_reference(packed, packing) if kernels is None else kernels.repack(packed, packing)
    return lut


def repack_reference(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Do what `repack` does in torch operations, on any device."""
    n, k = packing.shape_nk(packed.shape)
    lut = torch.empty(lut_shape(n, k), dtype=torch.int32, device=packed.device)
    # A word of the source has its own three index bits inside; each swap trades one of them for the index bit that
    # the target wants there. What remains is a permutation of words: the source's axes in the target's order.
    nt, kt = n // TILE_N, k // TILE_K
    swaps: tuple[tuple[int, int], ...]
    match packing:
        case Packing.GPTQ:  # [kt, ch, cq1, nt, rh, rl], inside: cq0
            source = packed.reshape(kt, 2, 2, nt, 2, 8).permute(5, 2, 4, 1, 0, 3)
            swaps = ((2, 16),)
        case Packing.ROWS:  # [nt, rh, rl, kt, ch, cq1], inside: cq0
            source = packed.reshape(nt, 2, 8, kt, 2, 2).permute(2, 5, 1, 4, 3, 0)
            swaps = ((2, 16),)
        case Packing.AWQ:  # [kt, ch, cq, k1, k0, nt, rh], inside: rl0, rl2, rl1
            source = packed.reshape(kt, 2, 4, 2, 2, nt, 2).permute(3, 4, 6, 2, 1, 0, 5)
            swaps = ((1, 4), (0, 8), (2, 16))
    target = lut.view(kt, nt, 64).permute(2, 0, 1)
    _by_blocks(source, target, swaps, encode=True, rows=packing is Packing.ROWS)
    return lut


def repack_parts(packed: torch.Tensor, packing: Packing) -> Iterator[torch.Tensor]:
    """Yield what `repack` returns in parts, some rows after others, made one at a time on a CPU."""
    if packed.device.type == "cuda":
        yield from _cut(repack(packed, packing))
        return
    n, k = packing.shape_nk(packed.shape)
    most = _ROWS_PART_CODES if packing is Packing.ROWS else _PART_CODES
    for start, stop in channel_ranges(k, n, TILE_K, most):
        yield repack(packing.slice_inputs(packed, start, stop), packing)


def unpack(weight_packed: torch.Tensor) -> torch.Tensor:
    """Invert `repack`: from a LUT buffer int32 [K/32, 4·N] to unsigned codes in ROWS packing, int32 [N, K/8]."""
    kt, columns = weight_packed.shape
    if columns % (4 * TILE_N):
        raise ValueError(f"a LUT buffer's {columns} columns are not a multiple of {4 * TILE_N}")
    nt = columns // (4 * TILE_N)
    rows = torch.empty(nt * TILE_N, kt * 4, dtype=torch.int32, device=weight_packed.device)
    source = weight_packed.reshape(kt, nt, 8, 2, 2, 2).permute(2, 3, 4, 5, 0, 1)
    target = rows.view(nt, 2, 8, kt, 2, 2).permute(2, 5, 1, 4, 3, 0)
    _by_blocks(source, target, ((2, 16),), encode=False, rows=True)
    return rows


def _by_blocks(
    source: torch.Tensor, target: torch.Tensor, swaps: tuple[tuple[int, int], ...], *, encode: bool, rows: bool
) -> None:
    """Copy words from `source` to `target`, swapping bits and encoding or decoding nibbles on the way.

    Both are views int32 [8, 2, 2, 2, K/32, N/16] or alike, whose leading axes number the 64 words of a tile. The work
    is done in cache-sized scratch memory [64, tiles], so that each operation runs over long contiguous rows.
    rows: whether either is in ROWS packing, contiguous along k; blocks are then square instead of as wide as N.
    """
    words, (kt, nt) = source.shape[:-2], source.shape[-2:]
    n_block = min(nt, math.isqrt(_BLOCK_TILES) if rows else _BLOCK_TILES)
    k_block = min(kt, max(1, _BLOCK_TILES // n_block))
    block = torch.zeros(*words, k_block * n_block + _PAD, dtype=torch.int32, device=source.device)
    scratch = torch.empty(2, block.numel(), dtype=torch.int32, device=source.device)
    for n in range(0, nt, n_block):
        for k in range(0, kt, k_block):
            part = (..., slice(k, k + k_block), slice(n, n + n_block))
            kb, nb = source[part].shape[-2:]
            strides = (1, kb) if rows and encode else (nb, 1)  # in the order in which the source is read
            tiles = block.as_strided((*words, kb, nb), (*block.stride()[:-1], *strides))
            tiles.copy_(source[part])
            if encode:
                _encode_(block, scratch)
            for axis, shift in swaps:
                _swap_(block, axis, shift, scratch)
            if encode:
                target[part].copy_(tiles.reshape(64, kb, nb))
                continue
            _decode_(block, scratch)
            # torch would run along ROWS' innermost axes cq1 and ch, which have length two: take them one by one.
            for cq1, ch in product((0, 1), repeat=2):
                target[part][:, cq1, :, ch].copy_(tiles[:, cq1, :, ch])


def _encode_(words: torch.Tensor, scratch: torch.Tensor) -> None:
    """Turn unsigned codes u = v + 8 into the unified encoding, in place, all nibbles of a word at once."""
    h, t = (s.view(words.shape) for s in scratch)
    minus_1, eights = (torch.tensor(c, dtype=torch.int32, device=words.device) for c in (-1, _EVERY_8))
    torch.bitwise_right_shift(words, 3, out=h).bitwise_and_(_EVERY_1)  # 1 where v ≥ 0
    words ^= torch.add(eights, h, alpha=7, out=t)  # v < 0: done; v ≥ 0: 7 − v …
    words += h  # … + 1, at most 8, so no carry leaves the nibble
    words &= torch.add(minus_1, h, alpha=-8, out=t)  # 8 − 0 is 0


def _decode_(words: torch.Tensor, scratch: torch.Tensor) -> None:
    """Invert `_encode_`: flipping the top bit before and after makes the encoding its own inverse."""
    words ^= _EVERY_8
    _encode_(words, scratch)
    words ^= _EVERY_8
