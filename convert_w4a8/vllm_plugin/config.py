"""vLLM's view of a `w4a8_lut` checkpoint: which layer gets which method."""

from typing import Any

import torch
import vllm
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from convert_w4a8.lut_format import METHOD, LutFormat
from convert_w4a8.vllm_plugin import compat

logger = init_logger(f"vllm.{__name__}")  # vLLM's handlers print only what is named vllm.*


class W4A8LutConfig(QuantizationConfig):  # type: ignore[misc]
    """The `quantization_config` block of config.json, with vLLM's module names once a model has mapped them."""

    def __init__(self, form: LutFormat) -> None:
        super().__init__()
        self.form = form
        self.carried = None
        if form.carried is not None:
            from convert_w4a8.vllm_plugin.carried import Carried  # noqa: PLC0415

            self.carried = Carried(form.carried)

    def __repr__(self) -> str:
        others = "" if self.carried is None else ", others by compressed-tensors"
        return f"W4A8LutConfig(tables={self.form.tables}, ignore={len(self.form.ignore)} modules{others})"

    @classmethod
    def get_name(cls) -> str:
        """Return the name of the quantization method."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the one dtype that the kernel writes."""
        return [torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the capability from which there is a kernel; vLLM writes 8.9 as 89."""
        major, minor = compat.LEAST_CAPABILITY
        return 10 * major + minor

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no file: the block is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "W4A8LutConfig":
        """Read the block; ValueError, in one line, if it or the GPU is not one that this plugin can serve."""
        if message := compat.untested(vllm.__version__):
            logger.warning(message)
        compat.require_gpu()
        return cls(LutFormat.parse(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename `ignore` from the checkpoint's modules to the model's (multimodal prefixes, for one)."""
        self.form = self.form.renamed(hf_to_vllm_mapper.apply_list)
        if self.carried is not None:
            self.carried.config.apply_vllm_mapper(hf_to_vllm_mapper)

    def has_blocked_weights(self) -> bool:
        """Return whether some layers are FP8 with a scale per block, for which vLLM sets up the compilation."""
        return self.carried is not None and self.carried.has_blocked_weights()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return how vLLM runs the layer called `prefix`; None for what is neither linear nor experts."""
        if self.carried is not None and self.carried.targets(layer, prefix, self.packed_modules_mapping):
            return self.carried.config.get_quant_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            projections = (layer.ckpt_gate_proj_name, layer.ckpt_down_proj_name, layer.ckpt_up_proj_name)
            if self.form.are_experts_ignored(prefix, layer.moe_config.num_logical_experts, projections):
                return UnquantizedFusedMoEMethod(layer.moe_config)
            from convert_w4a8.vllm_plugin.moe import W4A8LutMoEMethod  # noqa: PLC0415

            return W4A8LutMoEMethod(layer.moe_config, self.form.tables)
        if isinstance(layer, LinearBase):
            if self.form.is_ignored(prefix, self.packed_modules_mapping):
                return UnquantizedLinearMethod()
            from convert_w4a8.vllm_plugin.linear import W4A8LutLinearMethod  # noqa: PLC0415

            return W4A8LutLinearMethod(self.form.tables)
        return None  # embeddings, lm_head and the KV cache stay as vLLM has them
