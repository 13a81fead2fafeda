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
from convert_w4a8.kernels.gemm.cluster_sums import add_in_cluster, barrier, open_room
from convert_w4a8.kernels.gemm.hopper_lookups import (
    _columns,
    _entries,
    _entries_in_shared,
    _look_up,
    _tables_layout,
    _words_layout,
)

_LOW = gl.constexpr(1 / LOW_TERM)


@gluon.jit
def _after(words):
    """Return the same words, which the compiler takes for new ones: what reads them stays behind what is before."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [words], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _copy_group(there, FILL: gl.constexpr, rings, packed_at, tables_at, tokens_at, is_token):
    """Start copies of a group into the buffers FILL, if it is there."""
    words_ring, tables_ring, token_ring = rings
    if there:
        async_copy.async_copy_global_to_shared(words_ring[FILL], packed_at)
        async_copy.async_copy_global_to_shared(tables_ring[FILL], tables_at)
        async_copy.async_copy_global_to_shared(token_ring[FILL], tokens_at, mask=is_token)
    async_copy.commit_group()


@gluon.jit
def _multiply_group(
    group,
    groups,
    SLOT: gl.constexpr,
    rings,
    packed_at,
    tables_at,
    entries,
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
    OPERAND: gl.constexpr,
    COPIES_FIRST: gl.constexpr = False,
):
    """Multiply a group, whose copies lie in the buffers SLOT, and start copies of the one STAGES - 1 later.

    Return the sums of the groups before the last one, and the product of this one, which the tensor core is still at.
    """
    words_ring, tables_ring, token_ring = rings
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
    there = group + STAGES - 1 < groups
    if COPIES_FIRST:
        _copy_group(there, FILL, rings, packed_at, tables_at, tokens_at, is_token)
    fence_async_shared()
    words = gl.convert_layout(words_ring[SLOT].load(WORDS).reshape((4, TILES, 8, 4, 2)), FRAGMENT, assert_trivial=True)
    both = tables_ring[SLOT].load(BOTH)
    columns = _entries(entries, both) if INDEXED else _columns(both)
    if not COPIES_FIRST:
        _copy_group(there, FILL, rings, packed_at, tables_at, tokens_at, is_token)
    if OVERLAP == 1:
        # Before lookups, since the tensor core reads its operand from the registers that they write.
        done = warpgroup_mma_wait(0, deps=(product,))
        if not CHAIN:
            total += done
        product = warpgroup_mma_init(done)
        words = _after(words)
    first = ()
    second = ()
    for column in gl.static_range(4):
        one, other = gl.split(columns[column].reshape((TILES, 2, 8)).permute((0, 2, 1)))
        first += (gl.convert_layout(one, TABLES, assert_trivial=True)[None, :, :, None, None],)
        second += (gl.convert_layout(other, TABLES, assert_trivial=True)[None, :, :, None, None],)
    weights = gl.convert_layout(_look_up(words, first, second, BLOCK_N), OPERAND, assert_trivial=True)
    if OVERLAP == 2:
        done = warpgroup_mma_wait(0, deps=(product,))
        if not CHAIN:
            total += done
        product = warpgroup_mma_init(done)
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
    COPIES_FIRST: gl.constexpr,
):
    """Multiply.

    INDEXED: `tables` are the distinct ones, `index` says which of them each group of a channel has. OVERLAP: the tensor
    core multiplies a group while the next one's words are read (1), and looked up (2); one more group waits.
    CLUSTER: so many blocks, which have the parts of K of the same outputs, are a cluster; each adds up what the others
    send it, for SHARE tokens. 0: sums go through memory. COPIES_FIRST: copies start before a group's words are read,
    and so before its lookups, behind which the compiler may put them otherwise.
    """
    WARPS: gl.constexpr = gl.num_warps()
    SIZE: gl.constexpr = BLOCK_M * BLOCK_N
    AHEAD: gl.constexpr = 1 if SIZE > 4096 else max(4, 8192 // SIZE)  # sums of other parts that are read at a time
    ROWS: gl.constexpr = TERMS * BLOCK_M  # of tokens: all first terms, then all second ones
    # words as [k // 32, n // 16, n % 8, k % 16 // 4, k % 32 // 16]: a warp a tile of 16 channels, a thread a word of it
    FRAGMENT: gl.constexpr = gl.BlockedLayout([4, 1, 1, 1, 2], [1, 1, 8, 4, 1], [1, WARPS, 1, 1, 1], [4, 3, 2, 0, 1])
    WORDS: gl.constexpr = _words_layout(BLOCK_N, WARPS)  # the same, of words [4, 4·BLOCK_N]
    # A warp copies words of 32 k alone: what a thread copies is one address and distances that are known.
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, WARPS // 4], [1, 0])
    TABLES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT)))
    BOTH: gl.constexpr = _tables_layout(BLOCK_N, WARPS)  # of a thread: rows n % 16 < 8, and those 8 further
    TABLES_COPY: gl.constexpr = gl.BlockedLayout([16 if INDEXED else 2], [32], [WARPS], [0])
    TOKENS_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, ROWS, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    OUT: gl.constexpr = gl.BlockedLayout([4, 1], [16, 2], [1, WARPS], [0, 1])
    # Each buffer by itself: the compiler sees that copies into one have no need to wait for reads of another.
    SLOTS: gl.constexpr = STAGES + 1 if OVERLAP else STAGES
    TABLE: gl.constexpr = gl.uint8 if INDEXED else gl.int64
    words_ring = ()
    tables_ring = ()
    token_ring = ()
    for _ in gl.static_range(SLOTS):
        words_ring += (gl.allocate_shared_memory(gl.int32, [4, 4 * BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])),)
        tables_ring += (gl.allocate_shared_memory(TABLE, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0])),)
        token_ring += (gl.allocate_shared_memory(gl.float8e4nv, [ROWS, 128], gl.NVMMASharedLayout(128, 8, rank=2)),)

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
    group_tables = index if INDEXED else tables
    tables_at = group_tables + (begin.to(gl.int64) * N + block * BLOCK_N + gl.arange(0, BLOCK_N, TABLES_COPY))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, TOKENS_COPY))[:, None]
    inner = gl.arange(0, 128, gl.SliceLayout(0, TOKENS_COPY))[None, :]
    token = row % BLOCK_M
    tokens_at = tokens + (row // BLOCK_M * M + token).to(gl.int64) * K + (begin * 128 + inner)
    is_token = (token < M) & (inner < 128)

    if EARLY:
        gdc_launch_dependents()
    if CLUSTER:
        room = open_room(part, CLUSTER, SHARE, BLOCK_M, BLOCK_N)
    entries = _entries_in_shared(tables) if INDEXED else 0
    for stage in gl.static_range(STAGES - 1):
        if stage < groups:
            async_copy.async_copy_global_to_shared(words_ring[stage], packed_at + stage * 16 * N)
            async_copy.async_copy_global_to_shared(tables_ring[stage], tables_at + stage * N)
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
    tokens_at += (STAGES - 1) * 128

    total = gl.zeros((BLOCK_N, ROWS), gl.float32, PRODUCT)
    product = warpgroup_mma_init(total)
    for turn in range(groups // SLOTS):
        for slot in gl.static_range(SLOTS):
            total, product = _multiply_group(
                *(turn * SLOTS + slot, groups, slot, (words_ring, tables_ring, token_ring)),
                *(packed_at, tables_at, entries, tokens_at, is_token, total, product),
                *(STAGES, CHAIN, INDEXED, OVERLAP, WORDS, FRAGMENT, BOTH, TABLES, OPERAND, COPIES_FIRST),
            )
            packed_at += 16 * N
            tables_at += N
            tokens_at += 128
    for slot in gl.static_range(SLOTS - 1):
        if slot < groups % SLOTS:
            total, product = _multiply_group(
                *(groups // SLOTS * SLOTS + slot, groups, slot, (words_ring, tables_ring, token_ring)),
                *(packed_at, tables_at, entries, tokens_at, is_token, total, product),
                *(STAGES, CHAIN, INDEXED, OVERLAP, WORDS, FRAGMENT, BOTH, TABLES, OPERAND, COPIES_FIRST),
            )
            product = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(product,)))  # no product outlasts its branch
            packed_at += 16 * N
            tables_at += N
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
        result = add_in_cluster(result, n, all_tokens, part, room, CLUSTER, SHARE)
    elif SPLIT:
        sums_at = sums + block.to(gl.int64) * (BLOCK_M * BLOCK_N) + (m * BLOCK_N + n)
        stride = blocks.to(gl.int64) * (BLOCK_M * BLOCK_N)
        gl.store(sums_at + part * stride, result, mask=inside)
        barrier()
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
