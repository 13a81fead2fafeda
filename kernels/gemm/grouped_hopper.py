"""Launches the GEMM over experts for Hopper, `grouped_hopper_kernel`: see `hopper` for what Gluon is for."""

import torch

from convert_w4a8.kernels.gemm import workspace
from convert_w4a8.kernels.gemm.grouped_hopper_kernel import _grouped_kernel
from convert_w4a8.kernels.gemm.grouped_launch import Launch


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
    """Do what `grouped._multiply` does."""
    packed, tables, channel_scale, *few = layer
    few = few if launch.indexed else []
    index, tables = few or (packed, tables)
    n, k = packed.shape[2] // 4, packed.shape[1] * 32
    blocks, columns = len(of_block), n // launch.block_n
    splits, sums, counters = workspace.split(output, blocks * columns, launch.block_n * launch.block_m, launch.splits)
    _grouped_kernel[(blocks * columns * splits,)](
        tokens,
        packed,
        tables.view(torch.int64),
        index,
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
        blocks,
        min(launch.columns or columns * splits, columns * splits),
        splits,
        share,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        STAGES=launch.stages,
        CHAIN=launch.chain,
        SPLIT=splits > 1,
        SORTED=is_sorted,
        INDEXED=bool(few),
        num_warps=launch.warps,
        launch_pdl=True,
    )
