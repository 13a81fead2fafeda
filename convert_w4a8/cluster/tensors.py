"""Calls and results with tensors, as bytes: on another node they lie in memory as they do here.

What a product gives depends, in its last bits, on the strides of its factors; so these are kept.
"""

import io
import pickle
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch

_device: ContextVar[torch.device] = ContextVar("device")


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Take tensors as their bytes, from whatever device."""
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        order = sorted(range(value.dim()), key=value.stride, reverse=True)
        plain = value.detach().permute(order).cpu().contiguous()
        return _tensor, (plain.reshape(-1).view(torch.uint8).numpy(), value.dtype, tuple(plain.shape), order)


def _tensor(data: "np.ndarray[Any, np.dtype[np.uint8]]", dtype: torch.dtype, shape: Any, order: list[int]) -> Any:
    plain = torch.empty(shape, dtype=dtype, device=_device.get())
    plain.view(-1).view(torch.uint8).copy_(torch.from_numpy(data))
    return plain.permute([order.index(dim) for dim in range(len(order))])


def packed(value: Any) -> bytes:
    """Return a value that holds tensors as bytes."""
    file = io.BytesIO()
    _Pickler(file, protocol=5).dump(value)
    return file.getvalue()


def unpacked(data: bytes, device: torch.device) -> Any:
    """Return a value from its bytes, which come from the driver or one of its tasks; its tensors lie on a device."""
    token = _device.set(device)
    try:
        return pickle.loads(data)  # noqa: S301  (Ray unpickles what it brings, too)
    finally:
        _device.reset(token)
