"""One operation for linear layers: our kernel or vLLM's CUTLASS, by the number of tokens, or the one that can.

For many tokens CUTLASS is the faster one where it can go: on Hopper, N a multiple of 128. Elsewhere ours does all.

It is one operator of torch, so that torch.compile sees the same graph whatever runs, and each CUDA graph captures what
is right for its batch.
"""

import logging
import os
from functools import cache

import torch

from convert_w4a8 import devices
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.lut_format import METHOD, refusal
from convert_w4a8.vllm_plugin import compat
from convert_w4a8.vllm_plugin.partition import Partition

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handlers print only what is named vllm.*

SETTING = "W4A8_LUT_DECODE"
"""The environment variable that says `cutlass` to leave our kernel out."""
_FEW_TOKENS = 64
_MORE_TOKENS = 128
_NARROW = 64 * 132
"""Our kernel is the faster one up to `_MORE_TOKENS` tokens where no multiprocessor has more than one of its blocks of
64 channels; wider layers give CUTLASS enough to do (docs/benchmarks/serving.md)."""


def takes(m: int, n: int) -> bool:
    """Whether our kernel is the faster one for [m, K] activations and N = n."""
    return m <= _FEW_TOKENS or (m <= _MORE_TOKENS and n <= _NARROW)


@cache
def decode_kernel(device: torch.device) -> bool:
    """Whether our kernel can run on a device, and nobody said otherwise; the first call prepares it."""
    if device.type != "cuda" or os.environ.get(SETTING) == "cutlass":
        return False
    if why_not := devices.why_not_compiled(device):
        logger.warning("%s: Triton cannot be used (%s): decode runs through CUTLASS, which is slower", METHOD, why_not)
        return False
    from convert_w4a8.kernels.gemm import gpu  # noqa: PLC0415 - Triton may be absent

    gpu.prepare(device)
    return True


def require_kernel(name: str, part: Partition) -> None:
    """Raise ValueError, in one line, where neither CUTLASS nor our kernel can run a rank's part of the layer `name`."""
    if why_not_cutlass := compat.why_not_cutlass(part):
        require_ours(name, why_not_cutlass)


def require_ours(name: str, why_not_cutlass: str) -> None:
    """Raise ValueError, in one line, where our kernels cannot run the layer `name`, which CUTLASS cannot."""
    if os.environ.get(SETTING) == "cutlass":
        reason = f"{why_not_cutlass}, and {SETTING}=cutlass leaves out the kernel that can run it"
        raise refusal(name, reason, f"unset {SETTING}")
    if why_not := devices.why_not_compiled(torch.device("cuda")):
        reason = f"{why_not_cutlass}, and Triton cannot compile the kernel that can run it ({why_not})"
        raise refusal(name, reason, "install what Triton needs: a C compiler and Python's headers")


@cache
def _cutlass_can(n: int, k: int) -> bool:
    return compat.why_not_cutlass(Partition(k, (n,))) is None


def gemm(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
) -> torch.Tensor:
    """Multiply float8_e4m3fn [M, K] activations by a layer; bfloat16 [M, N].

    token_scale: float32 [M, 1]. packed: int32 [K/8, N], the memory of [K/32, 4·N] in the LUT layout. tables:
    float8_e4m3fn [K/128·N·8]. channel_scale: float32 [N].
    """
    (m, k), n = tokens.shape, packed.shape[1]
    if not _cutlass_can(n, k) or (takes(m, n) and decode_kernel(tokens.device)):
        from convert_w4a8.kernels.gemm import gpu  # noqa: PLC0415

        return gpu.gemm(tokens, token_scale, packed.view(k // 32, 4 * n), tables.view(-1, n, 8), channel_scale)
    from vllm import _custom_ops as ops  # noqa: PLC0415

    output: torch.Tensor = ops.cutlass_w4a8_mm(
        a=tokens,
        b_q=packed,
        b_group_scales=tables,
        b_group_size=GROUP_SIZE,
        a_token_scales=token_scale,
        b_channel_scales=channel_scale,
    )
    return output


def _fake(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,  # noqa: ARG001
    packed: torch.Tensor,
    tables: torch.Tensor,  # noqa: ARG001
    channel_scale: torch.Tensor,  # noqa: ARG001
) -> torch.Tensor:
    return tokens.new_empty((tokens.shape[0], packed.shape[1]), dtype=torch.bfloat16)


_library = torch.library.Library("w4a8_lut", "DEF")  # type: ignore[no-untyped-call]
_SCHEMA = "gemm(Tensor tokens, Tensor token_scale, Tensor packed, Tensor tables, Tensor channel_scale) -> Tensor"
_library.define(_SCHEMA)  # type: ignore[no-untyped-call]
_library.impl("gemm", gemm, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("w4a8_lut::gemm", _fake, lib=_library)
lut_gemm = torch.ops.w4a8_lut.gemm
