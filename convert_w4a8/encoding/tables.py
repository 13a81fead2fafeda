"""What the W4A8 kernel multiplies by: the FP8 tables of eight entries, and the weights and products they mean."""

from functools import cache

import torch

from convert_w4a8 import devices
from convert_w4a8.encoding import tables
from convert_w4a8.encoding.packing import to_rows, unpack_codes
from convert_w4a8.linear import GROUP_SIZE, Packing, W4A8Linear

_E4M3_MAX = 448.0


_MIN_TOKEN_SCALE = 1.0 / (448.0 * 512.0)
"""vLLM's floor for dynamic FP8 activation scales (csrc/quantization/w8a8/fp8, `min_scaling_factor`)."""


_CHUNK_WEIGHTS = 1 << 18
"""Weights decoded at a time: their int64 indices are 2 MiB, and stay in the cache."""


_GROUPS_AT_ONCE = 1 << 24
"""Groups whose tables are multiplied at a time: 256 MiB of products on a GPU, whatever the number of experts."""


def expand_tables(group_scale: torch.Tensor) -> torch.Tensor:
    """Expand group scales float8_e4m3fn [G, N] to the kernel's tables, float8_e4m3fn [G, N, 8].

    Entry j is e4m3(f·(j − 8)), saturated at ±448; a NaN scale gives NaN (0x7F) entries. These are the bytes of
    CUTLASS's `cutlass_pack_scale_fp8`.
    """
    kernels = devices.kernels("tables", group_scale.device) if group_scale.is_cuda else None
    expand = expand_tables_reference if kernels is None else kernels.expand_tables
    tables: torch.Tensor = expand(group_scale)
    return tables


def expand_tables_reference(group_scale: torch.Tensor) -> torch.Tensor:
    """Do what `expand_tables` does in torch operations, on any device: look up one of 256 tables."""
    index = group_scale.contiguous().view(torch.uint8).flatten().int()
    table = _products().to(group_scale.device).index_select(0, index)
    return table.view(torch.float8_e4m3fn).view(*group_scale.shape, 8)


def multiply_tables(group_scale: torch.Tensor) -> torch.Tensor:
    """Do what `expand_tables` does for scales up to ±56, whose entries do not saturate; larger ones may give NaN.

    For vLLM's start: CUDA loads the kernels of these operations in 0.3 ms, if it has not yet, those of a lookup in 11,
    and compiling ours takes longer still. Products of E4M3 numbers and codes are exact in bfloat16.
    """
    scales = group_scale.reshape(-1, 1)
    # Sent every time: what lies on the device while vLLM loads is lost when its sleep mode discards the weights.
    codes = torch.arange(-8, 0, dtype=torch.bfloat16, device="cpu").to(scales.device, non_blocking=True)
    tables = torch.empty(len(scales), 8, dtype=torch.float8_e4m3fn, device=scales.device)
    for start in range(0, len(scales), _GROUPS_AT_ONCE):
        part = slice(start, start + _GROUPS_AT_ONCE)
        tables[part] = scales[part].bfloat16() * codes
    return tables.view(*group_scale.shape, 8)


@cache
def _products() -> torch.Tensor:
    """Return e4m3(f·v) for all 256 bytes f and v = −8 … −1, as int64 [256] of eight bytes each, on the host."""
    f = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()
    exact = f[:, None] * torch.arange(-8, 0, device="cpu")
    entries = exact.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(exact.isnan(), 0x7F, entries).view(torch.int64)[:, 0]


def entries(w: W4A8Linear) -> torch.Tensor:
    """Return the kernel's tables of a layer, float8_e4m3fn [G, N, 8], stored or expanded from its group scales."""
    if w.lut is not None:
        return w.lut
    if w.group_scale is None:
        raise ValueError("a W4A8Linear needs group_scale or lut")
    return expand_tables(w.group_scale)


def decode(w: W4A8Linear) -> torch.Tensor:
    """Return the weights that the tensor core multiplies by, channel scale included, float32 [N, K]."""
    return _decode_entries(w).mul_(w.channel_scale[:, None])


def _decode_entries(w: W4A8Linear) -> torch.Tensor:
    """Return entry(g, n, code[n, k]) without the channel scale, float32 [N, K]."""
    tables = entries(w).float()
    groups, n, _ = tables.shape
    # By unsigned code u = v + 8: the stored entries for v = −8 … −1, 0, and for v = 1 … 7 the entry of −v with its sign
    # bit flipped, whatever that sign is.
    by_code = torch.cat((tables, torch.zeros_like(tables[..., :1]), -tables[..., 1:].flip(-1)), dim=-1)
    rows = to_rows(w.packed, w.packing)
    k = rows.shape[1] * 8
    weights = torch.empty(n, k, dtype=torch.float32, device=rows.device)
    step = max(1, _CHUNK_WEIGHTS // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        codes = unpack_codes(rows[part], Packing.ROWS).view(-1, groups, GROUP_SIZE).long()
        weights[part] = by_code[:, part].transpose(0, 1).gather(-1, codes).flatten(1)
    return weights


def quantize_tokens(act: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize activations [M, K] per token as vLLM does: (float8_e4m3fn [M, K], float32 [M, 1])."""
    x = act.float()
    # Division by a tensor is a division; by a number, CUDA's torch multiplies by the reciprocal.
    scale = (x.abs().amax(dim=1, keepdim=True) / x.new_full((), _E4M3_MAX)).clamp(min=_MIN_TOKEN_SCALE)
    return (x / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn), scale


def gemm(act: torch.Tensor, w: W4A8Linear) -> torch.Tensor:
    """Multiply bfloat16 [M, K] activations by a layer as `cutlass_w4a8_mm` does; bfloat16 [M, N]."""
    tokens, token_scale = quantize_tokens(act)
    accumulated = tokens.float() @ _decode_entries(w).t()
    return (token_scale * (w.channel_scale * accumulated)).bfloat16()


def count_clipped(w: W4A8Linear) -> int:
    """Count the table entries that are NaN, or that saturate because 8·|group scale| is beyond FP8's 448."""
    clipped = int(tables.entries(w).float().isnan().sum())
    if w.group_scale is not None:
        clipped += int((w.group_scale.float().abs() * 8 > 448).sum())
    return clipped
