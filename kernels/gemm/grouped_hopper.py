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

_LEAST = 4
"""Groups of K that are worth a program's start."""
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
"""Of a thread at most, without spills, by the tiles of 16 channels of a warp and the pairs of a block."""


_ALL_REGISTERS = 65536


def registers(launch: Launch) -> int:
    """Return how many registers a thread may have."""
    wanted = launch.registers or _REGISTERS.get((launch.block_n // 16 // launch.warps, launch.block_m), 255)
    return min(wanted, _ALL_REGISTERS // (32 * launch.warps))


def multiply(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    layer: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    maxima: torch.Tensor | None,
    rows: torch.Tensor,
    of_block: torch.Tensor,
    share: int,
    launch: Launch,
    activation: str | None,
    *,
    is_sorted: bool,
) -> None:
    """Do what `grouped._multiply` does.

    activation: of gates; then outputs are activated, bfloat16 [pairs, N / 2], and their largest magnitudes are left in
    maxima, float32 [pairs, N / block_n]. None: outputs are products.
    """
    packed, tables, channel_scale, *few = layer
    few = few if launch.indexed else []
    index, tables = few or (packed, tables)
    n, k = packed.shape[2] // 4, packed.shape[1] * 32
    most, depth, columns = len(of_block) - 1, k // 128, n // launch.block_n
    least, programs = depth, most * columns
    if launch.resident:
        least = min(depth, _LEAST)
        programs = min(programs * depth // least, launch.resident * workspace.multiprocessors(tokens.device))
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
        output if maxima is None else maxima,
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
        ACTIVATION=activation,
        SORTED=is_sorted,
        INDEXED=bool(few),
        num_warps=launch.warps,
        maxnreg=registers(launch),
        launch_pdl=True,
    )
