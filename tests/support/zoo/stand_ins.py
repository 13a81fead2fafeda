"""What is imported but never called while a model is built and filled, and has no build for this torch."""

import importlib.metadata
import sys
from unittest.mock import MagicMock

import torch

_TORCHVISION_OPS = (
    "deform_conv2d",
    "nms",
    "ps_roi_align",
    "ps_roi_pool",
    "qnms",
    "qroi_align",
    "roi_align",
    "roi_pool",
    "_deform_conv2d_backward",
    "_ps_roi_align_backward",
    "_ps_roi_pool_backward",
    "_roi_align_backward",
    "_roi_pool_backward",
)
_ACTIVATIONS = (
    "fatrelu_and_mul",
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh",
    "gelu_tanh_and_mul",
    "mul_and_silu",
    "relu2_no_mul",
    "relu_squared",
    "silu_and_mul",
    "silu_and_mul_with_clamp",
    "situ_and_mul",
)
_MODULES = (
    "vllm.model_executor.kernels.linear.cute_dsl.gemm_rs_ar",
    "vllm.models.common.ops.gemm_rs_ar",
)
_LIBRARIES: list[torch.library.Library] = []


def claim_cpu_build() -> None:
    """Make vLLM, which is not installed as a package, find itself as a build for CPUs."""
    version = importlib.metadata.version

    def claimed(distribution_name: str) -> str:
        return "0+cpu" if distribution_name == "vllm" else version(distribution_name)

    importlib.metadata.version = claimed


def define_torchvision_ops() -> None:
    """Declare torchvision's compiled operations, which its import describes: its build is for a torch with CUDA.

    Before anything that imports torchvision or transformers.
    """
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in _TORCHVISION_OPS:
        library.define(f"{name}(Tensor a) -> Tensor")  # type: ignore[no-untyped-call]
    _LIBRARIES.append(library)  # it lives as long as this


def define_vllm_ops() -> None:
    """Declare the compiled activations that vLLM's layers look for when they are made."""
    library = torch.library.Library("_C", "FRAGMENT")  # type: ignore[no-untyped-call]
    for name in _ACTIVATIONS:
        if not hasattr(torch.ops._C, name):
            library.define(f"{name}(Tensor(a!) out, Tensor a) -> ()")  # type: ignore[no-untyped-call]
    _LIBRARIES.append(library)


def replace_vllm_kernels() -> None:
    """Stand in for modules of vLLM that import CUTLASS's package, which there is for GPUs only."""
    sys.modules |= dict.fromkeys(_MODULES, MagicMock())
