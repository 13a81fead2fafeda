"""FP8 group scales to the kernel's lookup tables in plain torch, on any device: one of 256 tables for each scale."""

from functools import cache

import torch

from convert_w4a8.fp8 import E4M3, to_e4m3


def expand_tables(group_scale: torch.Tensor) -> torch.Tensor:
    """Expand group scales float8_e4m3fn [G, N] to tables float8_e4m3fn [G, N, 8]; see `encoding/tables.py`."""
    index = group_scale.contiguous().view(torch.uint8).flatten().int()
    table = _products().to(group_scale.device).index_select(0, index)
    return table.view(E4M3).view(*group_scale.shape, 8)


@cache
def _products() -> torch.Tensor:
    """Return e4m3(f·v) for all 256 bytes f and v = −8 … −1, as int64 [256] of eight bytes each, on the host."""
    f = torch.arange(256, dtype=torch.uint8, device="cpu").view(E4M3).float()
    exact = f[:, None] * torch.arange(-8, 0, device="cpu")
    entries = torch.where(exact.isnan(), 0x7F, to_e4m3(exact).view(torch.uint8))
    return entries.view(torch.int64)[:, 0]
