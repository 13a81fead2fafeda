"""Launches the GEMM over experts for Hopper, `grouped_hopper_kernel`: see `hopper` for what Gluon is for.

Blocks take about the same time, and are seldom a multiple of what the multiprocessors have room for: where they are
few, the last of them leave most idle. So either K is cut in parts, or as many programs as there is room for share all
groups of all blocks evenly. Where a block is cut, the program that comes last adds up its parts, in their order.
"""

import torch
import triton

from convert_w4a8.kernels.gemm import workspace
from convert_w4a8.kernels.gemm.grouped_hopper_kernel import _grouped_kernel
from convert_w4a8.kernels.gemm.grouped_launch import Launch

_REGISTERS = {
    (1, 8): 80,
    (1, 16): 80,
    (1, 32): 96,
    (1, 64): 128,
    (1, 128): 232,
    (2, 8): 128,
    (2, 16): 128,
    (2, 32): 168,
    (2, 64): 208,
}
"""Of a thread, without spills, by the tiles of 16 channels of a warp and the pairs of a block."""
_LEAST = 4
"""Groups of K that are worth a program's start."""
_ALL_REGISTERS = 65536
_ALL_SHARED = 227 * 1024
_MORE_SHARED = 1024
"""What each program takes of shared memory besides its own."""


def resident(launch: Launch) -> int:
    """Return how many programs a multiprocessor has room for."""
    stage = launch.block_n * (64 + 8 + 1) + launch.block_m * 128  # words, tables, indices; tokens
    shared = launch.stages * stage + 4 * launch.block_m * launch.block_n + _MORE_SHARED
    return max(1, min(_ALL_REGISTERS // (registers(launch) * 32 * launch.warps), _ALL_SHARED // shared))


def registers(launch: Launch) -> int:
    """Return how many registers a thread may have."""
    return _REGISTERS[launch.block_n // 16 // launch.warps, launch.block_m]


def multiply(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    layer: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    rows: torch.Tensor,
    of_block: torch.Tensor,
    share: int,
    launch: Launch,
    is_sorted: bool,
) -> None:
    """Do what `grouped.multiply` does."""
    packed, tables, channel_scale, *few = layer
    few = few if launch.indexed else []
    index, tables = few or (packed, tables)
    n, k = packed.shape[2] // 4, packed.shape[1] * 32
    most, depth, columns = len(of_block) - 1, k // 128, n // launch.block_n
    least, programs = depth, most * columns
    if launch.splits == 0:
        least = min(depth, _LEAST)
        programs = min(programs * depth, resident(launch) * workspace.multiprocessors(tokens.device))
    elif launch.splits > 1:
        least, programs = triton.cdiv(depth, launch.splits), programs * launch.splits
    sums = counters = output  # stand for what is not used
    if least < depth:
        # The first and the last block of a program may be cut.
        ends, sums, counters = workspace.split(output, programs, launch.block_n * launch.block_m, 2)
        if ends == 1:
            least, programs = depth, most * columns
    _grouped_kernel[(programs,)](
        tokens,
        packed,
        tables.view(torch.int64),
        token_scale,
        channel_scale,
        output,
        rows,
        of_block,
        sums,
        counters,
        len(output),
        n,
        k,
        most,
        min(launch.columns or columns, columns),
        least,
        share,
        index,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        STAGES=launch.stages,
        CHAIN=launch.chain,
        SORTED=is_sorted,
        INDEXED=bool(few),
        num_warps=launch.warps,
        maxnreg=registers(launch),
        launch_pdl=True,
    )
