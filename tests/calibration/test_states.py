"""Hidden states between host and device: memory that is locked for a GPU, in parts, where there is one."""

from itertools import pairwise
from typing import Any

import pytest
import torch

from convert_w4a8.calibration import states
from convert_w4a8.calibration.states import _Locked


def test_locked_memory_is_cut_into_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are powers of two, as CUDA would make them, each twice the last up to a limit; parts do not overlap."""
    pieces = list[int]()
    real = torch.empty

    def empty(count: int, *, dtype: torch.dtype, pin_memory: bool = False) -> torch.Tensor:
        pieces.extend([count] * pin_memory)
        return real(count, dtype=dtype)

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(states, "_PIECE", 64)
    locked = _Locked()
    parts = [locked.take(count) for count in (5, 5, 5, 40, 40, 64, 0)]
    assert [None if part is None else len(part) for part in parts] == [5, 5, 5, 40, 40, 64, 0]
    assert pieces == [8, 16, 64, 64, 64]
    places = sorted((part.data_ptr(), part.nbytes) for part in parts if part is not None and len(part))
    assert all(start + size <= after for (start, size), (after, _) in pairwise(places))
    assert locked.take(65) is None


def test_without_locked_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is other memory."""
    real = torch.empty

    def refuse(*args: Any, pin_memory: bool = False, **keywords: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return real(*args, **keywords)

    monkeypatch.setattr(torch, "empty", refuse)
    assert _Locked().take(5) is None
