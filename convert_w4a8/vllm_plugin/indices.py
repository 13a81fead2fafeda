"""Indices of tables, which our kernels for Hopper read in place of the tables, of eight times as many bytes."""

import torch

from convert_w4a8.encoding.tables import index_scales, index_tables
from convert_w4a8.lut_format import TableForm, refusal
from convert_w4a8.vllm_plugin.gemm import reads_indices


def indices(
    table: torch.Tensor, form: TableForm, name: str, before: bool | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the tables of a layer as indices uint8 [..., N] into few distinct ones, float8_e4m3fn [256, 8].

    table: group scales [..., N], or tables [..., 8·N]. None where there are more than 256, and no kernel for indices.
    before: whether the layer had indices when it was loaded first, which graphs remember; None while it is.

    ValueError, in one line, where the tables were few before, and are not now.
    """
    if before is False or not reads_indices(table.device):
        return None
    is_scale = form is TableForm.SCALE
    found = index_scales(table) if is_scale else index_tables(table.view(-1, table.shape[-1] // 8, 8))
    if found is None:
        if before:
            raise refusal(name, "it had few distinct tables, and has many now", "start vLLM with these weights")
        return None
    index, distinct = found
    return index.view(*table.shape[:-1], -1), distinct
