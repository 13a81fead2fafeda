"""Experts over the LUT layout, a whole mixture in five launches: FP8 activations times the INT4 weights of few experts.

1. `_prepare_kernel` quantizes the tokens, and sorts the pairs of a token and one of its experts by expert, in blocks of
   `block_m` pairs that have the expert in common.
2. `_grouped_kernel` multiplies the tokens by gate and up projections: a block of pairs at a time, as `gpu.py` does it.
3. `_activate_kernel` applies the activation and quantizes its result, a pair at a time.
4. `_grouped_kernel` multiplies by the down projections.
5. `_combine_kernel` adds up each token's experts, in the order of the router's choices.

Sums have a fixed order, so results do not depend on which block comes first. Nothing waits for the host: how many
blocks there are at most is known from the number of tokens, and those without pairs end at once.

From Hopper on a launch may begin while the one before ends (programmatic dependent launch; `_EARLY` says which do): a
kernel waits for the one before it to be complete before it reads or writes anything, and lets the next one start.
"""

# Arguments of Triton functions have no Python types.
# ruff: noqa: ANN001, ANN202
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from convert_w4a8.kernels.fp8 import to_e4m3
from convert_w4a8.kernels.gemm.gpu import _INTERPRETED, _counters, _look_up, _multiprocessors
from convert_w4a8.kernels.gemm.grouped_reference import ACTIVATIONS

GROUP = 128
_SPLITS, _LEAST_PART = 8, 512
"""The most parts of K, and the least of their length."""
_SHORT_K = 1024
"""Up to here fewer copies in flight, and more blocks side by side, are the faster ones."""
_CHUNK = 1024
"""The most pairs that the sort looks at at once."""

Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Of E experts: codes int32 [E, K/32, 4·N], tables float8_e4m3fn [E, K/128, N, 8], channel scales float32 [E, N]."""


@dataclass(frozen=True)
class Launch:
    """How one grouped GEMM is cut.

    block_m: pairs of a block, a power of two from 16. block_n: output channels of a block. splits: parts of K. stages:
    copies in flight. chain: sum over K inside the tensor core, see `gpu.Launch`. columns: blocks of channels (and parts
    of K) that follow each other before the next block of pairs; None for all.
    """

    block_m: int
    splits: int
    block_n: int = 64
    stages: int = 4
    warps: int = 4
    chain: bool = False
    columns: int | None = None


def block_of_pairs(pairs: int, experts: int) -> int:
    """Return how many pairs a block takes: about as many as an expert has, if all have as many."""
    mean = pairs / experts
    for size, most in ((16, 9), (32, 24), (64, 64)):
        if mean <= most:
            return size
    return 128


def most_blocks(pairs: int, experts: int, block_m: int) -> int:
    """Return how many blocks the pairs fill at most, however they are spread over the experts."""
    full = min(pairs, experts)
    return full + (pairs - full) // block_m


def choose_launch(pairs: int, experts: int, n: int, k: int, multiprocessors: int) -> Launch:
    """Return how to cut a grouped GEMM of these pairs of tokens and experts where nothing was measured.

    Blocks of 128 channels if those fill the multiprocessors; K in parts until there are a few blocks for each.
    """
    block_m = block_of_pairs(pairs, experts)
    blocks = most_blocks(pairs, experts, block_m)
    block_n = 128 if blocks * (n // 128) >= 2 * multiprocessors else 64
    if block_m >= 64:
        return Launch(block_m, 1, 64, stages=3, chain=True, columns=16)
    splits = 1
    while 2 * splits <= min(_SPLITS, k // _LEAST_PART) and blocks * (n // block_n) * splits < 4 * multiprocessors:
        splits *= 2
    return Launch(block_m, splits, block_n, stages=3 if k <= _SHORT_K else 4)


def experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: Layer,
    down: Layer,
    expert_map: torch.Tensor | None,
    activation: str,
    launches: tuple[Launch, Launch] | None = None,
) -> torch.Tensor:
    """Run the experts that a router chose: bfloat16 [M, hidden], Σ_t weight[m, t] · expert[m, t](x[m]).

    x: bfloat16 [M, hidden]. topk_weights: float32 [M, T]. topk_ids: int32 or int64 [M, T]; an id of −1 is no expert.
    gate_up: K = hidden, N = 2·intermediate, the gate first. down: K = intermediate, N = hidden. expert_map: int32 [all
    experts], the place of an expert in these tensors, −1 for one that is not in them and adds nothing; None where the
    ids are places. activation: one of
    `grouped_reference.ACTIVATIONS`. launches: how to cut the two GEMMs; both with the same `block_m`.

    Activations are quantized per token, and per pair between the projections, as vLLM's W4A8 experts do it. ValueError
    for another activation, and for sizes that are not multiples of 128.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"experts with the activation {activation}")
    (m, hidden), choices = x.shape, topk_ids.shape[1]
    pairs, count, intermediate = m * choices, gate_up[0].shape[0], down[0].shape[1] * 32
    output = torch.empty(m, hidden, dtype=torch.bfloat16, device=x.device)
    if m == 0:
        return output
    if launches is None:
        sms = _multiprocessors(x.device)
        launches = (
            choose_launch(pairs, count, 2 * intermediate, hidden, sms),
            choose_launch(pairs, count, hidden, intermediate, sms),
        )
    block_m = launches[0].block_m
    blocks = most_blocks(pairs, count, block_m)
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    tokens = torch.empty(m, hidden, dtype=torch.float8_e4m3fn, device=x.device)
    rows, of_block = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (blocks * block_m, blocks))
    token_scale, pair_scale = (torch.empty(n, dtype=torch.float32, device=x.device) for n in (m, pairs))
    both = torch.empty(pairs, 2 * intermediate, dtype=torch.bfloat16, device=x.device)
    active = torch.empty(pairs, intermediate, dtype=torch.float8_e4m3fn, device=x.device)
    results = torch.empty(pairs, hidden, dtype=torch.bfloat16, device=x.device)
    chunk = min(_CHUNK, max(128, triton.next_power_of_2(pairs)))
    early = _early(x.device)
    mapping = {"expert_map": ids if expert_map is None else expert_map, "MAPPED": expert_map is not None}
    with torch.cuda.device_of(x):
        _prepare_kernel[(count + m,)](
            x.contiguous(),
            ids,
            tokens,
            token_scale,
            rows,
            of_block,
            hidden,
            pairs,
            count,
            blocks,
            BLOCK_M=block_m,
            BINS=max(128, triton.next_power_of_2(count)),
            CHUNK=chunk,
            ONE_CHUNK=pairs <= chunk,
            BLOCK_K=triton.next_power_of_2(hidden),
            num_warps=4 if hidden <= 4096 else 8,
            **mapping,
            **_order("prepare", early),
        )
        order = _order("gate_up", early)
        _multiply(tokens, token_scale, gate_up, both, rows, of_block, choices, launches[0], order)
        _activate_kernel[(pairs,)](
            both,
            ids,
            active,
            pair_scale,
            intermediate,
            BLOCK=triton.next_power_of_2(intermediate),
            ACTIVATION=activation,
            num_warps=4 if intermediate <= 2048 else 16,
            **mapping,
            **_order("activate", early),
        )
        _multiply(active, pair_scale, down, results, rows, of_block, 1, launches[1], _order("down", early))
        block = min(1024, triton.next_power_of_2(hidden))
        _combine_kernel[(triton.cdiv(hidden, block), m)](
            results,
            weights,
            ids,
            output,
            hidden,
            CHOICES=choices,
            BLOCK=block,
            num_warps=4,
            **mapping,
            **_order("combine", early),
        )
    return output


def _multiply(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    layer: Layer,
    output: torch.Tensor,
    rows: torch.Tensor,
    of_block: torch.Tensor,
    share: int,
    launch: Launch,
    order: dict[str, bool],
) -> None:
    """Multiply rows of tokens by their experts: `output[row] = tokens[row // share] · expert of the row's block`."""
    packed, tables, channel_scale = layer
    n, k = packed.shape[2] // 4, packed.shape[1] * 32
    if n % launch.block_n or k % GROUP:
        raise ValueError(f"experts of N = {n}, K = {k}: not multiples of {launch.block_n} and {GROUP}")
    blocks, columns = len(of_block), n // launch.block_n
    counters = _counters(output.device, blocks * columns) if launch.splits > 1 else None
    splits = launch.splits if counters is not None else 1
    sums = output  # not used without parts
    if splits > 1:
        shape = (splits, blocks * columns, launch.block_n * launch.block_m)
        sums = torch.empty(shape, dtype=torch.float32, device=output.device)
    _grouped_kernel[(blocks * columns * splits,)](
        tokens,
        packed,
        tables.view(torch.int64),
        token_scale,
        channel_scale,
        output,
        rows,
        of_block,
        sums,
        output if counters is None else counters,
        len(output),
        n,
        k,
        blocks,
        min(launch.columns or columns * splits, columns * splits),
        splits,
        share,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        STAGES=launch.stages,
        CHAIN=launch.chain,
        SPLIT=splits > 1,
        num_warps=launch.warps,
        **order,
    )


_LAUNCHES = ("prepare", "gate_up", "activate", "down", "combine")
_EARLY: frozenset[str] = frozenset()
"""Those that begin while the one before ends. None: all of them at once were slower for one token, faster for many."""


@cache
def _early(device: torch.device) -> frozenset[str]:
    """Return which launches begin early on a device; it can be done from compute capability 9.0 on."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return _EARLY if able else frozenset()


def _order(launch: str, early: frozenset[str]) -> dict[str, bool]:
    """Return the arguments of a launch that say whether it begins early, and whether the next one does."""
    begins = {"launch_pdl": True} if launch in early else {}
    following = _LAUNCHES[_LAUNCHES.index(launch) + 1 :]
    releases = bool(following) and following[0] in early
    return {"INTERPRETED": _INTERPRETED, "WAITS": launch in early, "RELEASES": releases, **begins}


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
def _token_scale(x):
    """Return the scale by which vLLM quantizes a token."""
    return tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), 448.0), 1.0 / (448.0 * 512.0))


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
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    ONE_CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    WAITS: tl.constexpr,
    RELEASES: tl.constexpr,
):
    """Program e < E: the pairs of expert e, in their order, and which blocks are its. Program E + m: token m in FP8."""
    if WAITS:
        gdc_wait()
    if RELEASES:
        gdc_launch_dependents()
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
        rest = count + tl.arange(0, BLOCK_M)
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
        scale = _token_scale(token)
        tl.store(tokens + m * K + k, _to_fp8(tl.div_rn(token, scale + 0 * token), INTERPRETED), mask=k < K)
        tl.store(token_scale + m, scale)


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
    INTERPRETED: tl.constexpr,
    WAITS: tl.constexpr,
    RELEASES: tl.constexpr,
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
    if WAITS:
        gdc_wait()
    if RELEASES:
        gdc_launch_dependents()
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
            weights = _look_up(tl.load(words_at), tl.load(tables_at), tl.load(tables_at + 8), BLOCK_N, INTERPRETED)
            x = tl.load(tokens_at, mask=row < ROWS, other=0.0)
            if CHAIN:
                total = tl.dot(weights, x, total)
            else:
                total += tl.dot(weights, x)
            words_at += 16 * N
            tables_at += N
            tokens_at += 128
        last = True
        if SPLIT:
            # As in gpu.py: the last block to arrive adds all parts, in the order of K.
            tile = block * columns + column
            stride = (BLOCKS * columns).to(tl.int64) * (BLOCK_M * BLOCK_N)
            sums_at = sums + tile.to(tl.int64) * (BLOCK_M * BLOCK_N)
            sums_at += tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N
            tl.store(sums_at + part * stride, total, mask=row < ROWS)
            tl.debug_barrier()
            last = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
            if last:
                tl.store(counters + tile, 0)
                total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
                for other in range(0, SPLITS, 4):
                    for next_ in tl.static_range(4):
                        mask = (row < ROWS) & (other + next_ < SPLITS)
                        total += tl.load(sums_at + (other + next_) * stride, mask=mask, other=0.0, cache_modifier=".cg")
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
    K,
    expert_map,
    MAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    WAITS: tl.constexpr,
    RELEASES: tl.constexpr,
):
    """Program r: activation(gate) · up of pair r, quantized; rounded to bfloat16 where vLLM's kernels round."""
    pair = tl.program_id(0).to(tl.int64)
    if WAITS:
        gdc_wait()
    if RELEASES:
        gdc_launch_dependents()
    k = tl.arange(0, BLOCK)
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
        product = _to_bf16(_to_bf16(gate, INTERPRETED).to(tl.float32) * up, INTERPRETED).to(tl.float32)
        scale = _token_scale(product)
        tl.store(active + pair * K + k, _to_fp8(tl.div_rn(product, scale + 0 * product), INTERPRETED), mask=k < K)
        tl.store(scales + pair, scale)


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
    INTERPRETED: tl.constexpr,
    WAITS: tl.constexpr,
    RELEASES: tl.constexpr,
):
    """Program (b, m): part b of the sum of token m's experts, in the order of the router's choices."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if WAITS:
        gdc_wait()
    if RELEASES:
        gdc_launch_dependents()
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(CHOICES):
        pair = m * CHOICES + choice
        here = _place(ids, pair, True, expert_map, MAPPED) >= 0
        result = tl.load(results + pair * N + n, mask=n < N, other=0.0).to(tl.float32)
        total += tl.load(weights + pair) * tl.where(here, result, 0.0)
    tl.store(output + m * N + n, _to_bf16(total, INTERPRETED), mask=n < N)
