"""Values that are no numbers, found in a tensor's bytes."""

from collections.abc import Mapping

import torch

_FLOATS: Mapping[str, tuple[str, str, int, bool]] = {
    "F8_E4M3": ("int8", "uint8", 0x7F, False),
    "F8_E5M2": ("int8", "uint8", 0x7C, True),
    "F16": ("int16", "uint16", 0x7C00, True),
    "BF16": ("int16", "uint16", 0x7F80, True),
    "F32": ("int32", "uint32", 0x7F80_0000, True),
    "F64": ("int64", "uint64", 0x7FF0_0000_0000_0000, True),
}
"""By safetensors dtype name: the integers of its size (NumPy), the bits of the least magnitude that is no number, and
whether that is infinity (IEEE 754; OCP 8-bit floating point for F8). What is greater is NaN."""


def not_finite(data: torch.Tensor, dtype: str) -> tuple[bool, int]:
    """Return whether bytes, uint8 [n], hold NaN as values of a safetensors dtype, and how many infinities.

    Without the sign, values are in the order of their bits as integers. So two maxima tell whether there is anything:
    as signed integers, that of the values ≥ 0; as unsigned ones, that of the others. This takes less time than copying.
    """
    if dtype not in _FLOATS or not len(data):
        return False, 0
    signed, unsigned, least, is_infinity = _FLOATS[dtype]
    bits = data.numpy().view(unsigned)
    magnitude = (1 << (8 * bits.itemsize - 1)) - 1
    if max(int(bits.view(signed).max()), int(bits.max()) & magnitude) < least:
        return False, 0
    magnitudes = bits & magnitude
    infinities = int((magnitudes == least).sum()) if is_infinity else 0
    return int((magnitudes >= least).sum()) > infinities, infinities
