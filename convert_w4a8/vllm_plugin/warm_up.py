"""What compiles our kernels while a model is loaded, so that none is compiled while it is served.

Triton compiles a kernel when it is first launched, anew for each way of cutting a GEMM, and how that is cut depends on
the number of tokens. Before vLLM serves, it runs the model at the batch sizes of its CUDA graphs; requests may bring
others: more tokens than the largest graph, and any number where there are none. So layers are multiplied once, by
zeros, at numbers of tokens that need, together, every kernel that any number needs. Kernels that earlier layers needed
are left out: of layers of one size, only the first costs anything.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch

from convert_w4a8.vllm_plugin import activations, gemm
from convert_w4a8.vllm_plugin.experts import lut_experts

_MOST_TOKENS = 512
"""Beyond so many tokens, all products of a linear layer are cut alike."""
_compiled: dict[torch.device, set[Hashable]] = {}
"""What was compiled in this process."""
_seen: set[Hashable] = set()
"""Sizes of layers that have been warmed up."""


def linear(packed: torch.Tensor, *weights: torch.Tensor) -> None:
    """Compile what a linear layer needs; its weights as `gemm.gemm` takes them."""
    k, n, device = packed.shape[0] * 8, packed.shape[1], packed.device
    size = (n, k, len(weights), device)
    if size in _seen:
        return
    _seen.add(size)
    few_terms = gemm.terms(device)
    if few_terms > 1:
        activations.quantize(torch.zeros(1, k, dtype=torch.bfloat16, device=device), few_terms)

    def terms(m: int) -> int:
        return few_terms if m <= gemm.TWO_TERMS_TOKENS else 1

    def needed(m: int) -> set[Hashable]:
        kernel = gemm.our_kernel(m, n, k, device)
        return set() if kernel is None else {(len(weights), kernel.compiled_for(m, n, k, device, terms(m)))}

    for m in representatives(needed, _MOST_TOKENS, _compiled.setdefault(device, set())):
        tokens = torch.zeros(terms(m) * m, k, device=device).to(torch.float8_e4m3fn)
        scale = torch.zeros(m, 1, dtype=torch.float32, device=device)  # vLLM loads with another default
        gemm.gemm(tokens, scale, packed, *weights)


def experts(
    choices: int,
    weights: Sequence[torch.Tensor],
    expert_map: torch.Tensor | None,
    activation: str,
    most: int | None,
    few: Sequence[torch.Tensor | None] = (),
) -> None:
    """Compile what experts need; arguments as `lut_experts` takes them, `few` the last of them.

    most: tokens, or None for any number.
    """
    packed, *_ = weights
    count, hidden, intermediate, device = packed.shape[0], packed.shape[2] * 8, packed.shape[1] // 2, packed.device
    size = (count, hidden, intermediate, choices, activation, expert_map is None, device)
    if size in _seen:
        return
    _seen.add(size)
    from convert_w4a8.kernels.gemm import grouped  # noqa: PLC0415 - Triton may be absent

    hopper = gemm.reads_indices(device)

    def needed(m: int) -> set[Hashable]:
        return grouped.compiled_for(m * choices, count, hidden, intermediate, device, hopper=hopper)

    differ = grouped.most_pairs(count) // choices + 1
    for m in representatives(needed, differ if most is None else min(differ, most), set()):
        x = torch.zeros(m, hidden, dtype=torch.bfloat16, device=device)
        ids = torch.zeros(m, choices, dtype=torch.int32, device=device)
        scores = torch.zeros(m, choices, dtype=torch.float32, device=device)
        lut_experts(x, scores, ids, *weights, expert_map, activation, *few)


def representatives(needed: Callable[[int], Iterable[Hashable]], most: int, compiled: set[Hashable]) -> list[int]:
    """Return numbers of tokens from 1 to `most` that need, together, all that any of them needs and is not compiled.

    compiled: gets what they need.
    """
    found = []
    for m in range(1, most + 1):
        if new := set(needed(m)) - compiled:
            found.append(m)
            compiled |= new
    return found
