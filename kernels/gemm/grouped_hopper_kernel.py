"""The GEMM over experts for Hopper, in Gluon: the loop of `hopper_kernel` over the experts of few tokens.

`hopper` says what Gluon is for, and `grouped` launches it. A block is some output channels and the pairs of one expert.
Its channels are two runs of HALF: gates and the ups that belong to them, where they are activated, else neighbours.
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

from convert_w4a8.kernels.gemm.apart import _look_up_apart, _signs
from convert_w4a8.kernels.gemm.cluster_sums import barrier
from convert_w4a8.kernels.gemm.hopper_lookups import _look_up, _spread, _tables_layout, _words_layout


@gluon.jit
def _activated(gate, up, ACTIVATION: gl.constexpr):
    """Return activation(gate) · up, bfloat16, as `grouped_kernels._activate_kernel` computes it."""
    gate = gate.to(gl.bfloat16).to(gl.float32)
    up = up.to(gl.bfloat16).to(gl.float32)
    if ACTIVATION == "silu":
        gate = gate / (1.0 + gl.exp(-gate))
    elif ACTIVATION == "gelu":
        gate = gate * 0.5 * (1.0 + gl.erf(gate * 0.7071067811865476))
    else:
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        gate = gate / (1.0 + gl.exp(-2.0 * inner))
    return (gate.to(gl.bfloat16).to(gl.float32) * up).to(gl.bfloat16)


@gluon.jit(do_not_specialize=["ROWS", "BLOCKS", "WIDTH", "SPLITS", "SHARE", "SHIFT"])
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
    SHIFT,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CHAIN: gl.constexpr,
    SPLIT: gl.constexpr,
    APART: gl.constexpr,
    BY_PRODUCTS: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SORTED: gl.constexpr,
    INDEXED: gl.constexpr,
):
    """Multiply, as `grouped_kernels._grouped_kernel` does.

    Launched while the kernel before still runs. SORTED: not that one says what rows the blocks have, so that weights
    can be on their way before its results are there. INDEXED: `tables` are the distinct ones, `index` says which of
    them each group of a channel has. APART: they are multiples of a scale, and looked up apart. ACTIVATION: of gates,
    where N are gates and ups: outputs are activated, with their largest magnitudes by row and block of channels in
    `maxima`. None: outputs are products.
    """
    WARPS: gl.constexpr = gl.num_warps()
    TILES: gl.constexpr = BLOCK_N // 16
    SIZE: gl.constexpr = BLOCK_M * BLOCK_N
    HALF: gl.constexpr = BLOCK_N // 2
    GATED: gl.constexpr = ACTIVATION is not None
    STEP: gl.constexpr = HALF if GATED else BLOCK_N
    AHEAD: gl.constexpr = 1 if SIZE > 4096 else max(4, 8192 // SIZE)
    FRAGMENT: gl.constexpr = gl.BlockedLayout([4, 1, 1, 1, 2], [1, 1, 8, 4, 1], [1, WARPS, 1, 1, 1], [4, 3, 2, 0, 1])
    WORDS: gl.constexpr = _words_layout(BLOCK_N, WARPS)
    COPY: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [2, WARPS // 2], [1, 0])
    TABLES: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, gl.SliceLayout(4, FRAGMENT)))
    BOTH: gl.constexpr = _tables_layout(BLOCK_N, WARPS)
    TABLES_COPY: gl.constexpr = gl.BlockedLayout([1 if INDEXED else 2], [32], [WARPS], [0])
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
        words_ring = gl.allocate_shared_memory(
            gl.int32, [STAGES, 4, 4 * BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        )
        tables_ring = gl.allocate_shared_memory(gl.int64, [STAGES, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        if INDEXED:
            index_ring = gl.allocate_shared_memory(gl.uint8, [STAGES, BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        token_ring = gl.allocate_shared_memory(
            gl.float8e4nv, [STAGES, BLOCK_M, 128], gl.NVMMASharedLayout(128, 8, rank=2)
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
                async_copy.async_copy_global_to_shared(words_ring.index(stage), packed_at + stage * 16 * N)
                if not INDEXED:
                    async_copy.async_copy_global_to_shared(tables_ring.index(stage), tables_at + stage * N)
            if INDEXED and stage + STAGES - 1 < groups:
                later = index_ring.index((stage + STAGES - 1) % STAGES)
                async_copy.async_copy_global_to_shared(later, index_at + (stage + STAGES - 1) * N)
        if INDEXED:
            for stage in gl.static_range(STAGES - 1):
                if stage < groups:
                    async_copy.async_copy_global_to_shared(tables_ring.index(stage), tables + firsts[stage])
        row = gl.load(rows + block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, TOKENS_COPY)))[:, None]
        inner = gl.arange(0, 128, gl.SliceLayout(0, TOKENS_COPY))[None, :]
        tokens_at = tokens + (row // SHARE).to(gl.int64) * K + (begin * 128 + inner)
        is_token = (row < ROWS) & (inner < 128)
        n = gl.arange(0, HALF, gl.SliceLayout(1, OUT))[:, None]
        m = gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT))[None, :]
        channel = column * STEP + n
        scales_at = channel_scale + expert.to(gl.int64) * N + channel
        left_scale = gl.load(scales_at)
        right_scale = gl.load(scales_at + apart)
        out_row = gl.load(rows + block * BLOCK_M + m)
        inside = (out_row < ROWS) & (n < HALF)
        if SORTED:
            gdc_wait()
        for stage in gl.static_range(STAGES - 1):
            if stage < groups:
                async_copy.async_copy_global_to_shared(token_ring.index(stage), tokens_at + stage * 128, mask=is_token)
            async_copy.commit_group()
        scales = gl.load(token_scale + out_row // SHARE, mask=out_row < ROWS, other=0.0)
        packed_at += (STAGES - 1) * 16 * N
        tables_at += (STAGES - 1) * N
        index_at += (2 * STAGES - 2) * N
        tokens_at += (STAGES - 1) * 128

        total = gl.zeros((BLOCK_N, BLOCK_M), gl.float32, PRODUCT)
        product = warpgroup_mma_init(total)
        if APART:
            subtracted = warpgroup_mma_init(total)
            shift = gl.full((4, TILES, 8, 4, 2), SHIFT, gl.int32, FRAGMENT)
            sign = gl.full((BLOCK_N,), 1.0, gl.float32, gl.SliceLayout(1, PRODUCT))
        slot = 0
        for group in range(groups):
            if APART:
                done, minus = warpgroup_mma_wait(0, deps=(product, subtracted))
                total += (done - minus) * sign[:, None]
                subtracted = warpgroup_mma_init(minus)
            else:
                done = warpgroup_mma_wait(0, deps=(product,))
                if not CHAIN:
                    total += done
            product = warpgroup_mma_init(done)
            async_copy.wait_group(STAGES - 2)
            fence_async_shared()
            # Copies first: the compiler may move no lookup before them, since what it reads comes after.
            fill = (slot + STAGES - 1) % STAGES
            if group + STAGES - 1 < groups:
                source = tables + index_ring.index(fill).load(TABLES_COPY) if INDEXED else tables_at
                async_copy.async_copy_global_to_shared(words_ring.index(fill), packed_at)
                async_copy.async_copy_global_to_shared(tables_ring.index(fill), source)
                async_copy.async_copy_global_to_shared(token_ring.index(fill), tokens_at, mask=is_token)
            packed_at += 16 * N
            tables_at += N
            tokens_at += 128
            words = gl.convert_layout(
                words_ring.index(slot).load(WORDS).reshape((4, TILES, 8, 4, 2)), FRAGMENT, assert_trivial=True
            )
            both = tables_ring.index(slot).load(BOTH).reshape((TILES, 2, 8)).permute((0, 2, 1))
            first, second = gl.split(both)
            first = gl.convert_layout(first, TABLES, assert_trivial=True)
            second = gl.convert_layout(second, TABLES, assert_trivial=True)
            if INDEXED and group + 2 * STAGES - 2 < groups:
                async_copy.async_copy_global_to_shared(index_ring.index((fill + STAGES - 1) % STAGES), index_at)
            async_copy.commit_group()
            index_at += N
            x = token_ring.index(slot).permute((1, 0))
            if APART:
                weights, negative = _look_up_apart(words, first, second, shift, BLOCK_N, BY_PRODUCTS)
                weights = gl.convert_layout(weights, OPERAND, assert_trivial=True)
                negative = gl.convert_layout(negative, OPERAND, assert_trivial=True)
                sign = _signs(first, second, BLOCK_N, gl.SliceLayout(1, PRODUCT))
                product = warpgroup_mma(weights, x, product, use_acc=False, is_async=True)
                subtracted = warpgroup_mma(negative, x, subtracted, use_acc=False, is_async=True)
            else:
                weights = gl.convert_layout(
                    _look_up(words, _spread(first), _spread(second), BLOCK_N), OPERAND, assert_trivial=True
                )
                product = warpgroup_mma(weights, x, product, use_acc=CHAIN, is_async=True)
            slot = (slot + 1) % STAGES
        if APART:
            done, minus = warpgroup_mma_wait(0, deps=(product, subtracted))
            total += (done - minus) * sign[:, None]
        else:
            done = warpgroup_mma_wait(0, deps=(product,))
            if CHAIN:
                total = done
            else:
                total += done
        halves = total.reshape((2, HALF, BLOCK_M)).permute((1, 2, 0))
        left, right = gl.split(gl.convert_layout(halves, HALVES))

        last = True
        if SPLIT:
            place = block * columns + column
            sums_at = sums + place.to(gl.int64) * SIZE + (m * BLOCK_N + n)
            stride = (BLOCKS * columns).to(gl.int64) * SIZE
            gl.store(sums_at + part * stride, left, mask=inside)
            gl.store(sums_at + part * stride + HALF, right, mask=inside)
            barrier()
            last = gl.atomic_add(counters + place, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
            if last:
                gl.store(counters + place, 0)
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
                row_of = gl.load(rows + block * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(0, OUT)))
                gl.store(maxima + row_of.to(gl.int64) * columns + column, largest, mask=row_of < ROWS)
            else:
                output_at = output + out_row.to(gl.int64) * N + channel
                gl.store(output_at, left.to(gl.bfloat16), mask=inside)
                gl.store(output_at + HALF, right.to(gl.bfloat16), mask=inside)
