"""The weights that a source's layer stands for: what every conversion is compared with."""

from collections.abc import Iterator

import torch

from convert_w4a8.encoding.packing import channel_ranges, unpack_codes
from convert_w4a8.linear import SYMMETRIC_ZERO, DenseLinear, W4Linear

FP8_BLOCK = 128
"""Rows and columns of the blocks of FP8 weights that share a scale, as DeepSeek has them."""
BLOCK_WEIGHTS = 1 << 23
"""The most weights of a block of output channels."""


def dequantize(w: W4Linear | DenseLinear) -> torch.Tensor:
    """Return (code − zero)·scale, or the weights of a dense layer, float32 [N, K]."""
    if isinstance(w, DenseLinear):
        return w.weight.to(torch.float32, copy=True)
    codes = unpack_codes(w.packed, w.packing)
    scales = w.scales.float().t()
    zeros = torch.full_like(scales, SYMMETRIC_ZERO) if w.zeros is None else w.zeros.t().float()
    k = codes.shape[1]
    if w.g_idx is not None or k % w.group_size:  # the last group may be short
        index = torch.arange(k, device=codes.device) // w.group_size if w.g_idx is None else w.g_idx.long()
        return codes.float().sub_(zeros[:, index]).mul_(scales[:, index])
    grouped = codes.view(codes.shape[0], -1, w.group_size).float()
    return grouped.sub_(zeros[..., None]).mul_(scales[..., None]).flatten(1)


def dequantize_fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return weights float8_e4m3fn [N, K] times the scales [⌈N/128⌉, ⌈K/128⌉] of their blocks, bfloat16 [N, K]."""
    n, k = weight.shape
    rows = scale.float().repeat_interleave(FP8_BLOCK, 0)[:n]
    return (weight.float() * rows.repeat_interleave(FP8_BLOCK, 1)[:, :k]).bfloat16()


def output_blocks(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of output channels such that a block's float32 weights stay small (32 MiB)."""
    return channel_ranges(n, k, 16, BLOCK_WEIGHTS)
