"""What the W4A8 kernel multiplies by: the FP8 tables of eight entries, and the weights and products they mean."""

import torch

from convert_w4a8 import devices
from convert_w4a8.encoding.dequantize import dequantize
from convert_w4a8.encoding.packing import to_pack_quantized, unpack_codes
from convert_w4a8.fp8 import quantize_tokens
from convert_w4a8.linear import GROUP_SIZE, Packing, ServedLinear, W4A8Linear

_CHUNK_WEIGHTS = 1 << 18
"""Weights decoded at a time: their int64 indices are 2 MiB, and stay in the cache."""


DISTINCT = 256
"""Tables that a byte tells apart."""
_GROUPS_AT_ONCE = 1 << 24
"""Groups whose tables are multiplied at a time: 256 MiB of products on a GPU, whatever the number of experts."""


def expand_tables(group_scale: torch.Tensor) -> torch.Tensor:
    """Expand group scales float8_e4m3fn [G, N] to the kernel's tables, float8_e4m3fn [G, N, 8].

    Entry j is e4m3(f·(j − 8)), saturated at ±448; a NaN scale gives NaN (0x7F) entries. These are the bytes of
    CUTLASS's `cutlass_pack_scale_fp8`.
    """
    return devices.tables(group_scale.device).expand_tables(group_scale)


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


def index_scales(group_scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `multiply_tables` gives as indices, uint8 [G, N], into distinct tables, float8_e4m3fn [256, 8].

    The indices are the bytes of the scales, in their memory.
    """
    every = torch.arange(DISTINCT, dtype=torch.uint8, device="cpu").to(group_scale.device, non_blocking=True)
    return group_scale.view(torch.uint8), multiply_tables(every.view(torch.float8_e4m3fn))


def index_tables(tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return tables [G, N, 8] as indices, uint8 [G, N], into distinct ones, float8_e4m3fn [256, 8].

    None where more than 256 are distinct.
    """
    values, index = torch.unique(tables.contiguous().view(torch.int64), return_inverse=True)
    if len(values) > DISTINCT:
        return None
    distinct = torch.zeros(DISTINCT, dtype=torch.int64, device=tables.device)
    distinct[: len(values)] = values
    return index.to(torch.uint8).view(tables.shape[:2]), distinct.view(-1, 1).view(torch.float8_e4m3fn)


def table_entries(w: W4A8Linear) -> torch.Tensor:
    """Return the kernel's tables of a layer, float8_e4m3fn [G, N, 8], stored or expanded from its group scales."""
    if w.entries is not None:
        return w.entries
    if w.group_scale is None:
        raise ValueError("a W4A8Linear needs group_scale or entries")
    return expand_tables(w.group_scale)


def decode(w: ServedLinear) -> torch.Tensor:
    """Return the weights that the tensor core multiplies by, channel scale included, float32 [N, K]."""
    if not isinstance(w, W4A8Linear):
        return dequantize(w)
    return _decode_entries(w).mul_(w.channel_scale[:, None])


def _decode_entries(w: W4A8Linear) -> torch.Tensor:
    """Return entry(g, n, code[n, k]) without the channel scale, float32 [N, K]."""
    tables = table_entries(w).float()
    groups, n, _ = tables.shape
    # By unsigned code u = v + 8: the stored entries for v = −8 … −1, 0, and for v = 1 … 7 the entry of −v with its sign
    # bit flipped, whatever that sign is.
    by_code = torch.cat((tables, torch.zeros_like(tables[..., :1]), -tables[..., 1:].flip(-1)), dim=-1)
    rows = to_pack_quantized(w.packed, w.packing)
    k = rows.shape[1] * 8
    weights = torch.empty(n, k, dtype=torch.float32, device=rows.device)
    step = max(1, _CHUNK_WEIGHTS // k)
    for start in range(0, n, step):
        part = slice(start, start + step)
        codes = unpack_codes(rows[part], Packing.PACK_QUANTIZED).view(-1, groups, GROUP_SIZE).long()
        weights[part] = by_code[:, part].transpose(0, 1).gather(-1, codes).flatten(1)
    return weights


def gemm(act: torch.Tensor, w: W4A8Linear) -> torch.Tensor:
    """Multiply bfloat16 [M, K] activations by a layer as `cutlass_w4a8_mm` does; bfloat16 [M, N]."""
    tokens, token_scale = quantize_tokens(act)
    accumulated = tokens.float() @ _decode_entries(w).t()
    return (token_scale * (w.channel_scale * accumulated)).bfloat16()


def count_clipped(w: ServedLinear) -> int:
    """Count the table entries that are NaN, or that saturate because 8·|group scale| is beyond FP8's 448.

    Where there are no tables, the scales that are no numbers.
    """
    if not isinstance(w, W4A8Linear):
        return int((~torch.isfinite(w.scales)).sum())
    clipped = int(table_entries(w).float().isnan().sum())
    if w.group_scale is not None:
        clipped += int((w.group_scale.float().abs() * 8 > 448).sum())
    return clipped
