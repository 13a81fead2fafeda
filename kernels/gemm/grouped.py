"""Experts over the LUT layout, a whole mixture in five or six launches: FP8 activations times INT4 weights of experts.

1. `_prepare_kernel` quantizes the tokens, and sorts the pairs of a token and one of its experts by expert, in blocks of
   `block_m` pairs that have the expert in common.
2. `_grouped_kernel` multiplies the tokens by gate and up projections: a block of pairs at a time, as `gpu.py` does it.
3. `_activate_kernel` applies the activation and quantizes its result, a pair at a time; a long one in parts, for which
   the largest magnitude must be known: then `_quantize_pairs_kernel` follows. On Hopper step 2 applies it, and only
   that one follows.
4. `_grouped_kernel` multiplies by the down projections.
5. `_combine_kernel` adds up each token's experts, in the order of the router's choices.

Sums have a fixed order, so results do not depend on which block comes first. Nothing waits for the host: how many
blocks there are at most is known from the number of tokens, and those without pairs end at once.
"""

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
import triton

from convert_w4a8.kernels.gemm import grouped_launch, workspace
from convert_w4a8.kernels.gemm.device_code import INTERPRETED
from convert_w4a8.kernels.gemm.grouped_kernels import (
    _activate_kernel,
    _combine_kernel,
    _grouped_kernel,
    _prepare_kernel,
    _quantize_pairs_kernel,
)
from convert_w4a8.kernels.gemm.grouped_launch import Launch, choose_launches, most_blocks
from convert_w4a8.kernels.gemm.grouped_reference import ACTIVATIONS

GROUP = 128
_CHUNK = 2048
"""The most pairs that the sort looks at at once."""
_WHOLE, _PART = 2048, 1024
"""The longest activations that one program quantizes, and the parts of longer ones."""

Layer = tuple[torch.Tensor, ...]
"""Of E experts: codes int32 [E, K/32, 4·N], tables float8_e4m3fn [E, K/128, N, 8], channel scales float32 [E, N]; and,
where tables are few, the same as indices uint8 [E, K/128, N] into distinct ones float8_e4m3fn [256, 8]."""


def most_pairs(experts: int) -> int:
    """Return the pairs of tokens and experts up to which what is launched depends on their number."""
    return max(grouped_launch.most_pairs(experts), _CHUNK) + 1


def compiled_for(
    pairs: int, experts: int, hidden: int, intermediate: int, device: torch.device, *, hopper: bool = False
) -> set[Hashable]:
    """Return what the kernels for these pairs are compiled for, each with its name: those that are the same are one.

    Left out is what does not depend on the number of pairs; it is in `sizes` of each.
    """
    sizes = experts, hidden, intermediate
    launches = choose_launches(pairs, *sizes, workspace.multiprocessors(device), hopper=hopper)
    # Those for Hopper are compiled for one of the two GEMMs.
    multiply = {
        ("multiply", place if hopper else None, replace(launch, splits=min(launch.splits, 2), columns=None))
        for place, launch in enumerate(launches)
    }
    return {("prepare", sizes, launches[0].block_m, _chunk(pairs), pairs <= _CHUNK), *multiply}


def _chunk(pairs: int) -> int:
    return min(_CHUNK, max(128, int(triton.next_power_of_2(pairs))))


def experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    gate_up: Layer,
    down: Layer,
    expert_map: torch.Tensor | None,
    activation: str,
    launches: tuple[Launch, Launch] | None = None,
    *,
    hopper: bool = False,
) -> torch.Tensor:
    """Run the experts that a router chose: bfloat16 [M, hidden], Σ_t weight[m, t] · expert[m, t](x[m]).

    x: bfloat16 [M, hidden]. topk_weights: float32 [M, T]. topk_ids: int32 or int64 [M, T]; an id of −1 is no expert.
    gate_up: K = hidden, N = 2·intermediate, the gate first. down: K = intermediate, N = hidden. expert_map: int32 [all
    experts], the place of an expert in these tensors, −1 for one that is not in them and adds nothing; None where the
    ids are places: none may be beyond the tensors then. activation: one of
    `grouped_reference.ACTIVATIONS`. launches: how to cut the two GEMMs; both with the same `block_m`. hopper: multiply
    by the kernel for Hopper, in Gluon, and launch everything before what is ahead of it has ended.

    Activations are quantized per token, and per pair between the projections, as vLLM's W4A8 experts do it; on a GPU a
    NaN becomes a finite number there. ValueError for another activation, and for sizes that are not multiples of 128.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"experts with the activation {activation}")
    (m, hidden), choices = x.shape, topk_ids.shape[1]
    pairs, count, intermediate = m * choices, gate_up[0].shape[0], down[0].shape[1] * 32
    output = torch.empty(m, hidden, dtype=torch.bfloat16, device=x.device)
    if m == 0:
        return output
    if launches is None:
        sms = workspace.multiprocessors(x.device)
        launches = choose_launches(pairs, count, hidden, intermediate, sms, hopper=hopper)
    block_m = launches[0].block_m
    blocks = most_blocks(pairs, count, block_m)
    ids, weights = topk_ids.contiguous(), topk_weights.contiguous()
    tokens = torch.empty(m, hidden, dtype=torch.float8_e4m3fn, device=x.device)
    rows, of_block = (torch.empty(n, dtype=torch.int32, device=x.device) for n in (blocks * block_m, blocks))
    token_scale, pair_scale = (torch.empty(n, dtype=torch.float32, device=x.device) for n in (m, pairs))
    # On Hopper gates and ups are activated where they are multiplied.
    width = intermediate if hopper else 2 * intermediate
    both = torch.empty(pairs, width, dtype=torch.bfloat16, device=x.device)
    active = torch.empty(pairs, intermediate, dtype=torch.float8_e4m3fn, device=x.device)
    block = triton.next_power_of_2(intermediate) if intermediate <= _WHOLE else _PART
    parts = triton.cdiv(intermediate, block)
    count_of_maxima = 2 * intermediate // launches[0].block_n if hopper else parts
    maxima = torch.empty(pairs, count_of_maxima, dtype=torch.float32, device=x.device)
    results = torch.empty(pairs, hidden, dtype=torch.bfloat16, device=x.device)
    chunk = _chunk(pairs)
    mapping = {"expert_map": ids if expert_map is None else expert_map, "MAPPED": expert_map is not None}
    # A grid has at most 65,535 programs along its second dimension; pairs may be more.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
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
            LEAST=triton.next_power_of_2(block_m),
            BINS=max(128, triton.next_power_of_2(count)),
            CHUNK=chunk,
            ONE_CHUNK=pairs <= chunk,
            BLOCK_K=triton.next_power_of_2(hidden),
            num_warps=4 if hidden <= 2048 else 8,
            EARLY=hopper,
            launch_pdl=hopper,
            **mapping,
            INTERPRETED=INTERPRETED,
        )
        _multiply(
            tokens,
            token_scale,
            gate_up,
            both,
            rows,
            of_block,
            choices,
            launches[0],
            hopper=hopper,
            maxima=maxima,
            activation=activation if hopper else None,
        )
        of_pairs = (both, ids, active, pair_scale, maxima, intermediate)
        constants = {"BLOCK": block, "INTERPRETED": INTERPRETED, **mapping}
        if not hopper:
            _activate_kernel[(pairs, parts)](
                *of_pairs, WHOLE=parts == 1, ACTIVATION=activation, num_warps=4, **constants
            )
        if hopper or parts > 1:
            _quantize_pairs_kernel[(pairs, parts)](
                *of_pairs,
                width,
                count_of_maxima,
                PARTS=triton.next_power_of_2(count_of_maxima),
                EARLY=hopper,
                num_warps=4,
                launch_pdl=hopper,
                **constants,
            )
        _multiply(active, pair_scale, down, results, rows, of_block, 1, launches[1], hopper=hopper, is_sorted=True)
        block = min(1024, triton.next_power_of_2(hidden))
        _combine_kernel[(m, triton.cdiv(hidden, block))](
            results,
            weights,
            ids,
            output,
            hidden,
            CHOICES=choices,
            BLOCK=block,
            num_warps=4,
            EARLY=hopper,
            launch_pdl=hopper,
            **mapping,
            INTERPRETED=INTERPRETED,
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
    *,
    hopper: bool = False,
    is_sorted: bool = False,
    maxima: torch.Tensor | None = None,
    activation: str | None = None,
) -> None:
    """Multiply rows of tokens by their experts: `output[row] = tokens[row // share] · expert of the row's block`.

    of_block: the expert of each block of rows, −1 for those that are not used.
    is_sorted: rows and blocks are not what the kernel before this one makes, for which that for Hopper need not wait.
    activation: on Hopper, of gates; outputs are then activated, bfloat16 [pairs, N / 2], and the largest magnitudes of
    rows are left in `maxima`, float32 [pairs, N / block_n].
    """
    packed, tables, channel_scale, *few = layer
    n, k = packed.shape[2] // 4, packed.shape[1] * 32
    if n % launch.block_n or k % GROUP:
        raise ValueError(f"experts of N = {n}, K = {k}: not multiples of {launch.block_n} and {GROUP}")
    if launch.splits > k // GROUP:
        raise ValueError(f"experts of K = {k} in {launch.splits} parts, of which some are empty")
    blocks, columns = len(of_block), n // launch.block_n
    splits, sums, counters = workspace.split(output, blocks * columns, launch.block_n * launch.block_m, launch.splits)
    grid = (blocks * columns * splits,)
    of_all = (token_scale, channel_scale, output, rows, of_block, sums, counters)
    sizes = (len(output), n, k, blocks, min(launch.columns or columns * splits, columns * splits), splits, share)
    constants: dict[str, Any] = {
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "STAGES": launch.stages,
        "CHAIN": launch.chain,
        "SPLIT": splits > 1,
        "num_warps": launch.warps,
    }
    if hopper:
        # Gluon may be absent.
        from convert_w4a8.kernels.gemm import grouped_hopper_kernel, grouped_many_kernel  # noqa: PLC0415

        indexed = launch.indexed and bool(few)
        index, tables = few if indexed else (packed, tables)
        tensors = (
            token_scale,
            channel_scale,
            output,
            output if maxima is None else maxima,
            rows,
            of_block,
            sums,
            counters,
        )
        arguments = (tokens, packed, tables.view(torch.int64), index, *tensors, *sizes)
        constants |= {"ACTIVATION": activation, "SORTED": is_sorted, "INDEXED": indexed}
        options = {"maxnreg": launch.registers, "launch_pdl": True}
        first = 1 << (launch.block_m.bit_length() - 1)
        rest = launch.block_m - first
        if (launch.overlap == 3 and not launch.chain) or (rest and (launch.overlap != 3 or splits > 1)):
            raise ValueError(f"{launch} has no kernel")
        if launch.overlap is not None:
            constants |= {"BLOCK_M": first, "REST": rest, "OVERLAP": launch.overlap}
            grouped_many_kernel._grouped_kernel[grid](*arguments, **constants, **options)  # noqa: SLF001
            return
        constants |= {"APART": indexed and launch.apart > 0 and not launch.chain, "BY_PRODUCTS": launch.apart == 2}
        grouped_hopper_kernel._grouped_kernel[grid](*arguments, 1 << 16, **constants, **options)  # noqa: SLF001
        return
    constants |= {"HOPPER": workspace.is_hopper(tokens.device), "INTERPRETED": INTERPRETED}
    _grouped_kernel[grid](tokens, packed, tables.view(torch.int64), *of_all, *sizes, **constants)
