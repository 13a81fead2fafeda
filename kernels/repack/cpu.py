"""INT4 codes from one packing into another on a CPU, compiled by numba.

`encoding/lut_layout.py` has the bit diagram of the reordered layout and the names of its axes.

Each kernel takes the words of a packed matrix as one array, uint32, with the distance from one row to the next. Those
that reorder fill whole tiles: 64 words in the order (rl, cq, ch), each with rh = 0 in its low half.
"""

# numba's decorator and its functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from convert_w4a8.kernels.repack import reference
from convert_w4a8.linear import Packing
from convert_w4a8.lut_format import reordered_shape

_LOW = np.uint32(0xFFFF)
_HIGH = np.uint32(0xFFFF0000)
_EVERY_1 = np.uint32(0x11111111)
_EVERY_8 = np.uint32(0x88888888)
_ALL = np.uint32(0xFFFFFFFF)
_S3, _S4, _S7, _S8, _S16 = (np.uint32(shift) for shift in (3, 4, 7, 8, 16))
_EVEN_4, _EVEN_8 = np.uint32(0x0F0F0F0F), np.uint32(0x00FF00FF)


def reorder(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Do what `reference.reorder` does."""
    kernels = {Packing.GPTQ: _from_gptq, Packing.AWQ: _from_awq, Packing.PACK_QUANTIZED: _from_pack_quantized}
    if packing not in kernels:
        return reference.reorder(packed, packing)
    reordered = torch.empty(reordered_shape(*packing.shape_nk(packed.shape)), dtype=torch.int32)
    kernels[packing](*_words(packed), reordered.numpy().view(np.uint32))
    return reordered


def restore(reordered: torch.Tensor) -> torch.Tensor:
    """Do what `reference.restore` does."""
    tiles_k, columns = reordered.shape
    packed = torch.empty(columns // 4, 4 * tiles_k, dtype=torch.int32)
    _to_pack_quantized(reordered.contiguous().numpy().view(np.uint32), packed.numpy().view(np.uint32))
    return packed


def to_pack_quantized(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Do what `reference.to_pack_quantized` does."""
    kernels = {Packing.GPTQ: _transpose_gptq, Packing.AWQ: _transpose_awq}
    if packing not in kernels:
        return reference.to_pack_quantized(packed, packing)
    n, k = packing.shape_nk(packed.shape)
    rows = torch.empty(n, k // 8, dtype=torch.int32)
    kernels[packing](*_words(packed), rows.numpy().view(np.uint32))
    return rows


def _words(packed: torch.Tensor) -> tuple[npt.NDArray[np.uint32], int]:
    """Return the words of a matrix from its first to its last as one array, and the distance of its rows in it."""
    if packed.stride(1) != 1:
        packed = packed.contiguous()
    stride = packed.stride(0)
    span = (packed.shape[0] - 1) * stride + packed.shape[1]
    return packed.as_strided((span,), (1,)).numpy().view(np.uint32), stride


@njit(cache=True, inline="always")
def _encode(word):
    """Turn eight unsigned codes u = v + 8 into the unified encoding, as `reference.reorder` does."""
    h = (word >> _S3) & _EVERY_1  # 1 where v ≥ 0
    return ((word ^ (_EVERY_8 + h * _S7)) + h) & (_ALL - (h << _S3))


@njit(cache=True, inline="always")
def _decode(word):
    """Invert `_encode`: flipping the top bits before and after makes the encoding its own inverse."""
    return _encode(word ^ _EVERY_8) ^ _EVERY_8


@njit(cache=True, inline="always")
def _swap(low, high, shift, even):
    """Trade the odd fields of `low` for the even fields of `high`; fields of `shift` bits."""
    t = ((low >> shift) ^ high) & even
    return low ^ (t << shift), high ^ t


@njit(cache=True, nogil=True)
def _from_gptq(words, stride, reordered):
    """Split words [kt, ch, cq1][nt, rh, rl], which hold cq0 and c % 4: each half goes beside one of the other rh."""
    tiles_k, columns = reordered.shape
    width = columns // 4
    for kt in range(tiles_k):
        first = 4 * kt * stride
        row0, row1 = words[first : first + width], words[first + stride : first + stride + width]
        first += 2 * stride
        row2, row3 = words[first : first + width], words[first + stride : first + stride + width]
        out = reordered[kt]
        for nt in range(columns // 64):
            for rl in range(8):
                n = 16 * nt + rl
                a0, a1, a2, a3 = _encode(row0[n]), _encode(row1[n]), _encode(row2[n]), _encode(row3[n])
                n += 8
                b0, b1, b2, b3 = _encode(row0[n]), _encode(row1[n]), _encode(row2[n]), _encode(row3[n])
                i = 64 * nt + 8 * rl
                out[i] = (a0 & _LOW) | (b0 << _S16)
                out[i + 1] = (a2 & _LOW) | (b2 << _S16)
                out[i + 2] = (a0 >> _S16) | (b0 & _HIGH)
                out[i + 3] = (a2 >> _S16) | (b2 & _HIGH)
                out[i + 4] = (a1 & _LOW) | (b1 << _S16)
                out[i + 5] = (a3 & _LOW) | (b3 << _S16)
                out[i + 6] = (a1 >> _S16) | (b1 & _HIGH)
                out[i + 7] = (a3 >> _S16) | (b3 & _HIGH)


@njit(cache=True, nogil=True)
def _from_pack_quantized(words, stride, reordered):
    """Split words [nt, rh, rl][kt, ch, cq1], which hold cq0 and c % 4 as GPTQ's do; four of them are a tile's row."""
    tiles_k, columns = reordered.shape
    length = 4 * tiles_k
    for nt in range(columns // 64):
        for rl in range(8):
            first = (16 * nt + rl) * stride
            row_a, row_b = words[first : first + length], words[first + 8 * stride : first + 8 * stride + length]
            for kt in range(tiles_k):
                out = reordered[kt]
                for c in range(4):  # ch, cq1
                    a, b = _encode(row_a[4 * kt + c]), _encode(row_b[4 * kt + c])
                    i = 64 * nt + 8 * rl + 4 * (c & 1) + (c >> 1)
                    out[i] = (a & _LOW) | (b << _S16)
                    out[i + 2] = (a >> _S16) | (b & _HIGH)


@njit(cache=True, nogil=True)
def _from_awq(words, stride, reordered):
    """Trade k1, k0 and rh, which number eight words [kt, ch, cq, k1, k0][nt, rh], for the rl that they hold."""
    tiles_k, columns = reordered.shape
    tiles_n = columns // 64
    for kt in range(tiles_k):
        out = reordered[kt]
        for c in range(8):  # ch, cq
            first = (32 * kt + 4 * c) * stride
            row0 = words[first : first + 2 * tiles_n]
            row1 = words[first + stride : first + stride + 2 * tiles_n]
            first += 2 * stride
            row2 = words[first : first + 2 * tiles_n]
            row3 = words[first + stride : first + stride + 2 * tiles_n]
            for nt in range(tiles_n):
                n = 2 * nt
                a0, a1, a2, a3 = _encode(row0[n]), _encode(row1[n]), _encode(row2[n]), _encode(row3[n])
                n += 1
                b0, b1, b2, b3 = _encode(row0[n]), _encode(row1[n]), _encode(row2[n]), _encode(row3[n])
                a0, a1 = _swap(a0, a1, _S4, _EVEN_4)
                a2, a3 = _swap(a2, a3, _S4, _EVEN_4)
                b0, b1 = _swap(b0, b1, _S4, _EVEN_4)
                b2, b3 = _swap(b2, b3, _S4, _EVEN_4)
                a0, a2 = _swap(a0, a2, _S8, _EVEN_8)
                a1, a3 = _swap(a1, a3, _S8, _EVEN_8)
                b0, b2 = _swap(b0, b2, _S8, _EVEN_8)
                b1, b3 = _swap(b1, b3, _S8, _EVEN_8)
                a0, b0 = _swap(a0, b0, _S16, _LOW)
                a1, b1 = _swap(a1, b1, _S16, _LOW)
                a2, b2 = _swap(a2, b2, _S16, _LOW)
                a3, b3 = _swap(a3, b3, _S16, _LOW)
                i = 64 * nt + 2 * (c & 3) + (c >> 2)
                out[i] = a0
                out[i + 8] = b0
                out[i + 16] = a1
                out[i + 24] = b1
                out[i + 32] = a2
                out[i + 40] = b2
                out[i + 48] = a3
                out[i + 56] = b3


@njit(cache=True, nogil=True)
def _to_pack_quantized(reordered, rows):
    """Join the halves that `_from_pack_quantized` splits, four words of a tile's row at a time."""
    tiles_k, columns = reordered.shape
    for nt in range(columns // 64):
        for rl in range(8):
            row_a, row_b = rows[16 * nt + rl], rows[16 * nt + rl + 8]
            for kt in range(tiles_k):
                tile = reordered[kt]
                for c in range(4):  # ch, cq1
                    i = 64 * nt + 8 * rl + 4 * (c & 1) + (c >> 1)
                    row_a[4 * kt + c] = _decode((tile[i] & _LOW) | (tile[i + 2] << _S16))
                    row_b[4 * kt + c] = _decode((tile[i] >> _S16) | (tile[i + 2] & _HIGH))


@njit(cache=True, nogil=True)
def _transpose_gptq(words, stride, rows):
    """Transpose, 16 columns at a time: a cache line of the source."""
    channels, columns = rows.shape
    for first_n in range(0, channels, 16):
        for k in range(columns):
            for n in range(first_n, min(first_n + 16, channels)):
                rows[n, k] = words[k * stride + n]


@njit(cache=True, nogil=True)
def _transpose_awq(words, stride, rows):
    """Trade k2, k1 and k0, which number eight words, for the (n0, n2, n1) that they hold."""
    channels, columns = rows.shape
    for first_k in range(0, columns, 16):  # 16 words of a row are a cache line
        for n in range(channels // 8):
            for k in range(first_k, min(first_k + 16, columns)):
                i = 8 * k * stride + n
                w0, w1, w2, w3 = words[i], words[i + stride], words[i + 2 * stride], words[i + 3 * stride]
                i += 4 * stride
                w4, w5, w6, w7 = words[i], words[i + stride], words[i + 2 * stride], words[i + 3 * stride]
                w0, w1 = _swap(w0, w1, _S4, _EVEN_4)
                w2, w3 = _swap(w2, w3, _S4, _EVEN_4)
                w4, w5 = _swap(w4, w5, _S4, _EVEN_4)
                w6, w7 = _swap(w6, w7, _S4, _EVEN_4)
                w0, w2 = _swap(w0, w2, _S8, _EVEN_8)
                w1, w3 = _swap(w1, w3, _S8, _EVEN_8)
                w4, w6 = _swap(w4, w6, _S8, _EVEN_8)
                w5, w7 = _swap(w5, w7, _S8, _EVEN_8)
                w0, w4 = _swap(w0, w4, _S16, _LOW)
                w1, w5 = _swap(w1, w5, _S16, _LOW)
                w2, w6 = _swap(w2, w6, _S16, _LOW)
                w3, w7 = _swap(w3, w7, _S16, _LOW)
                # (k2, k1, k0) now number (n0, n2, n1).
                rows[8 * n, k] = w0
                rows[8 * n + 1, k] = w4
                rows[8 * n + 2, k] = w1
                rows[8 * n + 3, k] = w5
                rows[8 * n + 4, k] = w2
                rows[8 * n + 5, k] = w6
                rows[8 * n + 6, k] = w3
                rows[8 * n + 7, k] = w7
