"""Quantized linear layers with known weights, and the packing of their codes, all in plain numpy.

Nothing here uses the package under test, so that what it decodes can be compared with something that it did
not write. N = out_features, K = in_features, G = groups along K.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Nibble i of an AWQ word belongs to column 8·word + AWQ_ORDER[i]."""

BORROW = {4: 0x11111111, 8: 0x01010101}
"""What a GPTQ v1 file subtracts from each packed word of zero-points, with borrow, by bits."""


@dataclass(frozen=True)
class Scheme:
    """How one layer is quantized."""

    group_size: int = 128
    """Input channels that share a scale; −1 for all of them."""
    symmetric: bool = True
    """Whether every zero-point is the middle code."""
    says_asymmetric: bool = False
    """Whether the file speaks of zero-points although every one is the middle code."""
    zero: int | None = None
    """What every zero-point is, if they are all the same without being the middle code; for `symmetric=False`."""
    signed: bool = False
    """Whether a group's largest weight has the code for −8, whatever its sign: half of the scales are negative."""
    act_order: bool = False
    """Whether the input channels are scattered over the groups."""
    bits: int = 4
    scale_dtype: torch.dtype = torch.float16

    @property
    def claims_symmetric(self) -> bool:
        """What the file says of itself."""
        return self.symmetric and not self.says_asymmetric


@dataclass(frozen=True)
class Layer:
    """A layer as it was meant: w[n, k] = (codes[n, k] − zeros[g, n])·scales[g, n] with g = groups[k].

    codes: uint8 [N, K], unsigned. zeros: uint8 [G, N]. scales: [G, N] in the stored dtype. groups: int32 [K].
    """

    scheme: Scheme
    codes: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: torch.Tensor
    groups: NDArray[np.int32]

    @property
    def weight(self) -> NDArray[np.float64]:
        """The dequantized weight, float64 [N, K]."""
        return dequantize(self.codes, self.zeros, self.scales, self.groups)


def dequantize(
    codes: NDArray[np.uint8],
    zeros: NDArray[np.uint8],
    scales: torch.Tensor,
    groups: NDArray[np.int32],
) -> NDArray[np.float64]:
    """Return (codes[n, k] − zeros[g, n])·scales[g, n] with g = groups[k], float64 [N, K]."""
    per_group: NDArray[np.float64] = scales.double().numpy()
    steps: NDArray[np.float64] = codes.astype(np.float64) - zeros.astype(np.float64)[groups].T
    return steps * per_group[groups].T


def quantize(rng: np.random.Generator, n: int, k: int, scheme: Scheme) -> Layer:
    """Make a random layer [n, k] and round it to nearest.

    Channels differ in size and, where the scheme is asymmetric, in mean: every fourth is positive throughout,
    which gives a zero-point of 0, and every fourth negative, which gives the largest one; not where `zero` is set.
    """
    size = k if scheme.group_size == -1 else scheme.group_size
    groups = (np.arange(k) // size).astype(np.int32)
    if scheme.act_order:
        groups = rng.permutation(groups)
    count = int(groups.max()) + 1
    top = 2**scheme.bits - 1
    weight = rng.standard_normal((n, k)) * np.exp(0.5 * rng.standard_normal((n, 1))) / np.sqrt(k)
    even = scheme.symmetric or scheme.zero is not None
    if not even:
        spread = np.abs(weight).max(axis=1, keepdims=True)
        weight += spread * 1.01 * np.resize([1.0, 0.1, -1.0, -0.2], n)[:, None]
    scales = np.empty((count, n))
    zeros = np.empty((count, n), dtype=np.uint8)
    for group in range(count):
        part = weight[:, groups == group]
        if scheme.signed:
            largest = np.abs(part).argmax(axis=1)[:, None]
            scales[group] = np.take_along_axis(part, largest, axis=1)[:, 0] / -(top // 2 + 1)
            zeros[group] = top // 2 + 1
        elif even:
            scales[group] = np.abs(part).max(axis=1) / (top / 2)
            zeros[group] = (top + 1) // 2 if scheme.zero is None else scheme.zero
        else:
            low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
            scales[group] = (high - low) / top
            zeros[group] = np.clip(np.round(-low / scales[group]), 0, top)
    stored = torch.from_numpy(scales).to(scheme.scale_dtype)
    steps = np.round(weight / stored.double().numpy()[groups].T)
    codes = np.clip(steps + zeros.astype(np.float64)[groups].T, 0, top).astype(np.uint8)
    return Layer(scheme, codes, zeros, stored, groups)


def words(codes: NDArray[np.uint8], bits: int = 4) -> NDArray[np.int32]:
    """Pack the last axis, of 32 / bits codes, into one int32 each; the first code goes into the lowest bits."""
    packed = np.zeros(codes.shape[:-1], dtype=np.uint32)
    for i in range(32 // bits):
        packed |= codes[..., i].astype(np.uint32) << np.uint32(bits * i)
    return packed.view(np.int32)


def nibbles(packed: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Invert `words` for 4 bits: [...] int32 → [..., 8] uint8."""
    unsigned = packed.view(np.uint32)
    return np.stack([(unsigned >> np.uint32(4 * i)) & 15 for i in range(8)], axis=-1).astype(np.uint8)


def pack_columns(matrix: NDArray[np.uint8], bits: int = 4) -> NDArray[np.int32]:
    """Pack [rows, columns] along its columns, in order: [rows, columns·bits/32]."""
    rows, columns = matrix.shape
    return words(matrix.reshape(rows, columns * bits // 32, 32 // bits), bits)


def pack_codes(matrix: NDArray[np.uint8], bits: int = 4) -> NDArray[np.int32]:
    """Pack [rows, columns] along its rows, in order: [rows·bits/32, columns]."""
    return np.ascontiguousarray(pack_columns(np.ascontiguousarray(matrix.T), bits).T)


def pack_columns_awq(matrix: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Pack [rows, columns] along its columns in AWQ's order: [rows, columns/8]."""
    rows, columns = matrix.shape
    return words(matrix.reshape(rows, columns // 8, 8)[..., AWQ_ORDER])


def unpack_columns(packed: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Invert `pack_columns`: [rows, columns/8] → [rows, columns]."""
    return nibbles(packed).reshape(packed.shape[0], -1)


def unpack_rows(packed: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Invert `pack_codes`: [rows/8, columns] → [rows, columns]."""
    return np.ascontiguousarray(unpack_columns(np.ascontiguousarray(packed.T)).T)


def unpack_columns_awq(packed: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Invert `pack_columns_awq`: [rows, columns/8] → [rows, columns]."""
    return nibbles(packed)[..., np.argsort(AWQ_ORDER)].reshape(packed.shape[0], -1)
