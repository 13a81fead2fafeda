"""One operation for the routed experts of a layer: our kernels on the loaded buffers, as vLLM's ops see them.

vLLM calls experts inside an operator of its own (`vllm.moe_forward`), so that torch.compile sees the same graph
whatever runs, and each CUDA graph captures what is right for its batch: which kernel that is, `moe.py` says.
"""

import torch

from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.vllm_plugin.gemm import reads_indices

_FEW_PAIRS = 32
"""Our kernels are the faster ones up to so many tokens for each expert, on average."""


def takes(pairs: int, experts: int) -> bool:
    """Whether our kernels are the faster ones for so many pairs of a token and one of its experts."""
    return pairs <= _FEW_PAIRS * experts


def most_tokens(choices: int, experts: int) -> int:
    """Return the most tokens, of so many choices each, for which `takes` says yes."""
    return _FEW_PAIRS * experts // choices


def experts(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_packed: torch.Tensor,
    w13_tables: torch.Tensor,
    w13_channel_scale: torch.Tensor,
    w2_packed: torch.Tensor,
    w2_tables: torch.Tensor,
    w2_channel_scale: torch.Tensor,
    expert_map: torch.Tensor | None,
    activation: str,
    w13_index: torch.Tensor | None = None,
    w13_distinct: torch.Tensor | None = None,
    w2_index: torch.Tensor | None = None,
    w2_distinct: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the experts that a router chose on bfloat16 [M, hidden]; bfloat16 [M, hidden].

    topk_weights: float32 [M, T]. topk_ids: int32 or int64 [M, T]. w13 (gate and up) and w2 (down): packed int32
    [E, N, K/8], the memory of [E, K/32, 4·N] in the LUT layout; tables float8_e4m3fn [E·K/128·N·8]; channel scales
    float32 [E, N]. expert_map: int32, places of experts on this rank, −1 for those of others. activation: one of
    `grouped_reference.ACTIVATIONS`. index, distinct: uint8 [E, K/128, N] and float8_e4m3fn [256, 8], the same tables as
    indices into few.
    """
    from convert_w4a8.kernels.gemm import grouped  # noqa: PLC0415 - Triton may be absent

    layers = []
    for packed, tables, channel_scale, index, distinct in (
        (w13_packed, w13_tables, w13_channel_scale, w13_index, w13_distinct),
        (w2_packed, w2_tables, w2_channel_scale, w2_index, w2_distinct),
    ):
        count, n, k = packed.shape[0], packed.shape[1], packed.shape[2] * 8
        shown = packed.view(count, k // 32, 4 * n), tables.view(count, k // GROUP_SIZE, n, 8)
        few = () if index is None or distinct is None else (index, distinct)
        layers.append((*shown, channel_scale, *few))
    hopper = reads_indices(x.device)
    return grouped.experts(x, topk_weights, topk_ids, layers[0], layers[1], expert_map, activation, hopper=hopper)


def _fake(x: torch.Tensor, *_others: object) -> torch.Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("w4a8_lut", "FRAGMENT")  # type: ignore[no-untyped-call]
_SCHEMA = (
    "experts(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_packed, Tensor w13_tables,"
    " Tensor w13_channel_scale, Tensor w2_packed, Tensor w2_tables, Tensor w2_channel_scale, Tensor? expert_map,"
    " str activation, Tensor? w13_index=None, Tensor? w13_distinct=None, Tensor? w2_index=None,"
    " Tensor? w2_distinct=None) -> Tensor"
)
_library.define(_SCHEMA)  # type: ignore[no-untyped-call]
_library.impl("experts", experts, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("w4a8_lut::experts", _fake, lib=_library)
lut_experts = torch.ops.w4a8_lut.experts
