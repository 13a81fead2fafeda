"""The GEMM over experts for Hopper, in Gluon: as `grouped_many_kernel`, with programs that multiply tile after tile.

A tile is some output channels and the pairs of one expert. While a program stores what a tile comes to, the copies of
its next tile are on their way.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_init
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from convert_w4a8.kernels.gemm.grouped_many_kernel import _add_up, _finish, _multiply_group, _waited
from convert_w4a8.kernels.gemm.hopper_kernel import _barrier, _tables_layout, _words_layout


@gluon.jit
def _begin(
    tile,
    expert,
    there,
    rings,
    packed,
    tables,
    index,
    channel_scale,
    rows,
    N,
    K,
    COPY: gl.constexpr,
    TABLES_COPY: gl.constexpr,
    INDEX_COPY: gl.constexpr,
    TOKENS_COPY: gl.constexpr,
    SCALES_COPY: gl.constexpr,
    OUT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
    GATED: gl.constexpr,
    INDEXED: gl.constexpr,
):
    """Start copies of the weights of a tile, if it is there; return where the next ones are, and what rows it has."""
    words_ring, tables_ring, token_ring, index_ring, left_scales, right_scales = rings
    SLOTS: gl.constexpr = STAGES + 1
    BLOCK_N: gl.constexpr = tables_ring[0].shape[0]
    HALF: gl.constexpr = BLOCK_N // 2
    STEP: gl.constexpr = HALF if GATED else BLOCK_N
    columns = N // BLOCK_N
    block = tile // columns
    column = tile % columns
    groups = K // 128
    wordrow = gl.arange(0, 4, gl.SliceLayout(1, COPY))[:, None]
    word = gl.arange(0, 4 * BLOCK_N, gl.SliceLayout(0, COPY))[None, :]
    channels_of_tables = gl.arange(0, BLOCK_N, TABLES_COPY)
    channels_of_index = gl.arange(0, BLOCK_N, INDEX_COPY)
    apart = N // 256 * 128 if GATED else HALF
    if GATED:
        word += word // (4 * HALF) * (4 * (apart - HALF))
        channels_of_tables += channels_of_tables // HALF * (apart - HALF)
        channels_of_index += channels_of_index // HALF * (apart - HALF)
    first_group = expert.to(gl.int64) * groups
    packed_at = packed + (first_group * 4 + wordrow) * (4 * N) + (column * (4 * STEP) + word)
    of_tables = first_group * N + column * STEP
    tables_at = tables + of_tables + channels_of_tables
    index_at = index + of_tables + channels_of_index
    scales_at = channel_scale + expert.to(gl.int64) * N + column * STEP + gl.arange(0, HALF, SCALES_COPY)
    firsts = ()
    if INDEXED:
        for stage in gl.static_range(STAGES - 1):
            at = index + of_tables + min(stage, groups - 1) * N + channels_of_tables
            firsts += (gl.load(at, mask=(channels_of_tables >= 0) & there, other=0),)
    row_of = gl.load(rows + block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT)))
    row = gl.load(rows + block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TOKENS_COPY)))
    if there:
        for stage in gl.static_range(STAGES - 1):
            if stage < groups:
                async_copy.async_copy_global_to_shared(words_ring[stage], packed_at + stage * 16 * N)
                if not INDEXED:
                    async_copy.async_copy_global_to_shared(tables_ring[stage], tables_at + stage * N)
            if INDEXED and stage + STAGES - 1 < groups:
                later = index_ring[(stage + STAGES - 1) % SLOTS]
                async_copy.async_copy_global_to_shared(later, index_at + (stage + STAGES - 1) * N)
        async_copy.async_copy_global_to_shared(left_scales, scales_at)
        async_copy.async_copy_global_to_shared(right_scales, scales_at + apart)
    packed_at += (STAGES - 1) * 16 * N
    tables_at += (STAGES - 1) * N
    index_at += (2 * STAGES - 2) * N
    return packed_at, tables_at, index_at, row, row_of, firsts


@gluon.jit
def _begin_tokens(
    there,
    row,
    firsts,
    rings,
    tokens,
    tables,
    ROWS,
    K,
    SHARE,
    TOKENS_COPY: gl.constexpr,
    STAGES: gl.constexpr,
    INDEXED: gl.constexpr,
):
    """Start copies of the tokens of a tile; return where the next ones are."""
    words_ring, tables_ring, token_ring, index_ring, left_scales, right_scales = rings
    groups = K // 128
    inner = gl.arange(0, 128, gl.SliceLayout(0, TOKENS_COPY))[None, :]
    tokens_at = tokens + (row[:, None] // SHARE).to(gl.int64) * K + inner
    is_token = (row[:, None] < ROWS) & (inner < 128)
    for stage in gl.static_range(STAGES - 1):
        if there & (stage < groups):
            if INDEXED:
                async_copy.async_copy_global_to_shared(tables_ring[stage], tables + firsts[stage])
            async_copy.async_copy_global_to_shared(token_ring[stage], tokens_at + stage * 128, mask=is_token)
        async_copy.commit_group()
    return tokens_at + (STAGES - 1) * 128, is_token


@gluon.jit(do_not_specialize=["ROWS", "BLOCKS", "WIDTH", "SPLITS", "SHARE"])
def _grouped_kernel(
    tokens,
    packed,
    tables,
    index,
    token_scale,
    channel_scale,
    output,
    maxima,
    rows,
    of_block,
    sums,
    counters,
    ROWS,
    N,
    K,
    BLOCKS,
    WIDTH,
    SPLITS,
    SHARE,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CHAIN: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SORTED: gl.constexpr,
    INDEXED: gl.constexpr,
    BY_PRODUCTS: gl.constexpr,
):
    """Multiply, as `grouped_hopper_kernel._grouped_kernel` does, which says what the arguments are. K is not split."""
    WARPS: gl.constexpr = gl.num_warps()
    SLOTS: gl.constexpr = STAGES + 1
    HALF: gl.constexpr = BLOCK_N // 2
    GATED: gl.constexpr = ACTIVATION is not None
    STEP: gl.constexpr = HALF if GATED else BLOCK_N
    FRAGMENT: gl.constexpr = gl.BlockedLayout([4, 1, 1, 1, 2], [1, 1, 8, 4, 1], [1, WARPS, 1, 1, 1], [4, 3, 2, 0, 1])
    WORDS: gl.constexpr = _words_layout(BLOCK_N, WARPS)
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, WARPS // 2], [1, 0])
    TABLES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT)))
    BOTH: gl.constexpr = _tables_layout(BLOCK_N, WARPS)
    TABLES_COPY: gl.constexpr = gl.BlockedLayout([1 if INDEXED else 2], [32], [WARPS], [0])
    SCALES_COPY: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    INDEX_COPY: gl.constexpr = gl.BlockedLayout([16], [32], [WARPS], [0])
    TOKENS_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    HALVES: gl.constexpr = gl.BlockedLayout([4, 1, 2], [HALF // 4, 128 // HALF, 1], [1, WARPS, 1], [2, 0, 1])
    OUT: gl.constexpr = gl.SliceLayout(2, HALVES)

    if not SORTED:
        gdc_wait()
    gdc_launch_dependents()  # not before: what comes then reads what was waited for here, and waits for this alone
    columns = N // BLOCK_N
    groups = K // 128
    words_ring = ()
    tables_ring = ()
    token_ring = ()
    index_ring = ()
    for _ in gl.static_range(SLOTS):
        words_ring += (gl.allocate_shared_memory(gl.int32, [4, 4 * BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])),)
        tables_ring += (gl.allocate_shared_memory(gl.int64, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0])),)
        token_ring += (gl.allocate_shared_memory(gl.float8e4nv, [BLOCK_M, 128], gl.NVMMASharedLayout(128, 8, rank=2)),)
        if INDEXED:
            index_ring += (gl.allocate_shared_memory(gl.uint8, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0])),)
    left_scales = gl.allocate_shared_memory(gl.float32, [HALF], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    right_scales = gl.allocate_shared_memory(gl.float32, [HALF], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    buffers = (words_ring, tables_ring, token_ring, index_ring, left_scales, right_scales)
    rings = (words_ring, tables_ring, token_ring, index_ring, ())
    shift = min(BLOCKS, 1) << 16
    programs = gl.num_programs(0)
    tiles = BLOCKS * columns
    tile = gl.program_id(0)
    expert = gl.load(of_block + min(tile, tiles - 1) // columns)
    next_tile = min(tile + programs, tiles - 1)
    next_expert = gl.load(of_block + next_tile // columns)
    if tile + programs >= tiles:
        next_expert = next_expert * 0 - 1
    packed_at, tables_at, index_at, row, row_of, firsts = _begin(
        *(min(tile, tiles - 1), max(expert, 0), expert >= 0, buffers, packed, tables, index, channel_scale, rows, N, K),
        *(COPY, TABLES_COPY, INDEX_COPY, TOKENS_COPY, SCALES_COPY, OUT, BLOCK_M, STAGES, GATED, INDEXED),
    )
    if SORTED:
        gdc_wait()
    tokens_at, is_token = _begin_tokens(
        expert >= 0, row, firsts, buffers, tokens, tables, ROWS, K, SHARE, TOKENS_COPY, STAGES, INDEXED
    )
    while expert >= 0:
        scales = gl.load(token_scale + row_of // SHARE, mask=row_of < ROWS, other=0.0)
        zeros = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, PRODUCT)
        sums_of = (zeros, warpgroup_mma_init(zeros), zeros, warpgroup_mma_init(zeros))
        for turn in range(groups // SLOTS):
            for slot in gl.static_range(SLOTS):
                sums_of = _multiply_group(
                    *(turn * SLOTS + slot, groups, slot, rings, packed_at, tables_at, tables, index_at),
                    *(tokens_at, is_token, tokens_at, is_token, sums_of, shift, STAGES, CHAIN, 0, INDEXED),
                    *(BY_PRODUCTS, slot == 0, 1, WORDS, FRAGMENT, BOTH, TABLES, TABLES_COPY, OPERAND, OPERAND),
                )
                packed_at += 16 * N
                tables_at += N
                index_at += N
                tokens_at += 128
        sums_of = _waited(sums_of, 0)  # no product lasts from one branch to the next
        for slot in gl.static_range(SLOTS - 1):
            if slot < groups % SLOTS:
                sums_of = _multiply_group(
                    *(groups // SLOTS * SLOTS + slot, groups, slot, rings),
                    *(packed_at, tables_at, tables, index_at, tokens_at, is_token, tokens_at, is_token, sums_of),
                    *(shift, STAGES, CHAIN, 0, INDEXED, BY_PRODUCTS, slot == 0, 0),
                    *(WORDS, FRAGMENT, BOTH, TABLES, TABLES_COPY, OPERAND, OPERAND),
                )
                packed_at += 16 * N
                tables_at += N
                index_at += N
                tokens_at += 128
        total = _add_up(sums_of, CHAIN, 0)[0]
        left_scale = left_scales.load(gl.SliceLayout(1, OUT))[:, None]
        right_scale = right_scales.load(gl.SliceLayout(1, OUT))[:, None]
        column = tile % columns
        out_row = row_of
        _barrier()  # all warps are done with what is copied to now
        tile = next_tile
        expert = next_expert
        following = tile + programs
        next_tile = min(following, tiles - 1)
        next_expert = gl.load(of_block + next_tile // columns)
        if following >= tiles:
            next_expert = next_expert * 0 - 1
        packed_at, tables_at, index_at, row, row_of, firsts = _begin(
            *(tile, max(expert, 0), expert >= 0, buffers, packed, tables, index, channel_scale, rows, N, K),
            *(COPY, TABLES_COPY, INDEX_COPY, TOKENS_COPY, SCALES_COPY, OUT, BLOCK_M, STAGES, GATED, INDEXED),
        )
        n = gl.arange(0, HALF, gl.SliceLayout(1, OUT))[:, None]
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))[None, :]
        _finish(
            *(total, m, out_row[None, :], scales[None, :], out_row, ROWS, N, n, column * STEP + n, column, columns),
            *(left_scale, right_scale, output, maxima, sums, 0, 0, counters, SPLITS, HALVES, False, ACTIVATION),
        )
        tokens_at, is_token = _begin_tokens(
            expert >= 0, row, firsts, buffers, tokens, tables, ROWS, K, SHARE, TOKENS_COPY, STAGES, INDEXED
        )
