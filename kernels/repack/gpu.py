"""AWQ, GPTQ or compressed-tensors codes into the kernel's order, or compressed-tensors', in one pass on a GPU.

A program takes a block of BLOCK_N x BLOCK_K codes. It loads words along the input's contiguous axis, with the partners
of every bit trade in the same lane and register slot of separate loads: so the trades and the encoding are plain
arithmetic on registers. Then one permutation of whole words, which Triton takes through shared memory, puts the words
into the order of the output, where the n-tiles of a block are contiguous.

`encoding/lut_layout.py` has the bit diagram and the names of the axes (kt, nt, rl, rh, ch, cq).
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from convert_w4a8.kernels.fp8 import OPTIONS
from convert_w4a8.kernels.repack import reference
from convert_w4a8.kernels.repack.reference import restore
from convert_w4a8.linear import Packing
from convert_w4a8.lut_format import reordered_shape

__all__ = ["reorder", "restore", "to_pack_quantized"]


@dataclass(frozen=True)
class Block:
    """How the work is cut: codes of a program (powers of two, n ≥ 16, k ≥ 32), its warps, and who comes next."""

    n: int
    k: int
    warps: int
    k_first: bool = False
    """Whether programs with consecutive numbers advance along k rather than n."""


DEFAULT_BLOCKS = {
    Packing.GPTQ: Block(n=128, k=128, warps=4),
    Packing.AWQ: Block(n=256, k=64, warps=4),
    Packing.PACK_QUANTIZED: Block(n=64, k=256, warps=4, k_first=True),
}
"""128 contiguous bytes or more a read, 64 bytes a thread in flight."""
PACK_QUANTIZED_BLOCKS = {Packing.GPTQ: Block(n=64, k=256, warps=4), Packing.AWQ: Block(n=256, k=128, warps=4)}
"""The same for `to_pack_quantized`; 64 contiguous bytes or more a write."""


def reorder(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Encode and reorder the int32 codes of an [N, K] layer, in any packing, into the kernel's order [K/32, 4·N].

    Raises ValueError unless N % 16 == 0 and K % 32 == 0.
    """
    block = DEFAULT_BLOCKS.get(packing)
    return reference.reorder(packed, packing) if block is None else reorder_by(packed, packing, block)


def reorder_by(packed: torch.Tensor, packing: Packing, block: Block) -> torch.Tensor:
    """Do what `reorder` does, with the work cut in a given way."""
    n, k = packing.shape_nk(packed.shape)
    lut = torch.empty(reordered_shape(n, k), dtype=torch.int32, device=packed.device)
    packed = packed.contiguous()
    grid = (triton.cdiv(n, block.n), triton.cdiv(k, block.k))
    with torch.cuda.device_of(packed):
        _reorder_kernel[grid[::-1] if block.k_first else grid](
            packed,
            lut,
            n,
            k,
            packed.shape[1],
            PACKING=packing.name,
            K_FIRST=block.k_first,
            BLOCK_N=block.n,
            BLOCK_K=block.k,
            num_warps=block.warps,
            **OPTIONS,
        )
    return lut


def to_pack_quantized(packed: torch.Tensor, packing: Packing) -> torch.Tensor:
    """Return the codes of an [N, K] layer in another packing as compressed-tensors packs them, int32 [N, K/8]."""
    if packing not in PACK_QUANTIZED_BLOCKS:
        return reference.to_pack_quantized(packed, packing)
    n, k = packing.shape_nk(packed.shape)
    rows = torch.empty(n, k // 8, dtype=torch.int32, device=packed.device)
    if packed.stride(1) != 1:
        packed = packed.contiguous()
    block = PACK_QUANTIZED_BLOCKS[packing]
    with torch.cuda.device_of(packed):
        _pack_kernel[(triton.cdiv(n, block.n), triton.cdiv(k, block.k))](
            packed,
            rows,
            n,
            k,
            packed.stride(0),
            PACKING=packing.name,
            BLOCK_N=block.n,
            BLOCK_K=block.k,
            num_warps=block.warps,
            **OPTIONS,
        )
    return rows


@triton.jit
def _reorder_kernel(
    packed,
    lut,
    N,
    K,
    stride,
    PACKING: tl.constexpr,
    K_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Offsets of blocks are int64; offsets within a block fit int32 (256 rows of 8 Mi words).
    n0 = tl.program_id(1 if K_FIRST else 0).to(tl.int64) * BLOCK_N
    k0 = tl.program_id(0 if K_FIRST else 1).to(tl.int64) * BLOCK_K
    if PACKING == "gptq":
        words = _from_gptq(packed, K, stride, n0, k0, BLOCK_N, BLOCK_K)
    elif PACKING == "awq":
        words = _from_awq(packed, K, stride, n0, k0, BLOCK_N, BLOCK_K)
    else:
        words = _from_rows(packed, N, stride, n0, k0, BLOCK_N, BLOCK_K)

    kt = tl.arange(0, BLOCK_K // 32)[:, None]
    column = tl.arange(0, BLOCK_N * 4)[None, :]
    words = tl.reshape(words, (BLOCK_K // 32, BLOCK_N * 4)).to(tl.int32, bitcast=True)
    inside = (kt < (K - k0) // 32) & (column < (N - n0) * 4)
    tl.store(lut + (k0 // 32 * N + n0) * 4 + (kt * (N * 4) + column), words, mask=inside)


@triton.jit
def _from_gptq(packed, K, stride, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load [kt·ch·cq1, nt·rl] words of cq0, once for each rh; return words [kt, nt·rl, cq1, cq0, ch] of rh."""
    kw = tl.arange(0, BLOCK_K // 8)[:, None]
    channel = tl.arange(0, BLOCK_N // 2)[None, :]
    n = channel // 8 * 16 + channel % 8
    inside = (kw < (K - k0) // 8) & (channel // 8 < (stride - n0) // 16)  # stride is N
    offsets = kw * stride + n
    base = packed + k0 // 8 * stride + n0
    low, high = _pair(_load_encoded(base, offsets, inside), _load_encoded(base + 8, offsets, inside))
    words = tl.reshape(tl.join(low, high), (BLOCK_K // 32, 2, 2, BLOCK_N // 2, 2))
    return tl.permute(words, (0, 3, 2, 4, 1))


@triton.jit
def _from_rows(packed, N, stride, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load [nt·rl, kt·ch·cq1] words of cq0, once for each rh; return words [kt, nt·rl, cq1, cq0, ch] of rh."""
    channel = tl.arange(0, BLOCK_N // 2)[:, None]
    kw = tl.arange(0, BLOCK_K // 8)[None, :]
    n = channel // 8 * 16 + channel % 8
    inside = (channel // 8 < (N - n0) // 16) & (kw < stride - k0 // 8)  # stride is K / 8
    offsets = n * stride + kw
    base = packed + n0 * stride + k0 // 8
    low, high = _pair(_load_encoded(base, offsets, inside), _load_encoded(base + 8 * stride, offsets, inside))
    words = tl.reshape(tl.join(low, high), (BLOCK_N // 2, BLOCK_K // 32, 2, 2, 2))
    return tl.permute(words, (1, 0, 3, 4, 2))


@triton.jit
def _from_awq(packed, K, stride, n0, k0, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load [kt·ch·cq, nt·rh] words of rl, once for each of four k; return words [kt, nt, rl, cq, ch] of rh."""
    k = tl.arange(0, BLOCK_K // 4)[:, None] * 4
    column = tl.arange(0, BLOCK_N // 8)[None, :]
    inside = (k < K - k0) & (column < stride - n0 // 8)  # stride is N / 8
    offsets = k * stride + column
    base = packed + k0 * stride + n0 // 8
    # A word's nibble index is (n0, n2, n1), highest bit first. Trade n1 and n2 for the two bits of k % 4.
    x0 = _load_encoded(base, offsets, inside)
    x1 = _load_encoded(base + stride, offsets, inside)
    x2 = _load_encoded(base + 2 * stride, offsets, inside)
    x3 = _load_encoded(base + 3 * stride, offsets, inside)
    x0, x1 = _swap(x0, x1, 4, 0x0F0F0F0F)
    x2, x3 = _swap(x2, x3, 4, 0x0F0F0F0F)
    x0, x2 = _swap(x0, x2, 8, 0x00FF00FF)
    x1, x3 = _swap(x1, x3, 8, 0x00FF00FF)
    # Now x{2·n2 + n1} holds (n0, k % 4); its neighbours along the row are the two rh, which n0 is traded for.
    n2_0 = tl.join(_pair_neighbours(x0, BLOCK_N, BLOCK_K), _pair_neighbours(x1, BLOCK_N, BLOCK_K))
    n2_1 = tl.join(_pair_neighbours(x2, BLOCK_N, BLOCK_K), _pair_neighbours(x3, BLOCK_N, BLOCK_K))
    words = tl.reshape(tl.join(n2_0, n2_1), (BLOCK_K // 32, 2, 4, BLOCK_N // 16, 2, 2, 2))
    return tl.permute(words, (0, 3, 6, 5, 4, 2, 1))


@triton.jit
def _pack_kernel(packed, rows, N, K, stride, PACKING: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n0 = tl.program_id(0).to(tl.int64) * BLOCK_N
    k0 = tl.program_id(1).to(tl.int64) * BLOCK_K
    kw = tl.arange(0, BLOCK_K // 8)
    if PACKING == "gptq":
        column = tl.arange(0, BLOCK_N)[None, :]
        inside = (kw[:, None] < (K - k0) // 8) & (column < N - n0)
        base = packed + k0 // 8 * stride + n0
        words = tl.permute(tl.load(base + kw[:, None] * stride + column, mask=inside, other=0), (1, 0))
    else:
        column = tl.arange(0, BLOCK_N // 8)[None, :]
        inside = (kw[:, None] < (K - k0) // 8) & (column < (N - n0) // 8)
        offsets = kw[:, None] * 8 * stride + column
        base = packed + k0 * stride + n0 // 8
        words = tl.reshape(_awq_block_to_rows(base, stride, offsets, inside), (BLOCK_N, BLOCK_K // 8))
    n = tl.arange(0, BLOCK_N)[:, None]
    inside = (n < N - n0) & (kw[None, :] < (K - k0) // 8)
    tl.store(rows + (n0 * (K // 8) + k0 // 8) + (n.to(tl.int64) * (K // 8) + kw[None, :]), words, mask=inside)


@triton.jit
def _awq_block_to_rows(base, stride, offsets, inside):
    """Load [k / 8, n / 8] words of (n0, n2, n1) for each of eight k; return words [n / 8, n2, n1, n0, k / 8] of k."""
    x0 = tl.load(base + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    x1 = tl.load(base + stride + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    x2 = tl.load(base + 2 * stride + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    x3 = tl.load(base + 3 * stride + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    x4 = tl.load(base + 4 * stride + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    x5 = tl.load(base + 5 * stride + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    x6 = tl.load(base + 6 * stride + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    x7 = tl.load(base + 7 * stride + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    # Trade n1 for k0, n2 for k1, n0 for k2: then x{4·n0 + 2·n2 + n1} holds the eight k in order.
    x0, x1 = _swap(x0, x1, 4, 0x0F0F0F0F)
    x2, x3 = _swap(x2, x3, 4, 0x0F0F0F0F)
    x4, x5 = _swap(x4, x5, 4, 0x0F0F0F0F)
    x6, x7 = _swap(x6, x7, 4, 0x0F0F0F0F)
    x0, x2 = _swap(x0, x2, 8, 0x00FF00FF)
    x1, x3 = _swap(x1, x3, 8, 0x00FF00FF)
    x4, x6 = _swap(x4, x6, 8, 0x00FF00FF)
    x5, x7 = _swap(x5, x7, 8, 0x00FF00FF)
    x0, x4 = _swap(x0, x4, 16, 0x0000FFFF)
    x1, x5 = _swap(x1, x5, 16, 0x0000FFFF)
    x2, x6 = _swap(x2, x6, 16, 0x0000FFFF)
    x3, x7 = _swap(x3, x7, 16, 0x0000FFFF)
    n0_0 = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    n0_1 = tl.join(tl.join(x4, x6), tl.join(x5, x7))
    words = tl.join(n0_0, n0_1).to(tl.int32, bitcast=True)
    return tl.permute(words, (1, 2, 3, 4, 0))


@triton.jit
def _pair_neighbours(x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """[k, nt·rh] words of n0 → [k, nt, n0] words of rh."""
    even, odd = tl.split(tl.reshape(x, (BLOCK_K // 4, BLOCK_N // 16, 2)))
    low, high = _pair(even, odd)
    return tl.join(low, high)


@triton.jit
def _load_encoded(base, offsets, inside):
    """Load words of unsigned codes u = v + 8 and turn them into the unified encoding (as `reference.reorder` does)."""
    u = tl.load(base + offsets, mask=inside, other=0).to(tl.uint32, bitcast=True)
    h = (u >> 3) & 0x11111111
    return ((u ^ (h * 7 + 0x88888888)) + h) & ((u & 0x88888888) ^ 0xFFFFFFFF)


@triton.jit
def _pair(a, b):
    """Return the low halves of two words as one word, and their high halves as another."""
    return (a & 0xFFFF) | (b << 16), (a >> 16) | (b & 0xFFFF0000)


@triton.jit
def _swap(a, b, shift: tl.constexpr, even: tl.constexpr):
    """Trade the odd `shift`-bit fields of `a` for the even ones of `b`."""
    t = ((a >> shift) ^ b) & even
    return a ^ (t << shift), b ^ t
