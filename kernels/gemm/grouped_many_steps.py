"""What a block of `grouped_many_kernel` does: with a group, in Gluon, and with the sums of all groups."""

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

from convert_w4a8.kernels.gemm.cluster_sums import barrier
from convert_w4a8.kernels.gemm.grouped_hopper_kernel import _activated
from convert_w4a8.kernels.gemm.hopper_kernel import _multiply_group as _multiply_as_layers
from convert_w4a8.kernels.gemm.hopper_lookups import _look_up, _spread


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
    total,
    sums,
    STAGES: gl.constexpr,
    CHAIN: gl.constexpr,
    REST: gl.constexpr,
    INDEXED: gl.constexpr,
    OVERLAP: gl.constexpr,
    WAIT: gl.constexpr,
    WORDS: gl.constexpr,
    FRAGMENT: gl.constexpr,
    BOTH: gl.constexpr,
    TABLES: gl.constexpr,
    TABLES_COPY: gl.constexpr,
    OPERAND: gl.constexpr,
    MORE_OPERAND: gl.constexpr,
):
    """Multiply a group, whose copies lie in the buffers SLOT, and start copies of the one STAGES - 1 later.

    tables: where the distinct tables are, if INDEXED: in memory with OVERLAP 3, else in shared memory. total: the sums
    of groups that were added up, without CHAIN. sums: of both runs of pairs, which the tensor core may be at. Both are
    returned with one more group. WAIT: for its products.
    """
    if OVERLAP == 3:
        sums = _multiply_ahead(
            *(group, groups, SLOT, rings, packed_at, tables_at, tables, index_at, tokens_at, is_token),
            *(more_at, is_more, sums, STAGES, REST, INDEXED, 0 if WAIT else 1),
            *(WORDS, FRAGMENT, BOTH, TABLES, TABLES_COPY, OPERAND, MORE_OPERAND),
        )
    else:
        total, product = _multiply_as_layers(
            *(group, groups, SLOT, (rings[0], rings[1], rings[2]), packed_at, tables_at, tables),
            *(tokens_at, is_token, total, sums[0], STAGES, CHAIN, INDEXED, OVERLAP),
            *(WORDS, FRAGMENT, BOTH, TABLES, OPERAND),
        )
        sums = (product,)
        if WAIT:
            sums = _waited(sums, 0, REST)
    return total, sums


@gluon.jit
def _multiply_ahead(
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
    """Do what `_multiply_group` does, in one chain, and look weights up while the tensor core is at the group before.

    Tables are gathered into the ring, if INDEXED: to have them in shared memory takes registers that there are not.
    OUTSTANDING: the products of so many groups are not waited for.
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
