"""vLLM on a CPU that it takes for a Hopper GPU: its own `initialize_model` and its own loader of weights.

What is patched is only what asks for the device. Everything that decides which layer is quantized how, what its
parameters are, and which tensor goes where in them is vLLM's.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
import vllm.model_executor.kernels.linear as linear_kernels
import vllm.model_executor.layers.fused_moe.config as moe_config
from vllm.config import (
    CacheConfig,
    DeviceConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
from vllm.model_executor.kernels.linear.mixed_precision import cutlass, machete
from vllm.model_executor.layers.attention import mla_attention
from vllm.model_executor.layers.fused_moe.experts import marlin_moe
from vllm.model_executor.layers.fused_moe.experts.cutlass_moe import CutlassExpertsW4A8Fp8
from vllm.model_executor.layers.fused_moe.oracle import int_wna16
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.triton_utils import triton
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import workspace

from convert_w4a8 import devices, vllm_plugin

_INT32_SENTINEL = 0x13579BDF
_FP8_SENTINEL = 0x7B
"""Bytes that no converter writes by the hundred: 352 in E4M3."""
NOT_OF_CHECKPOINTS = (
    "k_scale",
    "v_scale",
    "q_scale",
    "prob_scale",
    "k_zero_point",
    "v_zero_point",
    "q_zero_point",
    "weight_shape",
    "weight_g_idx",
    "g_idx_sort_indices",
)
"""Last parts of the names of parameters whose defaults serve as well, or which nothing reads."""


@dataclass(frozen=True)
class Rank:
    """A tensor-parallel rank that is emulated: vLLM slices for it, and no other process exists."""

    size: int = 1
    index: int = 0


class _Hopper:
    """The platform as some modules want to see it: a GPU's where they ask, a CPU's in all else."""

    @staticmethod
    def is_cuda() -> bool:
        return True

    @staticmethod
    def is_cuda_alike() -> bool:
        return True

    @staticmethod
    def is_device_capability(capability: int) -> bool:
        return capability == 90

    def __getattr__(self, name: str) -> Any:
        return getattr(current_platform, name)


def _attention_backend(
    _cls: type,
    selected_backend: Any,  # noqa: ARG001 (the signature is vLLM's)
    attn_selector_config: Any,
    num_heads: int | None = None,  # noqa: ARG001
) -> str:
    """Return a backend for attention that a CPU may not have: its layers are made, and never run."""
    kinds = AttentionBackendEnum
    if attn_selector_config.use_mla:
        return str((kinds.FLASHMLA_SPARSE if attn_selector_config.use_sparse else kinds.TRITON_MLA).get_path())
    return str(kinds.CPU_ATTN.get_path())


def prepare() -> None:
    """Patch vLLM's questions about the device, start a process group of one, register our plugin. Once a process."""
    platform: Any = type(current_platform)
    platform.get_device_capability = classmethod(lambda _cls, device_id=0: DeviceCapability(9, 0))  # noqa: ARG005
    platform.has_device_capability = classmethod(lambda *_args, **_named: True)
    platform.is_device_capability = classmethod(lambda *_args, **_named: True)
    platform.verify_quantization = classmethod(lambda _cls, _name: None)
    platform.get_attn_backend_cls = classmethod(_attention_backend)
    cutlass.current_platform = machete.current_platform = moe_config.current_platform = _Hopper()
    int_wna16.current_platform = _Hopper()
    int_wna16._get_priority_backends = lambda: [int_wna16.WNA16MoEBackend.MARLIN]
    if hasattr(mla_attention, "get_mla_prefill_backend"):  # 0.25.1
        mla_attention.get_mla_prefill_backend = lambda _config: MagicMock
    if not hasattr(triton, "set_allocator"):
        triton.set_allocator = lambda _allocator: None
    kernels = [cutlass.CutlassW4A8LinearKernel, machete.MacheteLinearKernel]  # of W4A8, and of W4A16
    linear_kernels._POSSIBLE_KERNELS[current_platform._enum] = kernels
    CutlassExpertsW4A8Fp8._supports_current_device = staticmethod(lambda: True)
    marlin_moe.MarlinExperts._supports_current_device = staticmethod(lambda: True)
    fp8_kernel = linear_kernels.TritonFp8BlockScaledMMKernel
    fp8_kernel.is_supported = classmethod(lambda _cls, compute_capability=None: (True, None))  # noqa: ARG005
    linear_kernels._POSSIBLE_FP8_BLOCK_KERNELS[current_platform._enum] = [fp8_kernel]
    devices.why_not_compiled = lambda device: None  # noqa: ARG005
    torch.accelerator.empty_cache = lambda: None
    torch.cuda.Stream = torch.cuda.Event = MagicMock  # type: ignore[misc]
    workspace.init_workspace_manager(torch.device("cpu"))
    # vLLM asks another process what a model class can do; this one may as well import it.
    registry._LazyRegisteredModel.inspect_model_cls = lambda self: registry._ModelInfo.from_model_cls(
        self.load_model_cls()
    )
    vllm_plugin.register()
    cpu = VllmConfig(device_config=DeviceConfig("cpu"))
    with tempfile.NamedTemporaryFile() as file, set_current_vllm_config(cpu):
        init_distributed_environment(1, 0, f"file://{file.name}-group", 0, "gloo")
        initialize_model_parallel(1, 1)


@contextmanager
def _as_rank(rank: Rank) -> Iterator[None]:
    """Make vLLM believe that this process is one of several tensor-parallel ranks."""
    group: Any = parallel_state._TP
    before = group.world_size, group.rank_in_group
    group.world_size, group.rank_in_group = rank.size, rank.index
    try:
        yield
    finally:
        group.world_size, group.rank_in_group = before


def load(directory: Path, rank: Rank) -> torch.nn.Module:
    """Return vLLM's model of a checkpoint, filled but not prepared for running. Raises whatever vLLM raises."""
    for architecture in json.loads((directory / "config.json").read_text()).get("architectures") or ():
        if architecture in registry.ModelRegistry.models:
            registry.ModelRegistry.models[architecture].load_model_cls()  # raises what vLLM would only log
    model_config = ModelConfig(
        model=str(directory),
        tokenizer=str(directory),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=128,
        enforce_eager=True,
    )
    config = VllmConfig(
        model_config=model_config,
        load_config=LoadConfig(use_tqdm_on_load=False),
        device_config=DeviceConfig("cpu"),
        parallel_config=ParallelConfig(),
        cache_config=CacheConfig(enable_prefix_caching=False),
    )
    config.parallel_config.tensor_parallel_size = rank.size
    with _as_rank(rank), set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        model: torch.nn.Module = initialize_model(config)
        fill_with_sentinels(model)
        DefaultModelLoader(config.load_config).load_weights(model, config.model_config)
    return model


def fill_with_sentinels(model: torch.nn.Module) -> None:
    """Fill every parameter with what no checkpoint holds, so that what is not loaded shows."""
    for name, parameter in model.named_parameters():
        data = parameter.data
        if name.endswith(NOT_OF_CHECKPOINTS):
            continue
        if data.dtype == torch.float8_e4m3fn:
            data.view(torch.uint8).fill_(_FP8_SENTINEL)
        elif data.dtype.is_floating_point:
            data.fill_(torch.nan)
        elif data.dtype == torch.int32:
            data.fill_(_INT32_SENTINEL)


def is_ours(module: torch.nn.Module) -> bool:
    """Whether our plugin loads a layer."""
    return type(getattr(module, "quant_method", None)).__name__.startswith("W4A8Lut")


def unfilled(model: torch.nn.Module) -> list[str]:
    """Return the parameters that still hold sentinels, with how many."""
    found = []
    # vLLM's own W4A8 experts have channel scales too, which it computes.
    ours = {id(value) for module in model.modules() if is_ours(module) for value in module.parameters()}
    for name, parameter in model.named_parameters():
        data = parameter.data
        computed = name.endswith("weight_chan_scale") and id(parameter) not in ours
        if name.endswith(NOT_OF_CHECKPOINTS) or computed or not data.numel():
            continue
        if data.dtype == torch.float8_e4m3fn:
            count = int((data.view(torch.uint8) == _FP8_SENTINEL).sum())
            count = count if 2 * count > data.numel() else 0  # a single one may be meant
        elif data.dtype.is_floating_point:
            count = int(data.isnan().sum())
        elif data.dtype == torch.int32:
            count = int((data == _INT32_SENTINEL).sum())
        else:
            continue
        if count:
            found.append(f"{name}: {count} of {data.numel()} numbers are not loaded")
    return found
