"""Memory that shows where a kernel writes."""

from collections.abc import Callable

import pytest
import torch

_SENTINEL = 0x5A
_MARGIN = 4096
"""Elements before and behind each tensor."""


@pytest.fixture
def assert_untouched(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Give `torch.empty` memory full of a sentinel, within margins; return what checks that these still are so."""
    margins: list[torch.Tensor] = []

    def poisoned(
        *shape: int | tuple[int, ...], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        size = torch.Size(length for part in shape for length in (part if isinstance(part, tuple) else (part,)))
        memory = torch.full((size.numel() + 2 * _MARGIN,), _SENTINEL, dtype=dtype, device=device)
        margins.extend((memory[:_MARGIN], memory[-_MARGIN:]))
        return memory[_MARGIN:-_MARGIN].view(size)

    def check() -> None:
        assert margins
        assert all((margin == _SENTINEL).all() for margin in margins)

    monkeypatch.setattr(torch, "empty", poisoned)
    return check
