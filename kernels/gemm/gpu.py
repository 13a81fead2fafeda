"""GEMM over the LUT layout: FP8 activations times INT4 weights that a table turns into FP8.

A tile of 16 output and 32 input channels of the layout is, byte for byte, what the 32 threads of a warp hold of an
operand of the 8-bit tensor-core instruction (PTX ISA, mma.m16n8k32, and the register operand of wgmma). So the words go
from memory to registers, through the table, into the instruction, and no thread needs another's.

A block computes `BLOCK_N` output channels for `BLOCK_M` tokens. Where these are all there are, it may do so over one of
`SPLITS` parts of K: each part leaves its sums in a workspace, and the last one to arrive adds all of them, in the order
of K: the same bytes whatever the order of blocks.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

from convert_w4a8.kernels.gemm import workspace
from convert_w4a8.kernels.gemm.device_code import INTERPRETED, add_parts, look_up, settled

GROUP = 128
BLOCK_N = 64
_ONE_BLOCK = 128
"""Up to so many tokens, a block takes all of them."""
_PREFILL_BLOCK = 256
"""Tokens of a block where there are more: two such blocks fill a multiprocessor of Hopper."""
SIDE_BY_SIDE = 16
"""Blocks along N that run through all tokens before the next ones begin: their weights stay in the L2."""
HOPPER_SHARED = 227 * 1024
"""Bytes of shared memory that a block may have on Hopper, and on GPUs of compute capability 10. Those with less (8.9,
12.0) multiply by single warps, whose registers a tile of 64 × 128 sums overflows unless there are eight of them."""
_BLOCKS_PER_SM = 3
"""Blocks that a multiprocessor holds side by side, with the copies in flight that keep the memory busy."""
_SPLITS = 4
"""Parts of K beyond which the sum at the end costs more than it gains."""
_MANY_TOKENS = 64
"""From here on the sums of parts are as large as the weights, and sums in float32 cost registers."""
_LONG_PART = 3584
"""The least K of a part where there are more tokens than that."""
_LONG_K = 8192
"""From here on a block lasts long enough for one more copy in flight."""


@dataclass(frozen=True)
class Launch:
    """How one GEMM is cut: tokens of a block (a power of two from 16), parts of K, copies in flight, warps.

    splits: counts where one block takes all tokens; K is not split for several rows of blocks.
    block_n: output channels of a block. warps: four on Hopper, where Triton 3.6 gives other bytes now and then with
        eight (`scripts/gpu/check_gemm.py` sees it).
    chain: sum over K inside the tensor core, whose sums of FP8 products have about 14 bits on Hopper, instead of adding
        up groups of 128 in float32.
    """

    block_m: int
    splits: int
    stages: int = 4
    warps: int = 4
    chain: bool = False
    block_n: int = BLOCK_N


def choose_launch(m: int, n: int, k: int, multiprocessors: int, shared: int = HOPPER_SHARED) -> Launch:
    """Return how to cut an [m, n, k] GEMM where nothing was measured: every multiprocessor busy, few parts of K.

    shared: bytes of shared memory that a block may have.
    """
    small = shared < HOPPER_SHARED
    warps = 8 if small and m > _MANY_TOKENS else 4
    if m > _ONE_BLOCK:
        if small or m <= 2 * _ONE_BLOCK:
            return Launch(_ONE_BLOCK, 1, stages=3 if small else 4, warps=warps, chain=True)
        return Launch(_PREFILL_BLOCK, 1, stages=3, chain=True)
    blocks = triton.cdiv(n, BLOCK_N)
    splits = min(_BLOCKS_PER_SM * multiprocessors // blocks, _SPLITS, k // GROUP)
    if m > _MANY_TOKENS:
        splits = min(splits, k // _LONG_PART)
    block_m = max(16, triton.next_power_of_2(m))
    stages = 5 if k >= _LONG_K and 5 * _copied(block_m) <= shared else 4
    return Launch(block_m, max(1, splits), stages, warps, chain=m >= _MANY_TOKENS)


def _copied(block_m: int) -> int:
    """Return the bytes that a block copies to shared memory for a group of K."""
    return GROUP * block_m + BLOCK_N * (GROUP // 2 + 8)


def compiled_for(m: int, n: int, k: int, device: torch.device, terms: int) -> Hashable:  # noqa: ARG001
    """Return what the kernel for an [m, n, k] product is compiled for: products for which it is the same share one.

    terms: of the activations, of which this kernel multiplies the first alone.
    """
    launch = _launch(m, n, k, device)
    return replace(launch, splits=min(launch.splits, 2)), m > launch.block_m, n % launch.block_n == 0


def _launch(m: int, n: int, k: int, device: torch.device) -> Launch:
    return choose_launch(m, n, k, workspace.multiprocessors(device), _shared_memory(device))


def gemm(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
) -> torch.Tensor:
    """Multiply FP8 activations by a layer in the LUT layout; see `operations.Gemm`."""
    (m, k), n = tokens.shape, packed.shape[1] // 4
    launch = _launch(m, n, k, tokens.device)
    return gemm_by(tokens, token_scale, packed, tables, channel_scale, launch)


def gemm_by(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
    launch: Launch,
) -> torch.Tensor:
    """Do what `gemm` does, cut as `launch` says."""
    m, k = tokens.shape
    n = packed.shape[1] // 4
    output = torch.empty(m, n, dtype=torch.bfloat16, device=tokens.device)
    if m == 0:
        return output
    blocks, rows = triton.cdiv(n, launch.block_n), triton.cdiv(m, launch.block_m)
    wished = launch.splits if rows == 1 else 1
    splits, sums, counters = workspace.split(output, blocks, launch.block_n * launch.block_m, wished)
    with torch.cuda.device_of(tokens):
        _gemm_kernel[(blocks * rows * splits,)](
            tokens,
            packed,
            tables.view(torch.int64),
            token_scale,
            channel_scale,
            output,
            sums,
            counters,
            m,
            n,
            k,
            splits,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            STAGES=launch.stages,
            CHAIN=launch.chain,
            SPLIT=splits > 1,
            SIDE_BY_SIDE=SIDE_BY_SIDE if rows > 1 else 0,
            WHOLE=n % launch.block_n == 0,
            HOPPER=workspace.is_hopper(tokens.device),
            INTERPRETED=INTERPRETED,
            num_warps=launch.warps,
        )
    return output


@cache
def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return HOPPER_SHARED
    size: int = triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
    return size


@triton.jit(do_not_specialize=["M", "SPLITS"])
def _gemm_kernel(
    tokens,
    packed,
    tables,
    token_scale,
    channel_scale,
    output,
    sums,
    counters,
    M,
    N,
    K,
    SPLITS,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
    SPLIT: tl.constexpr,
    SIDE_BY_SIDE: tl.constexpr,
    WHOLE: tl.constexpr,
    HOPPER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)[None, :]
    if SIDE_BY_SIDE:  # several rows of blocks, one part of K
        part = 0
        programs = SIDE_BY_SIDE * tl.cdiv(M, BLOCK_M)
        left = program // programs * SIDE_BY_SIDE
        width = min(blocks - left, SIDE_BY_SIDE)
        block = left + program % programs % width
        m += program % programs // width * BLOCK_M
    else:
        part = program // blocks
        block = program % blocks
    begin = (K // 128 * part) // SPLITS
    end = (K // 128 * (part + 1)) // SPLITS

    column = block * (4 * BLOCK_N) + tl.arange(0, 4 * BLOCK_N)[None, :]
    tile = tl.arange(0, 4)[:, None]
    packed_at = packed + (begin * 4 + tile).to(tl.int64) * (4 * N) + column
    half = tl.arange(0, BLOCK_N // 2)
    row = block * BLOCK_N + half // 8 * 16 + half % 8
    tables_at = tables + begin.to(tl.int64) * N + row
    tokens_at = tokens + m.to(tl.int64) * K + begin * 128 + tl.arange(0, 128)[:, None]
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for _ in tl.range(begin, end, num_stages=STAGES):
        if WHOLE:
            words = tl.load(packed_at)
            first = tl.load(tables_at)
            second = tl.load(tables_at + 8)
        else:
            words = tl.load(packed_at, mask=column < 4 * N, other=0)
            first = tl.load(tables_at, mask=row < N, other=0)
            second = tl.load(tables_at + 8, mask=row < N, other=0)
        x = tl.load(tokens_at, mask=m < M, other=0.0)
        weights = look_up(words, first, second, BLOCK_N, INTERPRETED)
        if CHAIN:
            total = settled(tl.dot(weights, x, total), HOPPER)
        else:
            total += tl.dot(weights, x)
        packed_at += 16 * N
        tables_at += N
        tokens_at += 128
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    inside = (m < M) & (n < N)
    last = True
    if SPLIT:
        sums_at = sums + block.to(tl.int64) * (BLOCK_M * BLOCK_N) + (tl.arange(0, BLOCK_N)[:, None] + m * BLOCK_N)
        stride = blocks.to(tl.int64) * (BLOCK_M * BLOCK_N)
        last, total = add_parts(total, sums_at, stride, part, counters + block, SPLITS, m < M)
    if last:
        scaled = total * tl.load(channel_scale + n, mask=n < N, other=0.0)
        scaled = scaled * tl.load(token_scale + m, mask=m < M, other=0.0)
        tl.store(output + m.to(tl.int64) * N + n, scaled.to(tl.bfloat16), mask=inside)
