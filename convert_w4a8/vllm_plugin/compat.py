"""What depends on vLLM's version and on the GPU, in one place.

Run with vLLM 0.25.1; held against the sources of 0.33.0 by tests/vllm_plugin/test_contract.py. Between the two, these
changed and are avoided rather than branched on:

- `oracle/w4a8.py` (0.33 added `backend`, `layer`, `group_size`, and a second backend whose weights look different): the
  kernel is put together here from the parts that the oracle uses, which did not change.
- `MPLinearLayerConfig` and `_get_weight_params` (act-order dropped in 0.33): the op is called directly.
- `resolve_quant_method` wraps `get_quant_method`: `QuantizationConfig` is subclassed, not imitated.
- `FusedMoE` became `FusedMoEFactory`: layers are recognized as `RoutedExperts`, a class in both.
- `replace_parameter` renamed its third argument: it is passed by position.
- `FusedMoEMethodBase.select_gemm_impl` and `maybe_make_prepare_finalize` are gone: `moe_kernel` is set.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch

from convert_w4a8.kernels.gemm.grouped_reference import ACTIVATIONS
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.lut_format import METHOD, refusal
from convert_w4a8.vllm_plugin.partition import ExpertPartition, Partition

TESTED = ("0.25.1", "0.33.0")
"""The oldest and the newest vLLM that this plugin was checked with."""


def untested(version: str) -> str | None:
    """Return what to tell a user whose vLLM is outside the tested range; None inside it."""
    number = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    release = tuple(map(int, number.groups())) if number else (0, 0, 0)
    oldest, newest = (tuple(map(int, end.split("."))) for end in TESTED)
    if oldest <= release <= newest:
        return None
    return f"{METHOD}: vLLM {version} is untested; the plugin was tested with vLLM {TESTED[0]} to {TESTED[1]}"


LEAST_CAPABILITY = (8, 9)
"""Ada: the first GPUs whose tensor cores multiply FP8."""
_HOPPER = (9, 0)


def capability() -> tuple[int, int] | None:
    """Return the GPU's compute capability; None in a process without a GPU."""
    from vllm.platforms import current_platform  # noqa: PLC0415

    found = current_platform.get_device_capability()
    return None if found is None else (found[0], found[1])


def require_gpu() -> None:
    """Raise ValueError, in one line, on a GPU that no kernel is for.

    A process without a GPU (a launcher) passes; its workers are asked again.
    """
    from vllm.platforms import current_platform  # noqa: PLC0415

    found = capability()
    if found is None:
        return
    if current_platform.is_rocm():
        raise refusal("GPU", "the W4A8 kernels are for NVIDIA's GPUs", "serve the W4A16 source checkpoint here")
    if found < LEAST_CAPABILITY:
        raise refusal(
            f"GPU of compute capability {found[0]}.{found[1]}",
            "W4A8 needs FP8 tensor cores, from 8.9 on (Ada, Hopper, Blackwell)",
            "serve the W4A16 source checkpoint here",
        )


def why_not_cutlass(part: Partition | ExpertPartition) -> str | None:
    """Return why vLLM's CUTLASS kernels cannot run a rank's part of a layer, so that ours must; None where they can.

    They exist for Hopper, and take fewer sizes. A process without a GPU counts as one with a Hopper GPU.
    """
    found = capability()
    if found not in (None, _HOPPER):
        return (
            f"vLLM's CUTLASS runs W4A8 on compute capability 9.0 (Hopper) only, and this GPU has {found[0]}.{found[1]}"
        )
    problem = part.cutlass_problem
    return problem and f"{problem}, as vLLM's CUTLASS needs"


def require_op_dtypes(weight: torch.Tensor, tables: torch.Tensor, channel: torch.Tensor) -> None:
    """Raise TypeError where a weight would be handed to an op in another dtype than it reads: the ops do not look."""
    if (weight.dtype, tables.dtype, channel.dtype) != (torch.int32, torch.float8_e4m3fn, torch.float32):
        raise TypeError(f"{METHOD}: the kernel cannot read {weight.dtype}, {tables.dtype}, {channel.dtype}")


def why_not_cutlass_experts(moe_config: Any) -> str | None:
    """Return why vLLM's W4A8 experts cannot run a MoE layer as it is to be run; None if they can."""
    from vllm.model_executor.layers.fused_moe import FusedMoEActivationFormat  # noqa: PLC0415
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsW4A8Fp8  # noqa: PLC0415
    from vllm.model_executor.layers.quantization.utils.quant_utils import (  # noqa: PLC0415
        kFp8DynamicTokenSym,
        kInt4Static,
    )

    batched = moe_config.moe_parallel_config.use_batched_activation_format
    layout = FusedMoEActivationFormat.BatchedExperts if batched else FusedMoEActivationFormat.Standard
    supported, reason = CutlassExpertsW4A8Fp8.is_supported_config(
        CutlassExpertsW4A8Fp8, moe_config, kInt4Static, kFp8DynamicTokenSym, layout
    )
    return None if supported else f"vLLM's W4A8 experts refuse this deployment ({reason})"


def batch_invariant() -> bool:
    """Whether vLLM is told to give each request the same bytes whatever others are in its batch."""
    import vllm.envs as envs  # noqa: PLC0415, PLR0402

    return bool(envs.VLLM_BATCH_INVARIANT)


def why_not_our_experts(moe_config: Any) -> str | None:
    """Return why our kernels cannot run a MoE layer as it is to be run; None if they can.

    They take the place of vLLM's quantization, experts and sum, which is right where tokens stay on their rank.
    """
    parallel = moe_config.moe_parallel_config
    moved = parallel.use_all2all_kernels or parallel.dp_size > 1 or getattr(parallel, "use_passthrough_all2all", False)
    activation = activation_name(moe_config.activation)
    for problem, reason in (
        (moved, "tokens are sent to other ranks"),
        (moe_config.in_dtype is not torch.bfloat16, f"its dtype is {moe_config.in_dtype}"),
        (activation not in ACTIVATIONS, f"its activation is {activation}"),
        (moe_config.swiglu_limit is not None, "its activation is clamped"),
        (not moe_config.is_act_and_mul, "it has no gate"),
        (moe_config.has_bias, "it has biases"),
        (moe_config.is_lora_enabled, "LoRA is enabled"),
        (batch_invariant(), "VLLM_BATCH_INVARIANT is set"),
    ):
        if problem:
            return reason
    return None


def activation_name(activation: Any) -> str:
    """Return the name of a member of vLLM's `MoEActivation`."""
    return str(activation.value)


def make_moe_kernel(moe_config: Any, quant_config: Any, layouts: Sequence[Any], routing_tables: Any) -> Any:
    """Return the `FusedMoEKernel` that vLLM's own W4A8 method builds for a MoE layer.

    layouts: CUTLASS's int32 [experts, 3] layouts of the w13 and the w2 weights.
    """
    from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize  # noqa: PLC0415
    from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsW4A8Fp8  # noqa: PLC0415
    from vllm.model_executor.layers.fused_moe.modular_kernel import FusedMoEKernel  # noqa: PLC0415

    prepare_finalize = maybe_make_prepare_finalize(
        moe=moe_config, quant_config=quant_config, routing_tables=routing_tables, allow_new_interface=True
    )
    experts = CutlassExpertsW4A8Fp8(
        moe_config=moe_config,
        quant_config=quant_config,
        b_strides1=layouts[0],
        b_strides2=layouts[1],
        group_size=GROUP_SIZE,
    )
    return FusedMoEKernel(prepare_finalize, experts)
