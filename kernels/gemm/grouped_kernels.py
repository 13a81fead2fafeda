"""The kernels that `grouped.py` launches for the experts of a mixture, which says what each is for."""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from convert_w4a8.kernels.fp8 import to_e4m3
from convert_w4a8.kernels.gemm.device_code import add_parts, look_up, settled


@triton.jit
def _place(ids, index, mask, expert_map, MAPPED: tl.constexpr):
    """Return the places of the experts of pairs in this rank's tensors, −1 for none."""
    chosen = tl.load(ids + index, mask=mask, other=-1).to(tl.int32)
    if MAPPED:
        chosen = tl.load(expert_map + chosen, mask=mask & (chosen >= 0), other=-1).to(tl.int32)
    return chosen


@triton.jit
def _to_fp8(x, INTERPRETED: tl.constexpr):
    """Round to the nearest E4M3 numbers; the interpreter's own conversion is wrong."""
    if INTERPRETED:
        return to_e4m3(x).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    return tl.minimum(tl.maximum(x, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _to_bf16(x, INTERPRETED: tl.constexpr):
    """Round to the nearest bfloat16 numbers; the interpreter's own conversion cuts off."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def _quantize(x, largest, fp8_at, scale_at, mask, INTERPRETED: tl.constexpr):
    """Leave x in FP8, and its scale, as vLLM quantizes a token whose largest magnitude is that."""
    scale = tl.maximum(tl.div_rn(largest, 448.0), 1.0 / (448.0 * 512.0))
    tl.store(fp8_at, _to_fp8(tl.div_rn(x, scale + 0 * x), INTERPRETED), mask=mask)
    tl.store(scale_at, scale)


@triton.jit(do_not_specialize=["PAIRS", "E", "BLOCKS"])
def _prepare_kernel(
    x,
    ids,
    tokens,
    token_scale,
    rows,
    of_block,
    K,
    PAIRS,
    E,
    BLOCKS,
    expert_map,
    MAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LEAST: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program e < E: the pairs of expert e, in their order, and which blocks are its. Program E + m: token m in FP8.

    LEAST: the least power of two from BLOCK_M on.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    if program < E:
        bins = tl.arange(0, BINS)
        index = tl.arange(0, CHUNK)
        place = _place(ids, index, index < PAIRS, expert_map, MAPPED)
        pairs_of = tl.histogram(tl.where(place < 0, 0, place), BINS, mask=place >= 0)
        if not ONE_CHUNK:
            for begin in range(CHUNK, PAIRS, CHUNK):
                other = _place(ids, begin + index, begin + index < PAIRS, expert_map, MAPPED)
                pairs_of += tl.histogram(tl.where(other < 0, 0, other), BINS, mask=other >= 0)
        blocks_of = (pairs_of + BLOCK_M - 1) // BLOCK_M
        first = tl.sum(tl.where(bins < program, blocks_of, 0))
        mine = tl.sum(tl.where(bins == program, blocks_of, 0))
        count = tl.sum(tl.where(bins == program, pairs_of, 0))
        match = (place == program).to(tl.int32)
        tl.store(rows + first * BLOCK_M + tl.cumsum(match, 0) - 1, index, mask=match != 0)
        if not ONE_CHUNK:
            seen = first * BLOCK_M + tl.sum(match)
            for begin in range(CHUNK, PAIRS, CHUNK):
                other = _place(ids, begin + index, begin + index < PAIRS, expert_map, MAPPED)
                match = (other == program).to(tl.int32)
                tl.store(rows + seen + tl.cumsum(match, 0) - 1, begin + index, mask=match != 0)
                seen += tl.sum(match)
        rest = count + tl.arange(0, LEAST)
        tl.store(rows + first * BLOCK_M + rest, PAIRS + 0 * rest, mask=rest < mine * BLOCK_M)
        for begin in range(0, mine, 16):
            block = begin + tl.arange(0, 16)
            tl.store(of_block + first + block, program + 0 * block, mask=block < mine)
        if program == 0:
            used = tl.sum(blocks_of)
            for begin in range(used, BLOCKS, 16):
                block = begin + tl.arange(0, 16)
                tl.store(of_block + block, 0 * block - 1, mask=block < BLOCKS)
    else:
        m = (program - E).to(tl.int64)
        k = tl.arange(0, BLOCK_K)
        token = tl.load(x + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        _quantize(token, tl.max(tl.abs(token), 0), tokens + m * K + k, token_scale + m, k < K, INTERPRETED)


@triton.jit(do_not_specialize=["ROWS", "BLOCKS", "WIDTH", "SPLITS", "SHARE"])
def _grouped_kernel(
    tokens,
    packed,
    tables,
    token_scale,
    channel_scale,
    output,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
    SPLIT: tl.constexpr,
    HOPPER: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    columns = N // BLOCK_N
    program = tl.program_id(0)
    before = program // (WIDTH * BLOCKS) * WIDTH
    width = tl.minimum(columns * SPLITS - before, WIDTH)
    inside = program % (WIDTH * BLOCKS)
    block = inside // width
    column = before + inside % width
    part = column // columns
    column = column % columns
    begin = (K // 128 * part) // SPLITS
    end = (K // 128 * (part + 1)) // SPLITS
    expert = tl.load(of_block + block)
    if expert >= 0:
        words_at = packed + expert.to(tl.int64) * (K // 32) * (4 * N) + begin.to(tl.int64) * (16 * N)
        words_at += tl.arange(0, 4)[:, None].to(tl.int64) * (4 * N)
        words_at += column * (4 * BLOCK_N) + tl.arange(0, 4 * BLOCK_N)[None, :]
        row = tl.load(rows + block * BLOCK_M + tl.arange(0, BLOCK_M))[None, :]
        half = tl.arange(0, BLOCK_N // 2)
        tables_at = tables + (expert.to(tl.int64) * (K // 128) + begin) * N
        tables_at += column * BLOCK_N + half // 8 * 16 + half % 8
        tokens_at = tokens + (row // SHARE).to(tl.int64) * K + begin * 128 + tl.arange(0, 128)[:, None]
        n = column * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
        scale_at = channel_scale + expert.to(tl.int64) * N + n
        if not SPLIT:  # here, not to wait for them at the end
            scale = tl.load(scale_at)
            scale_of_row = tl.load(token_scale + row // SHARE, mask=row < ROWS, other=0.0)
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for _ in tl.range(begin, end, num_stages=STAGES):
            weights = look_up(tl.load(words_at), tl.load(tables_at), tl.load(tables_at + 8), BLOCK_N, INTERPRETED)
            x = tl.load(tokens_at, mask=row < ROWS, other=0.0)
            if CHAIN:
                total = settled(tl.dot(weights, x, total), HOPPER)
            else:
                total += tl.dot(weights, x)
            words_at += 16 * N
            tables_at += N
            tokens_at += 128
        last = True
        if SPLIT:
            tile = block * columns + column
            stride = (BLOCKS * columns).to(tl.int64) * (BLOCK_M * BLOCK_N)
            sums_at = sums + tile.to(tl.int64) * (BLOCK_M * BLOCK_N)
            sums_at += tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N
            last, total = add_parts(total, sums_at, stride, part, counters + tile, SPLITS, row < ROWS)
        if last:
            if SPLIT:
                scale = tl.load(scale_at)
                scale_of_row = tl.load(token_scale + row // SHARE, mask=row < ROWS, other=0.0)
            scaled = _to_bf16(total * scale * scale_of_row, INTERPRETED)
            tl.store(output + row.to(tl.int64) * N + n, scaled, mask=row < ROWS)


@triton.jit
def _activate_kernel(
    both,
    ids,
    active,
    scales,
    maxima,
    K,
    expert_map,
    MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (r, b): part b of activation(gate) · up of pair r; rounded to bfloat16 where vLLM's kernels round.

    WHOLE: there is one part, which is quantized. Otherwise it is left in the place of the gate, with its largest
    magnitude in `maxima`, for `_quantize_pairs_kernel`.
    """
    pair = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + pair * (2 * K) + k, mask=k < K, other=0.0).to(tl.float32)
    up = tl.load(both + pair * (2 * K) + K + k, mask=k < K, other=0.0).to(tl.float32)
    if _place(ids, pair, True, expert_map, MAPPED) >= 0:
        if ACTIVATION == "silu":
            gate = gate / (1.0 + tl.exp(-gate))
        elif ACTIVATION == "gelu":
            gate = gate * 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        else:
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            gate = gate / (1.0 + tl.exp(-2.0 * inner))  # 0.5 · (1 + tanh(inner)) is the sigmoid of 2 · inner
        product = _to_bf16(_to_bf16(gate, INTERPRETED).to(tl.float32) * up, INTERPRETED)
        if WHOLE:
            product = product.to(tl.float32)
            _quantize(product, tl.max(tl.abs(product), 0), active + pair * K + k, scales + pair, k < K, INTERPRETED)
        else:
            tl.store(both + pair * (2 * K) + k, product, mask=k < K)
            largest = tl.max(tl.abs(product.to(tl.float32)), 0)
            tl.store(maxima + pair * tl.num_programs(1) + tl.program_id(1), largest)


@triton.jit
def _quantize_pairs_kernel(
    both,
    ids,
    active,
    scales,
    maxima,
    K,
    WIDTH,
    MAXIMA,
    expert_map,
    MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (r, b): part b of the activations of pair r in FP8.

    WIDTH: of a row of `both`. MAXIMA: largest magnitudes of a pair; PARTS of them at most, a power of two.
    """
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    pair = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    if _place(ids, pair, True, expert_map, MAPPED) >= 0:
        here = part < MAXIMA
        largest = tl.max(tl.load(maxima + pair * MAXIMA + part, mask=here, other=0.0), 0)
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        product = tl.load(both + pair * WIDTH + k, mask=k < K, other=0.0).to(tl.float32)
        _quantize(product, largest, active + pair * K + k, scales + pair, k < K, INTERPRETED)


@triton.jit
def _combine_kernel(
    results,
    weights,
    ids,
    output,
    N,
    expert_map,
    MAPPED: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Program (m, b): part b of the sum of token m's experts, in the order of the router's choices."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    m = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):
        pair = m * CHOICES + choice
        here = _place(ids, pair, True, expert_map, MAPPED) >= 0
        result = tl.load(results + pair * N + n, mask=n < N, other=0.0).to(tl.float32)
        total += tl.load(weights + pair) * tl.where(here, result, 0.0)
    tl.store(output + m * N + n, _to_bf16(total, INTERPRETED), mask=n < N)
