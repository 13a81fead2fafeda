"""Layers that the converter carried over: vLLM serves them by its own methods, as compressed-tensors has them."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead


class Carried:
    """vLLM's own configuration of the block `carried`, and which layers it is for."""

    def __init__(self, block: Mapping[str, Any]) -> None:
        self.config = CompressedTensorsConfig.from_config(deepcopy(dict(block)))  # which changes what it is given

    def targets(self, layer: torch.nn.Module, prefix: str, fused: Mapping[str, list[str]]) -> bool:
        """Return whether a config group targets a layer.

        fused: vLLM's `packed_modules_mapping`, which it gives to the outer configuration alone.
        """
        self.config.packed_modules_mapping = fused
        if isinstance(layer, RoutedExperts):  # asked for as vLLM's `get_moe_method` does
            prefix = f"{prefix}.0.{layer.ckpt_gate_proj_name}"
        elif not isinstance(layer, (LinearBase, ParallelLMHead)):
            return False
        return self.config.get_scheme_dict(layer, prefix) is not None

    def has_blocked_weights(self) -> bool:
        """Return whether some layers have a scale per block."""
        return bool(self.config.has_blocked_weights())
