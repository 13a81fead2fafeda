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

Four consecutive k stay together, and tiles along n (nt) vary faster than tiles along k (kt); so the codes are int32
[K/32, 4·N], a pure permutation of 16-bit units, and a tile is 64 int32 words in the order (rl, cq, ch), each with
rh = 0 in its low half.

A nibble is stored in CUTLASS's "unified encoding". With v = u − 8: v in −8 … 0 keeps its two's complement, v in 1 … 7
becomes 8 − v. So the low three bits index a table of scale·(−8 … −1), and the top bit is the sign.
"""

from collections.abc import Iterator

import torch

from convert_w4a8 import devices
from convert_w4a8.encoding.packing import PART_CODES, channel_ranges, cut
from convert_w4a8.linear import Packing
from convert_w4a8.lut_format import TILE_K, TILE_N

_LONG_PART_CODES = 1 << 25
"""Codes in a part where parts cut through the rows of the source: 16 MiB, for long pieces of each row."""


def reorder(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Encode and reorder the int32 codes of an [N, K] layer, in any packing, into the kernel's order: [K/32, 4·N].

    Raises ValueError unless N % 16 == 0 and K % 32 == 0.
    """
    if packed.dtype is not torch.int32:
        raise ValueError(f"packed codes are {packed.dtype}, not torch.int32")
    return devices.repack(packed.device).reorder(packed, packing)


def reorder_parts(packed: torch.Tensor, packing: Packing) -> Iterator[torch.Tensor]:
    """Yield what `reorder` returns in parts, some rows after others, made one at a time on a CPU."""
    if packed.device.type == "cuda":
        yield from cut(reorder(packed, packing))
        return
    n, k = packing.shape_nk(packed.shape)
    most = _LONG_PART_CODES if packing.axes == "nk" else PART_CODES
    for start, stop in channel_ranges(k, n, TILE_K, most):
        yield reorder(packing.slice_inputs(packed, start, stop), packing)


def restore(reordered: torch.Tensor) -> torch.Tensor:
    """Invert `reorder`: from int32 [K/32, 4·N] to unsigned codes as compressed-tensors packs them, int32 [N, K/8].

    Raises ValueError where the columns are not those of whole tiles.
    """
    if reordered.shape[1] % (4 * TILE_N):
        raise ValueError(f"reordered codes have {reordered.shape[1]} columns, not a multiple of {4 * TILE_N}")
    return devices.repack(reordered.device).restore(reordered)
