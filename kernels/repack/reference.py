"""Codes from one packing into another in plain torch, on any device: slow, and short enough to be read.

`encoding/lut_layout.py` has the bit diagram of the reordered layout and the names of its axes.
"""

import torch

from convert_w4a8.linear import Packing
from convert_w4a8.lut_format import TILE_K, TILE_N, reordered_shape

_TILE = (2, 8, 2, 4, 4)
"""Sizes of rh, rl, ch, cq and c % 4."""


def reorder(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Encode and reorder the int32 codes of an [N, K] layer into the kernel's order, int32 [K/32, 4·N].

    Raises ValueError unless N % 16 == 0 and K % 32 == 0.
    """
    n, k = packing.shape_nk(packed.shape)
    shape = reordered_shape(n, k)
    rh, rl, ch, cq, c = _TILE
    codes = _unpack(packed, packing)
    encoded = torch.where(codes > 8, 16 - codes, codes ^ 8)
    tiles = encoded.view(n // TILE_N, rh, rl, k // TILE_K, ch, cq, c).permute(3, 0, 2, 5, 4, 1, 6)
    return _pack(tiles.reshape(1, -1)).view(shape)


def restore(reordered: torch.Tensor) -> torch.Tensor:
    """Invert `reorder`: from int32 [K/32, 4·N] to unsigned codes in compressed-tensors' packing, int32 [N, K/8]."""
    kt, nt = reordered.shape[0], reordered.shape[1] // (4 * TILE_N)
    rh, rl, ch, cq, c = _TILE
    encoded = _unpack(reordered, Packing.PACK_QUANTIZED).view(kt, nt, rl, cq, ch, rh, c)
    codes = torch.where((encoded > 0) & (encoded < 8), 16 - encoded, encoded ^ 8)
    return _pack(codes.permute(1, 5, 2, 0, 4, 3, 6).reshape(nt * TILE_N, kt * TILE_K))


def to_pack_quantized(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the codes of any packing in compressed-tensors' packing, int32 [N, K/8]."""
    return _pack(_unpack(packed, packing).contiguous())


def _unpack(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return unsigned codes, uint8 [N, K]."""
    data = packed.contiguous().view(-1).view(torch.uint8)
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).view(*packed.shape, 8)
    channels = nibbles[..., [packing.order.index(i) for i in range(8)]]
    if packing.along == packing.axes[0]:
        channels = channels.transpose(1, 2)
        codes = channels.reshape(-1, packed.shape[1])
    else:
        codes = channels.reshape(packed.shape[0], -1)
    return codes if packing.axes == "nk" else codes.t()


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Pack unsigned codes uint8 [R, C] along their rows, low nibble first: int32 [R, C/8]."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).contiguous().view(torch.int32)
