"""What the GEMM over the LUT layout computes, in torch."""

import torch


def weights(packed: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """Return the FP8 weights, float32 [N, K], of codes int32 [K/32, 4·N] and tables float8_e4m3fn [K/128, N, 8].

    Nibble 16·thread + value of a tile is element (n, k) with n = thread // 4 + 8·(value // 4 % 2) and
    k = 4·(thread % 4) + value % 4 + 16·(value // 8) (CUTLASS's compute_memory_reordering_atom). A nibble with its top
    bit set is an entry of the table, one without it the same with the other sign, and 0 is 0.
    """
    n, k = packed.shape[1] // 4, packed.shape[0] * 32
    low_first = packed.contiguous().view(torch.uint8).view(k // 32, n // 16, 8, 4, 8)
    nibbles = torch.stack((low_first & 15, low_first >> 4), -1).view(k // 32, n // 16, 8, 4, 2, 2, 4)
    codes = nibbles.permute(1, 5, 2, 0, 4, 3, 6).reshape(n, k // 128, 128).transpose(0, 1).long()
    entries = tables.float()
    by_code = torch.cat((torch.zeros_like(entries[..., :1]), -entries[..., 1:], entries), dim=-1)
    return by_code.gather(-1, codes).transpose(0, 1).reshape(n, k)


def gemm(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
) -> torch.Tensor:
    """Multiply FP8 activations by a layer in the LUT layout; see `operations.Gemm`."""
    total = tokens.float() @ weights(packed, tables).t()
    return (total * channel_scale * token_scale).bfloat16()
