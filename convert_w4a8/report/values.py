"""Tensors that are not quantized and hold values that are no numbers."""

from collections.abc import Iterable

import torch

from convert_w4a8.checkpoint.safetensors_file import TensorInfo, read_into
from convert_w4a8.checkpoint.values import not_finite
from convert_w4a8.conversion.advice import infinity_warnings

_CHUNK_BYTES = 8 << 20


def value_warnings(tensors: Iterable[TensorInfo]) -> tuple[str, ...]:
    """Return what there is to say of the values of some tensors, which are read.

    Raises:
        ConvertError: one cannot be read.

    """
    with_nan: list[str] = []
    infinities: dict[str, int] = {}
    for info in tensors:
        has_nan, count = _not_finite(info)
        if has_nan:
            with_nan.append(info.name)
        if count:
            infinities[info.name] = count
    others = f" ({len(with_nan)} such tensors)" if len(with_nan) > 1 else ""
    found = (f"{with_nan[0]} holds NaN{others}: the checkpoint is damaged",) if with_nan else ()
    return (*found, *infinity_warnings(infinities))


def _not_finite(info: TensorInfo) -> tuple[bool, int]:
    has_nan, infinities = False, 0
    for offset in range(0, info.nbytes, _CHUNK_BYTES):
        piece = torch.empty(min(_CHUNK_BYTES, info.nbytes - offset), dtype=torch.uint8)
        read_into(info, piece, offset)
        found = not_finite(piece, info.dtype)
        has_nan, infinities = has_nan or found[0], infinities + found[1]
    return has_nan, infinities
