"""One operation for linear layers: our kernel or vLLM's CUTLASS, by the number of tokens, or the one that can.

For many tokens CUTLASS is the faster one where it can go: on Hopper, N a multiple of 128. Elsewhere ours does all.

It is one operator of torch, so that torch.compile sees the same graph whatever runs, and each CUDA graph captures what
is right for its batch.
"""

import logging
import os
from functools import cache
from typing import Any

import torch

from convert_w4a8 import devices
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.lut_format import METHOD, refusal
from convert_w4a8.vllm_plugin import compat
from convert_w4a8.vllm_plugin.partition import Partition

logger = logging.getLogger(f"vllm.{__name__}")  # vLLM's handlers print only what is named vllm.*

SETTING = "W4A8_LUT_DECODE"
"""The environment variable that says `cutlass` to leave our kernel out."""
ACTIVATIONS = "W4A8_LUT_ACTIVATIONS"
"""The environment variable that says `bfloat16` to not quantize the activations of up to `TWO_TERMS_TOKENS` tokens."""
_FEW_TOKENS = 64
MORE_TOKENS = 128
TWO_TERMS_TOKENS = 8
_MANY_TOKENS = 256
_NARROW, _NARROWER = 64 * 132, 64 * 64
"""Our kernel is the faster one up to `MORE_TOKENS` tokens where no multiprocessor has more than one of its blocks of 64
channels, and up to `_MANY_TOKENS` where half of them have one; wider layers give CUTLASS enough to do."""


def takes(m: int, n: int) -> bool:
    """Whether our kernel is the faster one for [m, K] activations and N = n (docs/benchmarks/serving.md)."""
    return m <= _FEW_TOKENS or (m <= MORE_TOKENS and n <= _NARROW) or (m <= _MANY_TOKENS and n <= _NARROWER)


@cache
def decode_kernel(device: torch.device) -> bool:
    """Whether our kernel can run on a device, and nobody said otherwise; the first call prepares it."""
    if device.type != "cuda" or os.environ.get(SETTING) == "cutlass":
        return False
    if compat.batch_invariant():
        reason = "VLLM_BATCH_INVARIANT is set, and our kernel adds up in another order where a batch is larger"
        logger.warning("%s: %s: decode runs through CUTLASS, which is slower", METHOD, reason)
        return False
    if why_not := devices.why_not_compiled(device):
        logger.warning("%s: Triton cannot be used (%s): decode runs through CUTLASS, which is slower", METHOD, why_not)
        return False
    from convert_w4a8.kernels.gemm import workspace  # noqa: PLC0415

    workspace.prepare(device)
    _hopper(device)
    return True


@cache
def terms(device: torch.device) -> int:
    """Return how many FP8 terms an activation of a few tokens has on a device; two hold all of bfloat16.

    Raises:
        ValueError: in one line, for another value of the environment variable.

    """
    value = os.environ.get(ACTIVATIONS, "float8")
    if value not in ("float8", "bfloat16"):
        raise ValueError(f"{ACTIVATIONS}={value} is not known: use float8 or bfloat16")
    if value == "float8":
        return 1
    if not decode_kernel(device) or _hopper(device) is None:
        logger.warning(
            "%s: %s=bfloat16 needs our kernel for Hopper, which does not run here: activations are FP8",
            METHOD,
            ACTIVATIONS,
        )
        return 1
    return 2


@cache
def _hopper(device: torch.device) -> Any:
    """Return the kernel for Hopper, tried once; None on other GPUs, and with a warning where it cannot run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from convert_w4a8.kernels.gemm import hopper  # noqa: PLC0415 - Gluon may be absent, or another one

        hopper.probe(device)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other kernel can do the work
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        logger.warning("%s: the kernel for Hopper cannot be used (%s): a slower one is", METHOD, reason)
        return None
    return hopper


def reads_indices(device: torch.device) -> bool:
    """Whether a kernel that a device has can read indices of tables."""
    return _hopper(device) is not None


def require_kernel(name: str, part: Partition) -> None:
    """Raise ValueError, in one line, where neither CUTLASS nor our kernel can run a rank's part of the layer `name`."""
    if why_not_cutlass := compat.why_not_cutlass(part):
        require_ours(name, why_not_cutlass)


def require_ours(name: str, why_not_cutlass: str) -> None:
    """Raise ValueError, in one line, where our kernels cannot run the layer `name`, which CUTLASS cannot."""
    if os.environ.get(SETTING) == "cutlass":
        reason = f"{why_not_cutlass}, and {SETTING}=cutlass leaves out the kernel that can run it"
        raise refusal(name, reason, f"unset {SETTING}")
    if compat.batch_invariant():
        reason = f"{why_not_cutlass}, and the kernel that can run it does not do what VLLM_BATCH_INVARIANT asks for"
        raise refusal(name, reason, "unset VLLM_BATCH_INVARIANT")
    if why_not := devices.why_not_compiled(torch.device("cuda")):
        reason = f"{why_not_cutlass}, and Triton cannot compile the kernel that can run it ({why_not})"
        raise refusal(name, reason, "install what Triton needs: a C compiler and Python's headers")


@cache
def _cutlass_can(n: int, k: int) -> bool:
    return compat.why_not_cutlass(Partition(k, (n,))) is None


def our_kernel(m: int, n: int, k: int, device: torch.device) -> Any:
    """Return the module whose `gemm` multiplies [m, k] activations by a layer; None where CUTLASS does."""
    if _cutlass_can(n, k) and not (takes(m, n) and decode_kernel(device)):
        return None
    hopper = _hopper(device)
    if hopper is not None and hopper.suits(m, n, k):
        return hopper
    from convert_w4a8.kernels.gemm import gpu  # noqa: PLC0415

    return gpu


def gemm(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
    index: torch.Tensor | None = None,
    distinct: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply float8_e4m3fn [M, K] activations by a layer; bfloat16 [M, N].

    tokens: or [2·M, K], activations of two terms, for at most `TWO_TERMS_TOKENS`. token_scale: float32 [M, 1]. packed:
    int32 [K/8, N], the memory of [K/32, 4·N] in the LUT layout. tables: float8_e4m3fn [K/128·N·8]. channel_scale:
    float32 [N]. index, distinct: uint8 [K/128, N] and float8_e4m3fn [256, 8], the same tables as indices into few.
    """
    m, k, n = token_scale.shape[0], tokens.shape[1], packed.shape[1]
    if (kernel := our_kernel(m, n, k, tokens.device)) is not None:
        weights = (packed.view(k // 32, 4 * n), tables.view(-1, n, 8), channel_scale)
        if kernel is _hopper(tokens.device):
            product: torch.Tensor = kernel.gemm(tokens, token_scale, *weights, index, distinct)
        else:
            product = kernel.gemm(tokens[:m], token_scale, *weights)  # the first terms are activations in FP8
        return product
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


def linear(
    x: torch.Tensor,  # noqa: ARG001
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
    index: torch.Tensor | None = None,
    distinct: torch.Tensor | None = None,
) -> torch.Tensor:
    """Do what `gemm` does. x: what was quantized, bfloat16 [M, K]; a compiled graph may use it instead (`fusion`)."""
    return gemm(tokens, token_scale, packed, tables, channel_scale, index, distinct)


def _fake(
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,  # noqa: ARG001
    channel_scale: torch.Tensor,  # noqa: ARG001
    index: torch.Tensor | None = None,  # noqa: ARG001
    distinct: torch.Tensor | None = None,  # noqa: ARG001
) -> torch.Tensor:
    return tokens.new_empty((token_scale.shape[0], packed.shape[1]), dtype=torch.bfloat16)


def _fake_linear(
    x: torch.Tensor,  # noqa: ARG001
    tokens: torch.Tensor,
    token_scale: torch.Tensor,
    packed: torch.Tensor,
    tables: torch.Tensor,
    channel_scale: torch.Tensor,
    index: torch.Tensor | None = None,
    distinct: torch.Tensor | None = None,
) -> torch.Tensor:
    return _fake(tokens, token_scale, packed, tables, channel_scale, index, distinct)


_library = torch.library.Library("w4a8_lut", "DEF")  # type: ignore[no-untyped-call]
_WEIGHTS = "Tensor packed, Tensor tables, Tensor channel_scale, Tensor? index=None, Tensor? distinct=None"
for _schema, _run, _shape in (
    (f"gemm(Tensor tokens, Tensor token_scale, {_WEIGHTS}) -> Tensor", gemm, _fake),
    (f"linear(Tensor x, Tensor tokens, Tensor token_scale, {_WEIGHTS}) -> Tensor", linear, _fake_linear),
):
    _name = _schema.partition("(")[0]
    _library.define(_schema)  # type: ignore[no-untyped-call]
    _library.impl(_name, _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"w4a8_lut::{_name}", _shape, lib=_library)
lut_gemm, lut_linear = torch.ops.w4a8_lut.gemm, torch.ops.w4a8_lut.linear
GEMM, LINEAR = lut_gemm.default, lut_linear.default
