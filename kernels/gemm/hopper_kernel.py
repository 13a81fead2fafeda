"""The kernel that `hopper` launches, in Gluon, which says in which order of registers and lanes everything lies."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from convert_w4a8.kernels.activations.reference import LOW_TERM
from convert_w4a8.kernels.gemm.cluster_sums import add_in_cluster, barrier
from convert_w4a8.kernels.gemm.device_code import LOOK_UP

_LOOK_UP = gl.constexpr(LOOK_UP.value)
_LOW = gl.constexpr(1 / LOW_TERM)
_barrier = barrier


@gluon.constexpr_function
def _words_layout(block_n, warps):
    """Return the layout in which a thread reads words [4, 4·block_n]: those that its warp's tiles give it."""
    tiles = [[0, 64 << i] for i in range((block_n // 16).bit_length() - 1)]
    own = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [1, 0], [2, 0], *tiles[own:]],
        lane_bases=[[0, 2], [0, 4], [0, 8], [0, 16], [0, 32]],
        warp_bases=tiles[:own],
        block_bases=[],
        shape=[4, 4 * block_n],
    )


@gluon.constexpr_function
def _tables_layout(block_n, warps):
    """Return the layout in which a thread reads tables [block_n]: those of the rows whose words it has."""
    tiles = [[16 << i] for i in range((block_n // 16).bit_length() - 1)]
    own = warps.bit_length() - 1
    return gl.DistributedLinearLayout(
        reg_bases=[[8], *tiles[own:]],
        lane_bases=[[0], [0], [1], [2], [4]],
        warp_bases=tiles[:own],
        block_bases=[],
        shape=[block_n],
    )


@gluon.jit
def _columns(table):
    """Return the low and the high words of tables int64 [tiles, 8] for negative codes, then for positive ones."""
    SIGNS: gl.constexpr = -0x7F7F7F80  # 0x80 in every byte
    low = table.to(gl.int32)[None, :, :, None, None]
    high = (table >> 32).to(gl.int32)[None, :, :, None, None]
    return low, high, (low & -256) ^ SIGNS, high ^ SIGNS


@gluon.jit
def _after(words):
    """Return the same words, which the compiler takes for new ones: what reads them stays behind what is before."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=False, pack=1)


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
    return _weights(upper, lower, BLOCK_N)


@gluon.jit
def _weights(upper, lower, BLOCK_N: gl.constexpr):
    """Return FP8 weights [BLOCK_N, 128] of four bytes of a row n % 16 < 8 each, and of the row 8 further."""
    four = gl.join(upper, lower)
    even = gl.join(four.to(gl.int8), (four >> 8).to(gl.int8))
    odd = gl.join((four >> 16).to(gl.int8), (four >> 24).to(gl.int8))
    weights = gl.join(even, odd).to(gl.float8e4nv, bitcast=True)
    return weights.permute((1, 5, 2, 0, 4, 3, 7, 6)).reshape((BLOCK_N, 128))


@gluon.jit
def _multiply_group(
    group,
    groups,
    SLOT: gl.constexpr,
    rings,
    packed_at,
    tables_at,
    tables,
    index_at,
    tokens_at,
    is_token,
    total,
    product,
    STAGES: gl.constexpr,
    CHAIN: gl.constexpr,
    INDEXED: gl.constexpr,
    OVERLAP: gl.constexpr,
    WORDS: gl.constexpr,
    FRAGMENT: gl.constexpr,
    BOTH: gl.constexpr,
    TABLES: gl.constexpr,
    TABLES_COPY: gl.constexpr,
    OPERAND: gl.constexpr,
):
    """Multiply a group, whose copies lie in the buffers SLOT, and start copies of the one STAGES - 1 later.

    Return the sums of the groups before the last one, and the product of this one, which the tensor core is still at.
    """
    words_ring, tables_ring, token_ring, index_ring = rings
    SLOTS: gl.constexpr = len(words_ring)
    FILL: gl.constexpr = (SLOT + STAGES - 1) % SLOTS
    BLOCK_N: gl.constexpr = tables_ring[0].shape[0]
    TILES: gl.constexpr = BLOCK_N // 16
    if not OVERLAP:
        done = warpgroup_mma_wait(0, deps=(product,))
        if not CHAIN:
            total += done
        product = warpgroup_mma_init(done)
    async_copy.wait_group(STAGES - 2)
    fence_async_shared()
    words = gl.convert_layout(words_ring[SLOT].load(WORDS).reshape((4, TILES, 8, 4, 2)), FRAGMENT, assert_trivial=True)
    both = tables_ring[SLOT].load(BOTH)
    if INDEXED:
        tables_at = tables + index_ring[FILL].load(TABLES_COPY)
    if group + STAGES - 1 < groups:
        async_copy.async_copy_global_to_shared(words_ring[FILL], packed_at)
        async_copy.async_copy_global_to_shared(tables_ring[FILL], tables_at)
        async_copy.async_copy_global_to_shared(token_ring[FILL], tokens_at, mask=is_token)
    if INDEXED and group + 2 * STAGES - 2 < groups:
        async_copy.async_copy_global_to_shared(index_ring[(SLOT + 2 * STAGES - 2) % SLOTS], index_at)
    async_copy.commit_group()
    if OVERLAP:
        # Before lookups, since the tensor core reads its operand from the registers that they write.
        done = warpgroup_mma_wait(0, deps=(product,))
        if not CHAIN:
            total += done
        product = warpgroup_mma_init(done)
        words = _after(words)
    first, second = gl.split(both.reshape((TILES, 2, 8)).permute((0, 2, 1)))
    first = gl.convert_layout(first, TABLES, assert_trivial=True)
    second = gl.convert_layout(second, TABLES, assert_trivial=True)
    weights = gl.convert_layout(_look_up(words, first, second, BLOCK_N), OPERAND, assert_trivial=True)
    product = warpgroup_mma(weights, token_ring[SLOT].permute((1, 0)), product, use_acc=CHAIN, is_async=True)
    return total, product


@gluon.jit(do_not_specialize=["M", "SPLITS"])
def _gemm_kernel(
    tokens,
    packed,
    tables,
    index,
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
    INDEXED: gl.constexpr,
    OVERLAP: gl.constexpr,
    CLUSTER: gl.constexpr,
    SHARE: gl.constexpr,
):
    """Multiply.

    INDEXED: `tables` are the distinct ones, `index` says which of them each group of a channel has. OVERLAP: the tensor
    core multiplies a group while the next one's words are read, until their lookup; one more group of tokens waits.
    CLUSTER: so many blocks, which have the parts of K of the same outputs, are a cluster; each adds up what the others
    send it, for SHARE tokens. 0: sums go through memory.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SIZE: gl.constexpr = BLOCK_M * BLOCK_N
    AHEAD: gl.constexpr = 1 if SIZE > 4096 else max(4, 8192 // SIZE)  # sums of other parts that are read at a time
    ROWS: gl.constexpr = TERMS * BLOCK_M  # of tokens: all first terms, then all second ones
    # words as [k // 32, n // 16, n % 8, k % 16 // 4, k % 32 // 16]: a warp a tile of 16 channels, a thread a word of it
    FRAGMENT: gl.constexpr = gl.BlockedLayout([4, 1, 1, 1, 2], [1, 1, 8, 4, 1], [1, WARPS, 1, 1, 1], [4, 3, 2, 0, 1])
    WORDS: gl.constexpr = _words_layout(BLOCK_N, WARPS)  # the same, of words [4, 4·BLOCK_N]
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, WARPS // 2], [1, 0])
    TABLES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT)))
    BOTH: gl.constexpr = _tables_layout(BLOCK_N, WARPS)  # of a thread: rows n % 16 < 8, and those 8 further
    TABLES_COPY: gl.constexpr = gl.BlockedLayout([1 if INDEXED else 2], [32], [WARPS], [0])
    INDEX_COPY: gl.constexpr = gl.BlockedLayout([16], [32], [WARPS], [0])
    TOKENS_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    OUT: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, WARPS], [0, 1])
    # Each buffer by itself: the compiler sees that copies into one have no need to wait for reads of another.
    SLOTS: gl.constexpr = STAGES + 1 if OVERLAP else STAGES
    words_ring = ()
    tables_ring = ()
    token_ring = ()
    index_ring = ()
    for _ in gl.static_range(SLOTS):
        words_ring += (gl.allocate_shared_memory(gl.int32, [4, 4 * BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])),)
        tables_ring += (gl.allocate_shared_memory(gl.int64, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0])),)
        token_ring += (gl.allocate_shared_memory(gl.float8e4nv, [ROWS, 128], gl.NVMMASharedLayout(128, 8, rank=2)),)
        if INDEXED:
            index_ring += (gl.allocate_shared_memory(gl.uint8, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0])),)

    blocks = N // BLOCK_N
    if CLUSTER:
        block = gl.program_id(0) // CLUSTER
        part = gl.program_id(0) % CLUSTER
    else:
        block = gl.program_id(0) % blocks
        part = gl.program_id(0) // blocks
    begin = (K // 128 * part) // SPLITS
    groups = (K // 128 * (part + 1)) // SPLITS - begin

    tile = gl.arange(0, 4, gl.SliceLayout(1, COPY))[:, None]
    column = gl.arange(0, 4 * BLOCK_N, gl.SliceLayout(0, COPY))[None, :]
    packed_at = packed + (begin * 4 + tile).to(gl.int64) * (4 * N) + (block * (4 * BLOCK_N) + column)
    of_tables = begin.to(gl.int64) * N + block * BLOCK_N
    channels_of_tables = gl.arange(0, BLOCK_N, TABLES_COPY)
    tables_at = tables + of_tables + channels_of_tables
    index_at = index + of_tables + gl.arange(0, BLOCK_N, INDEX_COPY)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, TOKENS_COPY))[:, None]
    inner = gl.arange(0, 128, gl.SliceLayout(0, TOKENS_COPY))[None, :]
    token = row % BLOCK_M
    tokens_at = tokens + (row // BLOCK_M * M + token).to(gl.int64) * K + (begin * 128 + inner)
    is_token = (token < M) & (inner < 128)

    if EARLY:
        gdc_launch_dependents()
    firsts = ()
    if INDEXED:
        for stage in gl.static_range(STAGES - 1):
            firsts += (gl.load(index + of_tables + min(stage, groups - 1) * N + channels_of_tables),)
    for stage in gl.static_range(STAGES - 1):
        if stage < groups:
            async_copy.async_copy_global_to_shared(words_ring[stage], packed_at + stage * 16 * N)
            if not INDEXED:
                async_copy.async_copy_global_to_shared(tables_ring[stage], tables_at + stage * N)
        if INDEXED and stage + STAGES - 1 < groups:
            async_copy.async_copy_global_to_shared(
                index_ring[(stage + STAGES - 1) % SLOTS], index_at + (stage + STAGES - 1) * N
            )
    if INDEXED:
        for stage in gl.static_range(STAGES - 1):
            if stage < groups:
                async_copy.async_copy_global_to_shared(tables_ring[stage], tables + firsts[stage])
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, OUT))[:, None]
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))[None, :]
    inside = (m < M) & (n < BLOCK_N)
    channel = block * BLOCK_N + n
    channels = gl.load(channel_scale + channel)  # from memory, which takes as long as all the rest at the end
    if EARLY:
        gdc_wait()
    for stage in gl.static_range(STAGES - 1):
        if stage < groups:
            async_copy.async_copy_global_to_shared(token_ring[stage], tokens_at + stage * 128, mask=is_token)
        async_copy.commit_group()
    packed_at += (STAGES - 1) * 16 * N
    tables_at += (STAGES - 1) * N
    index_at += (2 * STAGES - 2) * N
    tokens_at += (STAGES - 1) * 128

    total = gl.zeros((BLOCK_N, ROWS), gl.float32, PRODUCT)
    product = warpgroup_mma_init(total)
    for turn in range(groups // SLOTS):
        for slot in gl.static_range(SLOTS):
            total, product = _multiply_group(
                *(turn * SLOTS + slot, groups, slot, (words_ring, tables_ring, token_ring, index_ring)),
                *(packed_at, tables_at, tables, index_at, tokens_at, is_token, total, product),
                *(STAGES, CHAIN, INDEXED, OVERLAP, WORDS, FRAGMENT, BOTH, TABLES, TABLES_COPY, OPERAND),
            )
            packed_at += 16 * N
            tables_at += N
            index_at += N
            tokens_at += 128
    for slot in gl.static_range(SLOTS - 1):
        if slot < groups % SLOTS:
            total, product = _multiply_group(
                *(groups // SLOTS * SLOTS + slot, groups, slot, (words_ring, tables_ring, token_ring, index_ring)),
                *(packed_at, tables_at, tables, index_at, tokens_at, is_token, total, product),
                *(STAGES, CHAIN, INDEXED, OVERLAP, WORDS, FRAGMENT, BOTH, TABLES, TABLES_COPY, OPERAND),
            )
            product = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(product,)))  # no product outlasts its branch
            packed_at += 16 * N
            tables_at += N
            index_at += N
            tokens_at += 128
    if CLUSTER:
        all_tokens = m
        m = part * SHARE + gl.arange(0, SHARE, gl.SliceLayout(0, OUT))[None, :]
        inside = (m < M) & (n < BLOCK_N)
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
    if CLUSTER:
        result = add_in_cluster(result, n, all_tokens, part, CLUSTER, SHARE, BLOCK_M)
    elif SPLIT:
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
