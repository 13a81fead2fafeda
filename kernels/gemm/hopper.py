"""The GEMM of `gpu` for Hopper, in Gluon: explicit layouts, and weights on their way before the tokens are there.

Launched with programmatic dependent launch: a block starts while the kernel before it still runs, fills its ring of
copies with weights, which no kernel writes, and only then waits for that kernel's results. Gluon also says how the
words go from shared memory to registers: in the order of the tensor core's operand, which `assert_trivial` checks when
the kernel is compiled.

Activations are one or two FP8 terms. Two, x = hi + lo / 16, hold a bfloat16 value to the last bit over 13 binades
below the largest of its token (`kernels.activations`).
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from convert_w4a8.kernels.gemm import gpu, workspace
from convert_w4a8.kernels.gemm.tuned import LAUNCHES

BLOCK_N = 64
MAX_TOKENS = 128
"""The most rows of activations that one launch takes."""
MAX_TOKENS_OF_TWO_TERMS = 32
LOW_TERM = 16.0
"""What the second term of an activation is multiplied by."""
_BLOCKS_PER_SM = {8: 6, 16: 5, 32: 4, 64: 3, 128: 2}
"""By the rows of tokens in a block: blocks of one multiprocessor at a time, by shared memory and registers."""
_STAGES = {8: 6, 16: 6, 32: 4, 64: 4, 128: 3}
_SPLITS = 12
ALWAYS = 32
"""Tokens up to which this kernel is the faster one whatever the size; beyond, where it was measured to be."""
_MANY_ROWS = 64
"""From here on sums in float32 cost registers."""
_LOOK_UP = gl.constexpr(gpu._LOOK_UP.value)  # noqa: SLF001
_LOW = gl.constexpr(1 / LOW_TERM)
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@dataclass(frozen=True)
class Launch:
    """How one GEMM is cut: tokens of a block (a power of two from 8), parts of K, copies in flight.

    block_n: output channels of a block, 64 or 128: with many tokens, reading these again and again takes longer than
        reading the weights.
    chain: sum over K inside the tensor core, whose sums of FP8 products have about 14 bits, instead of adding up
        groups of 128 in float32.
    early: start before the kernel ahead of it has ended.
    """

    block_m: int
    splits: int
    stages: int = 4
    block_n: int = BLOCK_N
    chain: bool = False
    early: bool = True


def choose_launch(m: int, n: int, k: int, multiprocessors: int, terms: int = 1) -> Launch:
    """Return how to cut an [m, n, k] GEMM: as measured, or so that all blocks run at once."""
    block_m = _block_m(m)
    rows = block_m * terms
    chain = rows >= _MANY_ROWS
    if measured := LAUNCHES.get((n, k, block_m, terms)):
        return Launch(block_m, *measured, chain=chain)
    blocks = triton.cdiv(n, BLOCK_N)
    splits = min(round(_BLOCKS_PER_SM[rows] * multiprocessors / blocks), _SPLITS, k // (2 * gpu.GROUP))
    return Launch(block_m, max(1, splits), _STAGES[rows], chain=chain)


def _block_m(m: int) -> int:
    power: int = triton.next_power_of_2(m)
    return max(8, power)


def probe(device: torch.device) -> None:
    """Compile and run one small product; raises whatever goes wrong, ArithmeticError if it is that."""
    ones = torch.ones(1, 128, device=device).to(torch.float8_e4m3fn)
    packed = torch.full((4, 4 * BLOCK_N), -0x77777778, dtype=torch.int32, device=device)  # the first entry everywhere
    tables = torch.ones(1, BLOCK_N, 8, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(BLOCK_N, dtype=torch.float32, device=device)
    product = gemm(ones, scale[:1, None], packed, tables, scale)
    if not bool((product == 128).all()):
        raise ArithmeticError("1 · 1, 128 times, is not 128")


def suits(m: int, n: int, k: int) -> bool:
    """Whether this kernel is the faster one for [m, n, k], and takes it."""
    if n % BLOCK_N or m > MAX_TOKENS:
        return False
    return m <= ALWAYS or (n, k, _block_m(m), 1) in LAUNCHES


def gemm(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
) -> torch.Tensor:
    """Multiply FP8 activations by a layer in the LUT layout; see `devices.Gemm`. N is a multiple of 64.

    ValueError for M > `MAX_TOKENS`, and for M > `MAX_TOKENS_OF_TWO_TERMS` where the tokens have two terms.
    """
    m, k, n = token_scale.shape[0], tokens.shape[1], packed.shape[1] // 4
    launch = choose_launch(m, n, k, workspace.multiprocessors(tokens.device), tokens.shape[0] // max(1, m))
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
    m, k, n = token_scale.shape[0], tokens.shape[1], packed.shape[1] // 4
    output = torch.empty(m, n, dtype=torch.bfloat16, device=tokens.device)
    if m == 0:
        return output
    terms = tokens.shape[0] // m
    if m > (MAX_TOKENS if terms == 1 else MAX_TOKENS_OF_TWO_TERMS):
        raise ValueError(f"M = {m} with {terms} terms is more than a launch takes")
    if n % launch.block_n:
        raise ValueError(f"N = {n} is not a multiple of {launch.block_n}")
    blocks = n // launch.block_n
    splits, sums, counters = workspace.split(output, blocks, launch.block_n * launch.block_m, launch.splits)
    with torch.cuda.device_of(tokens):
        _gemm_kernel[(blocks * splits,)](
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
            TERMS=terms,
            CHAIN=launch.chain,
            SPLIT=splits > 1,
            EARLY=launch.early,
            num_warps=4,
            launch_pdl=launch.early,
        )
    return output


@gluon.constexpr_function
def _words_layout(block_n):
    """Return the layout in which a thread reads words [4, 4·block_n]: those that its warp's tiles give it."""
    tiles = [[0, 256 << i] for i in range(block_n.bit_length() - 7)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [1, 0], [2, 0], *tiles],
        lane_bases=[[0, 2], [0, 4], [0, 8], [0, 16], [0, 32]],
        warp_bases=[[0, 64], [0, 128]],
        block_bases=[],
        shape=[4, 4 * block_n],
    )


@gluon.jit
def _columns(table):
    """Return the low and the high words of tables int64 [tiles, 8] for negative codes, then for positive ones."""
    SIGNS: gl.constexpr = -0x7F7F7F80  # 0x80 in every byte
    low = table.to(gl.int32)[None, :, :, None, None]
    high = (table >> 32).to(gl.int32)[None, :, :, None, None]
    return low, high, (low & -256) ^ SIGNS, high ^ SIGNS


@gluon.jit
def _look_up(words, first, second, BLOCK_N: gl.constexpr):
    """Return FP8 weights [BLOCK_N, 128] of words [4, BLOCK_N/16, 8, 4, 2].

    first, second: tables int64 [BLOCK_N/16, 8] of rows n % 16 < 8, and of those 8 further.
    """
    first_low, first_high, first_low_positive, first_high_positive = _columns(first)
    second_low, second_high, second_low_positive, second_high_positive = _columns(second)
    upper, lower = gl.inline_asm_elementwise(
        _LOOK_UP,
        "=r,=r,r,r,r,r,r,r,r,r,r",
        [
            words,
            first_low,
            first_high,
            first_low_positive,
            first_high_positive,
            second_low,
            second_high,
            second_low_positive,
            second_high_positive,
        ],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    four = gl.join(upper, lower)
    even = gl.join(four.to(gl.int8), (four >> 8).to(gl.int8))
    odd = gl.join((four >> 16).to(gl.int8), (four >> 24).to(gl.int8))
    weights = gl.join(even, odd).to(gl.float8e4nv, bitcast=True)
    return weights.permute((1, 5, 2, 0, 4, 3, 7, 6)).reshape((BLOCK_N, 128))


@gluon.jit(do_not_specialize=["M", "SPLITS"])
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
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    TERMS: gl.constexpr,
    CHAIN: gl.constexpr,
    SPLIT: gl.constexpr,
    EARLY: gl.constexpr,
):
    TILES: gl.constexpr = BLOCK_N // 16
    AHEAD: gl.constexpr = min(16, max(1, 8192 // (BLOCK_M * BLOCK_N)))  # sums of other parts read at a time
    ROWS: gl.constexpr = TERMS * BLOCK_M  # of tokens: all first terms, then all second ones
    # words as [k // 32, n // 16, n % 8, k % 16 // 4, k % 32 // 16]: a warp a tile of 16 channels, a thread a word of it
    FRAGMENT: gl.constexpr = gl.BlockedLayout([4, 1, 1, 1, 2], [1, 1, 8, 4, 1], [1, 4, 1, 1, 1], [4, 3, 2, 0, 1])
    WORDS: gl.constexpr = _words_layout(BLOCK_N)  # the same, of words [4, 4·BLOCK_N]
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, 2], [1, 0])
    TABLES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT)))
    TABLES_COPY: gl.constexpr = gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0])
    TOKENS_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, ROWS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    OUT: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, 4], [0, 1])
    words_ring = gl.allocate_shared_memory(gl.int32, [STAGES, 4, 4 * BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    first_ring = gl.allocate_shared_memory(gl.int64, [STAGES, TILES, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    second_ring = gl.allocate_shared_memory(gl.int64, [STAGES, TILES, 8], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    token_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, ROWS, 128], gl.NVMMASharedLayout(128, 8, rank=2))

    blocks = N // BLOCK_N
    block = gl.program_id(0) % blocks
    part = gl.program_id(0) // blocks
    begin = (K // 128 * part) // SPLITS
    groups = (K // 128 * (part + 1)) // SPLITS - begin

    tile = gl.arange(0, 4, gl.SliceLayout(1, COPY))[:, None]
    column = gl.arange(0, 4 * BLOCK_N, gl.SliceLayout(0, COPY))[None, :]
    packed_at = packed + (begin * 4 + tile).to(gl.int64) * (4 * N) + (block * (4 * BLOCK_N) + column)
    table_tile = gl.arange(0, TILES, gl.SliceLayout(1, TABLES_COPY))[:, None]
    table_row = gl.arange(0, 8, gl.SliceLayout(0, TABLES_COPY))[None, :]
    tables_at = tables + begin.to(gl.int64) * N + (block * BLOCK_N + table_tile * 16 + table_row)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, TOKENS_COPY))[:, None]
    inner = gl.arange(0, 128, gl.SliceLayout(0, TOKENS_COPY))[None, :]
    token = row % BLOCK_M
    tokens_at = tokens + (row // BLOCK_M * M + token).to(gl.int64) * K + (begin * 128 + inner)
    is_token = (token < M) & (inner < 128)

    if EARLY:
        gdc_launch_dependents()
    for stage in gl.static_range(STAGES - 1):
        if stage < groups:
            async_copy.async_copy_global_to_shared(words_ring.index(stage), packed_at + stage * 16 * N)
            async_copy.async_copy_global_to_shared(first_ring.index(stage), tables_at + stage * N)
            async_copy.async_copy_global_to_shared(second_ring.index(stage), tables_at + (stage * N + 8))
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT))[:, None]
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))[None, :]
    inside = (m < M) & (n < BLOCK_N)
    channel = block * BLOCK_N + n
    channels = gl.load(channel_scale + channel)  # from memory, which takes as long as all the rest at the end
    if EARLY:
        gdc_wait()
    for stage in gl.static_range(STAGES - 1):
        if stage < groups:
            async_copy.async_copy_global_to_shared(token_ring.index(stage), tokens_at + stage * 128, mask=is_token)
        async_copy.commit_group()
    packed_at += (STAGES - 1) * 16 * N
    tables_at += (STAGES - 1) * N
    tokens_at += (STAGES - 1) * 128

    total = gl.zeros((BLOCK_N, ROWS), gl.float32, PRODUCT)
    product = warpgroup_mma_init(total)
    slot = 0
    for group in range(groups):
        done = warpgroup_mma_wait(0, deps=(product,))
        if not CHAIN:
            total += done
        product = warpgroup_mma_init(done)
        async_copy.wait_group(STAGES - 2)
        words = gl.convert_layout(
            words_ring.index(slot).load(WORDS).reshape((4, TILES, 8, 4, 2)), FRAGMENT, assert_trivial=True
        )
        first = first_ring.index(slot).load(TABLES)
        second = second_ring.index(slot).load(TABLES)
        fill = (slot + STAGES - 1) % STAGES
        if group + STAGES - 1 < groups:
            async_copy.async_copy_global_to_shared(words_ring.index(fill), packed_at)
            async_copy.async_copy_global_to_shared(first_ring.index(fill), tables_at)
            async_copy.async_copy_global_to_shared(second_ring.index(fill), tables_at + 8)
            async_copy.async_copy_global_to_shared(token_ring.index(fill), tokens_at, mask=is_token)
        async_copy.commit_group()
        packed_at += 16 * N
        tables_at += N
        tokens_at += 128
        weights = gl.convert_layout(_look_up(words, first, second, BLOCK_N), OPERAND, assert_trivial=True)
        x = token_ring.index(slot).permute((1, 0))
        product = warpgroup_mma(weights, x, product, use_acc=CHAIN, is_async=True)
        slot = (slot + 1) % STAGES
    scales = gl.load(token_scale + m, mask=m < M, other=0.0)
    done = warpgroup_mma_wait(0, deps=(product,))
    if CHAIN:
        total = done
    else:
        total += done
    if TERMS == 2:
        high, low = gl.split(total.reshape((BLOCK_N, 2, BLOCK_M)).permute((0, 2, 1)))
        result = gl.convert_layout(high + low * _LOW, OUT)
    else:
        result = gl.convert_layout(total, OUT)

    last = True
    if SPLIT:
        sums_at = sums + block.to(gl.int64) * (BLOCK_M * BLOCK_N) + (m * BLOCK_N + n)
        stride = blocks.to(gl.int64) * (BLOCK_M * BLOCK_N)
        gl.store(sums_at + part * stride, result, mask=inside)
        _barrier()
        last = gl.atomic_add(counters + block, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            gl.store(counters + block, 0)
            result = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, OUT)
            for other in range(0, SPLITS, AHEAD):
                for ahead in gl.static_range(AHEAD):
                    mask = inside & (other + ahead < SPLITS)
                    result += gl.load(sums_at + (other + ahead) * stride, mask=mask, other=0.0, cache_modifier=".cg")
    if last:
        scaled = result * channels * scales
        gl.store(output + m.to(gl.int64) * N + channel, scaled.to(gl.bfloat16), mask=inside)
