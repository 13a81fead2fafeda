"""The GEMM over experts for Hopper where experts have many pairs, in Gluon: products overlap with lookups.

As `grouped_hopper_kernel`, but for the loop: while the tensor core multiplies one group, the weights of the next one
are looked up, into other registers. All groups are one chain of sums in the tensor core: where groups were added up
apart, the compiler copied sums that it was still at (`tests/support/compile_gemm_types.py` sees that). A block may have
two runs of pairs, BLOCK_M and REST, each a power of two: their weights are looked up once.
"""

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

from convert_w4a8.kernels.gemm.cluster_sums import barrier
from convert_w4a8.kernels.gemm.grouped_hopper_kernel import _activated
from convert_w4a8.kernels.gemm.hopper_lookups import _look_up, _spread, _tables_layout, _words_layout


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
    more_at,
    is_more,
    sums,
    STAGES: gl.constexpr,
    REST: gl.constexpr,
    INDEXED: gl.constexpr,
    OUTSTANDING: gl.constexpr,
    WORDS: gl.constexpr,
    FRAGMENT: gl.constexpr,
    BOTH: gl.constexpr,
    TABLES: gl.constexpr,
    TABLES_COPY: gl.constexpr,
    OPERAND: gl.constexpr,
    MORE_OPERAND: gl.constexpr,
):
    """Multiply a group, whose copies lie in the buffers SLOT, and start copies of the one STAGES - 1 later.

    sums: of both runs of pairs, which the tensor core may be at. Returned with one more group: OUTSTANDING products are
    not waited for.
    """
    words_ring, tables_ring, token_ring, index_ring, more_ring = rings
    SLOTS: gl.constexpr = STAGES + 1
    FILL: gl.constexpr = (SLOT + STAGES - 1) % SLOTS
    BLOCK_N: gl.constexpr = tables_ring[0].shape[0]
    TILES: gl.constexpr = BLOCK_N // 16
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
        if REST:
            async_copy.async_copy_global_to_shared(more_ring[FILL], more_at, mask=is_more)
    if INDEXED and group + 2 * STAGES - 2 < groups:
        async_copy.async_copy_global_to_shared(index_ring[(SLOT + 2 * STAGES - 2) % SLOTS], index_at)
    async_copy.commit_group()
    first, second = gl.split(both.reshape((TILES, 2, 8)).permute((0, 2, 1)))
    first = gl.convert_layout(first, TABLES, assert_trivial=True)
    second = gl.convert_layout(second, TABLES, assert_trivial=True)
    weights = _look_up(words, _spread(first), _spread(second), BLOCK_N)
    operand = gl.convert_layout(weights, OPERAND, assert_trivial=True)
    x = token_ring[SLOT].permute((1, 0))
    products = (warpgroup_mma(operand, x, sums[0], use_acc=True, is_async=True),)
    if REST:
        operand = gl.convert_layout(weights, MORE_OPERAND, assert_trivial=True)
        x = more_ring[SLOT].permute((1, 0))
        products += (warpgroup_mma(operand, x, sums[1], use_acc=True, is_async=True),)
    return _waited(products, OUTSTANDING, REST)


@gluon.jit
def _waited(products, OUTSTANDING: gl.constexpr, REST: gl.constexpr):
    """Return these products, of which those of so many groups are not waited for."""
    if REST:
        first, more = warpgroup_mma_wait(2 * OUTSTANDING, deps=(products[0], products[1]))
        waited = (warpgroup_mma_init(first), warpgroup_mma_init(more))
    else:
        first = warpgroup_mma_wait(OUTSTANDING, deps=(products[0],))
        waited = (warpgroup_mma_init(first),)
    return waited


@gluon.jit
def _finish(
    total,
    m,
    out_row,
    scales,
    row_of,
    ROWS,
    N,
    n,
    channel,
    column,
    columns,
    left_scale,
    right_scale,
    output,
    maxima,
    sums_at,
    stride,
    part,
    counter,
    SPLITS,
    HALVES: gl.constexpr,
    SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr,
):
    """Scale, activate and store the sums of a run of pairs, of the rows out_row, which are row_of in another layout."""
    BLOCK_N: gl.constexpr = total.shape[0]
    BLOCK_M: gl.constexpr = total.shape[1]
    HALF: gl.constexpr = BLOCK_N // 2
    SIZE: gl.constexpr = BLOCK_M * BLOCK_N
    AHEAD: gl.constexpr = 1 if SIZE > 4096 else max(4, 8192 // SIZE)
    OUT: gl.constexpr = gl.SliceLayout(2, HALVES)
    GATED: gl.constexpr = ACTIVATION is not None
    inside = (out_row < ROWS) & (n < HALF)
    halves = total.reshape((2, HALF, BLOCK_M)).permute((1, 2, 0))
    left, right = gl.split(gl.convert_layout(halves, HALVES))
    last = True
    if SPLIT:
        sums_at += m * BLOCK_N + n
        gl.store(sums_at + part * stride, left, mask=inside)
        gl.store(sums_at + part * stride + HALF, right, mask=inside)
        barrier()
        last = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
        if last:
            gl.store(counter, 0)
            left = gl.zeros((HALF, BLOCK_M), gl.float32, OUT)
            right = gl.zeros((HALF, BLOCK_M), gl.float32, OUT)
            for other in range(0, SPLITS, AHEAD):
                for ahead in gl.static_range(AHEAD):
                    mask = inside & (other + ahead < SPLITS)
                    at = sums_at + (other + ahead) * stride
                    left += gl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
                    right += gl.load(at + HALF, mask=mask, other=0.0, cache_modifier=".cg")
    if last:
        left = left * left_scale * scales
        right = right * right_scale * scales
        if GATED:
            activated = _activated(left, right, ACTIVATION)
            gl.store(output + out_row.to(gl.int64) * (N // 2) + channel, activated, mask=inside)
            largest = gl.max(gl.abs(activated.to(gl.float32)), 0)
            gl.store(maxima + row_of.to(gl.int64) * columns + column, largest, mask=row_of < ROWS)
        else:
            output_at = output + out_row.to(gl.int64) * N + channel
            gl.store(output_at, left.to(gl.bfloat16), mask=inside)
            gl.store(output_at + HALF, right.to(gl.bfloat16), mask=inside)


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
    SPLIT: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SORTED: gl.constexpr,
    INDEXED: gl.constexpr,
):
    """Multiply, as `grouped_hopper_kernel._grouped_kernel` does, which says what the arguments are."""
    WARPS: gl.constexpr = gl.num_warps()
    PAIRS: gl.constexpr = BLOCK_M + REST
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
    MORE: gl.constexpr = REST or 8
    MORE_PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, MORE, 32])
    MORE_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MORE_PRODUCT, 4)
    HALVES: gl.constexpr = gl.BlockedLayout([4, 1, 2], [HALF // 4, 128 // HALF, 1], [1, WARPS, 1], [2, 0, 1])
    OUT: gl.constexpr = gl.SliceLayout(2, HALVES)

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
            tables_ring += (gl.allocate_shared_memory(gl.int64, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0])),)
            token_ring += (
                gl.allocate_shared_memory(gl.float8e4nv, [BLOCK_M, 128], gl.NVMMASharedLayout(128, 8, rank=2)),
            )
            if INDEXED:
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
        tables_at = tables + of_tables + channels_of_tables
        index_at = index + of_tables + channels_of_index
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

        sums_of = (warpgroup_mma_init(gl.zeros((BLOCK_N, BLOCK_M), gl.float32, PRODUCT)),)
        if REST:
            sums_of += (warpgroup_mma_init(gl.zeros((BLOCK_N, REST), gl.float32, MORE_PRODUCT)),)
        rings = (words_ring, tables_ring, token_ring, index_ring, more_ring)
        for turn in range(groups // SLOTS):
            for slot in gl.static_range(SLOTS):
                sums_of = _multiply_group(
                    *(turn * SLOTS + slot, groups, slot, rings, packed_at, tables_at, tables, index_at),
                    *(tokens_at, is_token, more_at, is_more, sums_of, STAGES, REST, INDEXED, 1),
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
                sums_of = _multiply_group(
                    *(groups // SLOTS * SLOTS + slot, groups, slot, rings),
                    *(packed_at, tables_at, tables, index_at, tokens_at, is_token, more_at, is_more, sums_of),
                    *(STAGES, REST, INDEXED, 0, WORDS, FRAGMENT, BOTH, TABLES, TABLES_COPY, OPERAND, MORE_OPERAND),
                )
                packed_at += 16 * N
                tables_at += N
                index_at += N
                tokens_at += 128
                more_at += 128
        total = warpgroup_mma_wait(0, deps=(sums_of[0],))
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
