"""The GEMM over experts for Hopper in an unrolled loop, in Gluon; with many pairs, products overlap with lookups.

As `grouped_hopper_kernel`, but for the loop, which is that of `hopper_kernel`. With OVERLAP 3, while the tensor core
multiplies one group, the weights of the next one are looked up, into other registers. All groups are one chain of sums
in the tensor core then: where groups were added up apart, the compiler copied sums that it was still at
(`tests/support/compile_gemm_types.py` sees that). A block may have two runs of pairs, BLOCK_M and REST, each a power of
two: their weights are looked up once.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, assignment"

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma_init, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from convert_w4a8.kernels.gemm.grouped_many_steps import _finish, _multiply_group, _waited
from convert_w4a8.kernels.gemm.hopper_lookups import _entries_in_shared, _tables_layout, _words_layout


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
    REST: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CHAIN: gl.constexpr,
    OVERLAP: gl.constexpr,
    SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SORTED: gl.constexpr,
    INDEXED: gl.constexpr,
):
    """Multiply, as `grouped_hopper_kernel._grouped_kernel` does, which says what the arguments are."""
    WARPS: gl.constexpr = gl.num_warps()
    PAIRS: gl.constexpr = BLOCK_M + REST
    GATHER: gl.constexpr = INDEXED and OVERLAP == 3
    SLOTS: gl.constexpr = STAGES + 1 if OVERLAP else STAGES
    HALF: gl.constexpr = BLOCK_N // 2
    GATED: gl.constexpr = ACTIVATION is not None
    STEP: gl.constexpr = HALF if GATED else BLOCK_N
    FRAGMENT: gl.constexpr = gl.BlockedLayout([4, 1, 1, 1, 2], [1, 1, 8, 4, 1], [1, WARPS, 1, 1, 1], [4, 3, 2, 0, 1])
    WORDS: gl.constexpr = _words_layout(BLOCK_N, WARPS)
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, WARPS // 2], [1, 0])
    TABLES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT)))
    BOTH: gl.constexpr = _tables_layout(BLOCK_N, WARPS)
    TABLES_COPY: gl.constexpr = gl.BlockedLayout([1 if GATHER else 16 if INDEXED else 2], [32], [WARPS], [0])
    SCALES_COPY: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    INDEX_COPY: gl.constexpr = gl.BlockedLayout([16], [32], [WARPS], [0])
    TOKENS_COPY: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [WARPS, 1], [1, 0])
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 32])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PRODUCT, 4)
    MORE: gl.constexpr = REST or 8
    MORE_PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, MORE, 32])
    MORE_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MORE_PRODUCT, 4)
    HALVES: gl.constexpr = gl.BlockedLayout([4, 1, 2], [HALF // 4, 128 // HALF, 1], [1, WARPS, 1], [2, 0, 1])
    OUT: gl.constexpr = gl.SliceLayout(2, HALVES)
    TABLE: gl.constexpr = gl.uint8 if INDEXED and not GATHER else gl.int64

    if not SORTED:
        gdc_wait()
    gdc_launch_dependents()  # not before: what comes then reads what was waited for here, and waits for this alone
    columns = N // BLOCK_N
    program = gl.program_id(0)
    before = program // (WIDTH * BLOCKS) * WIDTH
    width = min(columns * SPLITS - before, WIDTH)
    within = program % (WIDTH * BLOCKS)
    block = within // width
    column = before + within % width
    part = column // columns
    column = column % columns
    begin = (K // 128 * part) // SPLITS
    groups = (K // 128 * (part + 1)) // SPLITS - begin
    expert = gl.load(of_block + block)
    if SORTED:  # noqa: SIM102 - which the compiler knows
        if expert < 0:
            gdc_wait()  # what comes after waits for this kernel alone, even if all of its blocks are empty
    if expert >= 0:
        # Each buffer by itself: the compiler sees that copies into one have no need to wait for reads of another.
        words_ring = ()
        tables_ring = ()
        token_ring = ()
        index_ring = ()
        more_ring = ()
        for _ in gl.static_range(SLOTS):
            words_ring += (
                gl.allocate_shared_memory(gl.int32, [4, 4 * BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])),
            )
            tables_ring += (gl.allocate_shared_memory(TABLE, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0])),)
            token_ring += (
                gl.allocate_shared_memory(gl.float8e4nv, [BLOCK_M, 128], gl.NVMMASharedLayout(128, 8, rank=2)),
            )
            if GATHER:
                index_ring += (gl.allocate_shared_memory(gl.uint8, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0])),)
            if REST:
                more_ring += (
                    gl.allocate_shared_memory(gl.float8e4nv, [REST, 128], gl.NVMMASharedLayout(128, 8, rank=2)),
                )
        tile = gl.arange(0, 4, gl.SliceLayout(1, COPY))[:, None]
        word = gl.arange(0, 4 * BLOCK_N, gl.SliceLayout(0, COPY))[None, :]
        channels_of_tables = gl.arange(0, BLOCK_N, TABLES_COPY)
        channels_of_index = gl.arange(0, BLOCK_N, INDEX_COPY)
        apart = N // 256 * 128 if GATED else HALF
        if GATED:
            word += word // (4 * HALF) * (4 * (apart - HALF))
            channels_of_tables += channels_of_tables // HALF * (apart - HALF)
            channels_of_index += channels_of_index // HALF * (apart - HALF)
        first_group = expert.to(gl.int64) * (K // 128) + begin
        packed_at = packed + (first_group * 4 + tile) * (4 * N) + (column * (4 * STEP) + word)
        of_tables = first_group * N + column * STEP
        group_tables = index if INDEXED and not GATHER else tables
        tables_at = group_tables + of_tables + channels_of_tables
        index_at = index + of_tables + channels_of_index
        firsts = ()
        if GATHER:
            for stage in gl.static_range(STAGES - 1):
                firsts += (gl.load(index + of_tables + min(stage, groups - 1) * N + channels_of_tables),)
        for stage in gl.static_range(STAGES - 1):
            if stage < groups:
                async_copy.async_copy_global_to_shared(words_ring[stage], packed_at + stage * 16 * N)
                if not GATHER:
                    async_copy.async_copy_global_to_shared(tables_ring[stage], tables_at + stage * N)
            if GATHER and stage + STAGES - 1 < groups:
                async_copy.async_copy_global_to_shared(
                    index_ring[(stage + STAGES - 1) % SLOTS], index_at + (stage + STAGES - 1) * N
                )
        if GATHER:
            for stage in gl.static_range(STAGES - 1):
                if stage < groups:
                    async_copy.async_copy_global_to_shared(tables_ring[stage], tables + firsts[stage])
        distinct = _entries_in_shared(tables) if INDEXED and not GATHER else tables
        places = rows + block * PAIRS
        inner = gl.arange(0, 128, gl.SliceLayout(0, TOKENS_COPY))[None, :]
        row = gl.load(places + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TOKENS_COPY)))[:, None]
        tokens_at = tokens + (row // SHARE).to(gl.int64) * K + (begin * 128 + inner)
        is_token = (row < ROWS) & (inner < 128)
        more_at = tokens_at
        is_more = is_token
        if REST:
            row = gl.load(places + BLOCK_M + gl.arange(0, REST, gl.SliceLayout(1, TOKENS_COPY)))[:, None]
            more_at = tokens + (row // SHARE).to(gl.int64) * K + (begin * 128 + inner)
            is_more = (row < ROWS) & (inner < 128)
        n = gl.arange(0, HALF, gl.SliceLayout(1, OUT))[:, None]
        channel = column * STEP + n
        left_scales = gl.allocate_shared_memory(gl.float32, [HALF], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        right_scales = gl.allocate_shared_memory(gl.float32, [HALF], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        scales_at = channel_scale + expert.to(gl.int64) * N + column * STEP + gl.arange(0, HALF, SCALES_COPY)
        async_copy.async_copy_global_to_shared(left_scales, scales_at)
        async_copy.async_copy_global_to_shared(right_scales, scales_at + apart)
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))
        more_m = gl.arange(0, MORE, gl.SliceLayout(0, OUT))
        row_of = gl.load(places + m)
        if REST:
            more_row_of = gl.load(places + BLOCK_M + more_m)
        if SORTED:
            gdc_wait()
        for stage in gl.static_range(STAGES - 1):
            if stage < groups:
                async_copy.async_copy_global_to_shared(token_ring[stage], tokens_at + stage * 128, mask=is_token)
                if REST:
                    async_copy.async_copy_global_to_shared(more_ring[stage], more_at + stage * 128, mask=is_more)
            async_copy.commit_group()
        # Needed at the end again; until then registers are for sums.
        scales = gl.load(token_scale + row_of // SHARE, mask=row_of < ROWS, other=0.0)
        rows_kept = gl.allocate_shared_memory(gl.int32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]), row_of)
        scales_kept = gl.allocate_shared_memory(gl.float32, [BLOCK_M], gl.SwizzledSharedLayout(1, 1, 1, [0]), scales)
        if REST:
            scales = gl.load(token_scale + more_row_of // SHARE, mask=more_row_of < ROWS, other=0.0)
            flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
            more_rows_kept = gl.allocate_shared_memory(gl.int32, [REST], flat, more_row_of)
            more_scales_kept = gl.allocate_shared_memory(gl.float32, [REST], flat, scales)
        packed_at += (STAGES - 1) * 16 * N
        tables_at += (STAGES - 1) * N
        index_at += (2 * STAGES - 2) * N
        tokens_at += (STAGES - 1) * 128
        more_at += (STAGES - 1) * 128

        total = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, PRODUCT)
        sums_of = (warpgroup_mma_init(total),)
        if REST:
            sums_of += (warpgroup_mma_init(gl.zeros((BLOCK_N, REST), gl.float32, MORE_PRODUCT)),)
        rings = (words_ring, tables_ring, token_ring, index_ring, more_ring)
        for turn in range(groups // SLOTS):
            for slot in gl.static_range(SLOTS):
                total, sums_of = _multiply_group(
                    *(turn * SLOTS + slot, groups, slot, rings, packed_at, tables_at, distinct, index_at),
                    *(tokens_at, is_token, more_at, is_more, total, sums_of),
                    *(STAGES, CHAIN, REST, INDEXED, OVERLAP, False),
                    *(WORDS, FRAGMENT, BOTH, TABLES, TABLES_COPY, OPERAND, MORE_OPERAND),
                )
                packed_at += 16 * N
                tables_at += N
                index_at += N
                tokens_at += 128
                more_at += 128
        sums_of = _waited(sums_of, 0, REST)  # no product lasts from one branch to the next
        for slot in gl.static_range(SLOTS - 1):
            if slot < groups % SLOTS:
                total, sums_of = _multiply_group(
                    *(groups // SLOTS * SLOTS + slot, groups, slot, rings),
                    *(packed_at, tables_at, distinct, index_at, tokens_at, is_token, more_at, is_more),
                    *(total, sums_of, STAGES, CHAIN, REST, INDEXED, OVERLAP, True),
                    *(WORDS, FRAGMENT, BOTH, TABLES, TABLES_COPY, OPERAND, MORE_OPERAND),
                )
                packed_at += 16 * N
                tables_at += N
                index_at += N
                tokens_at += 128
                more_at += 128
        done = warpgroup_mma_wait(0, deps=(sums_of[0],))
        total = done if CHAIN else total + done
        place = block * columns + column
        stride = (BLOCKS * columns).to(gl.int64) * (BLOCK_M * BLOCK_N)
        left_scale = left_scales.load(gl.SliceLayout(1, OUT))[:, None]
        right_scale = right_scales.load(gl.SliceLayout(1, OUT))[:, None]
        common = (ROWS, N, n, channel, column, columns, left_scale, right_scale, output, maxima)
        sums_at = sums + place.to(gl.int64) * (BLOCK_M * BLOCK_N)
        row_of = rows_kept.load(gl.SliceLayout(0, OUT))
        scales = scales_kept.load(gl.SliceLayout(0, OUT))
        _finish(
            *(total, m[None, :], row_of[None, :], scales[None, :], row_of),
            *common,
            *(sums_at, stride, part, counters + place, SPLITS, HALVES, SPLIT, ACTIVATION),
        )
        if REST:
            more_total = warpgroup_mma_wait(0, deps=(sums_of[1],))
            row_of = more_rows_kept.load(gl.SliceLayout(0, OUT))
            scales = more_scales_kept.load(gl.SliceLayout(0, OUT))
            _finish(
                *(more_total, more_m[None, :], row_of[None, :], scales[None, :], row_of),
                *common,
                *(sums_at, stride, part, counters + place, SPLITS, HALVES, False, ACTIVATION),
            )
