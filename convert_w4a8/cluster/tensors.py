"""Calls and results with tensors, in parts: their bytes go from one process to another as they are, copied once.

What a product gives depends, in its last bits, on the strides of its factors; so these are kept.
"""

import ctypes
import io
import pickle
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch

from convert_w4a8.devices import locked_memory

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Packed:
    """A value whose tensors lie beside it. data: its pickle. parts: the bytes of its tensors, uint8 each.

    A pickle of it can leave the parts out (protocol 5), as Ray does. They may be the memory of a tensor on a CPU, which
    has to stay as it is as long as they are needed.
    """

    data: bytes
    parts: list[Bytes]

    @property
    def nbytes(self) -> int:
        """How many bytes are sent."""
        return len(self.data) + sum(part.nbytes for part in self.parts)


_unpacking: ContextVar[tuple[torch.device, list[Bytes]]] = ContextVar("unpacking")


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=5)
        self.tensors: list[torch.Tensor] = []
        """The bytes of tensors, uint8 [n] each, on whatever device."""

    def reducer_override(self, value: Any) -> Any:
        """Take tensors as their bytes."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        plain = value.detach().permute(order).contiguous()
        self.tensors.append(plain.reshape(-1).view(torch.uint8))
        return _tensor, (len(self.tensors) - 1, value.dtype, tuple(plain.shape), order)


def _on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return bytes uint8 [n] in this process's memory; of a GPU in one locked piece, that can be used again."""
    ends = list(accumulate(len(data) if data.is_cuda else 0 for data in tensors))
    if not ends or not ends[-1]:
        return tensors
    memory = locked_memory(ends[-1], torch.uint8)
    if memory is None:
        memory = torch.empty(ends[-1], dtype=torch.uint8)
    parts = (memory[start:end] for start, end in pairwise([0, *ends]))
    return [part.copy_(data) if data.is_cuda else data for data, part in zip(tensors, parts, strict=True)]


def _tensor(part: int, dtype: torch.dtype, shape: Any, order: list[int]) -> torch.Tensor:
    device, parts = _unpacking.get()
    plain = torch.empty(shape, dtype=dtype, device=device)
    plain.view(-1).view(torch.uint8).copy_(_as_tensor(parts[part]))
    return plain.permute([order.index(dim) for dim in range(len(order))])


def _as_tensor(part: Bytes) -> torch.Tensor:
    """Return bytes as a tensor uint8 [n] in the same memory, which must not be written to: Ray's is read-only.

    torch has no tensors like that, and warns of an array that is.
    """
    if not len(part):
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_uint8 * len(part)).from_address(part.ctypes.data), dtype=torch.uint8)


def packed(value: Any) -> Packed:
    """Return a value that holds tensors in parts."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return Packed(file.getvalue(), [data.numpy() for data in _on_host(pickler.tensors)])


def unpacked(value: Packed, device: torch.device) -> Any:
    """Return a value from its parts, which come from the driver or one of its tasks; its tensors lie on a device."""
    token = _unpacking.set((device, value.parts))
    try:
        return pickle.loads(value.data)  # noqa: S301  (Ray unpickles what it brings, too)
    finally:
        _unpacking.reset(token)
