"""The vLLM plugin that serves `w4a8_lut` checkpoints: no flag, no environment variable, nothing to repack.

vLLM finds `register` through the entry point group `vllm.general_plugins` and calls it in every process. Importing
this package needs neither vLLM nor CUDA nor Triton; the modules beside it import vLLM at their top.
"""

from convert_w4a8.lut_format import METHOD


def register() -> None:
    """Make vLLM know the quantization method `w4a8_lut`. Calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import (  # noqa: PLC0415
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    if METHOD in QUANTIZATION_METHODS:
        return
    from convert_w4a8.vllm_plugin.config import W4A8LutConfig  # noqa: PLC0415

    register_quantization_config(METHOD)(W4A8LutConfig)
