"""The settings of compressed-tensors 0.1 to 0.20, as far as they bear on INT4 weights."""

from collections.abc import Mapping
from typing import Any

from convert_w4a8.sources.settings import ANY, Table, any_of, named, only, table_of, tables_of, without

_AGAIN = "save the model without it"
_ACTIVATIONS: Table = any_of("group_size block_structure actorder scale_dtype zp_dtype observer observer_kwargs") | {
    "num_bits": named(8, reason="activations become FP8, of 8 bits"),
    "type": named("float", reason="activations become FP8"),
    "symmetric": ANY,
    "strategy": named("token", reason="activations become FP8, quantized token by token"),
    "dynamic": ANY,
}
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized", "float-quantized", "mixed-precision", "dense")
_FORMAT = only(
    *_FORMATS, reason="its layout of the weights is not read", remedy="save the model as pack-quantized", layout=True
)

SETTINGS: Table = any_of(
    "quant_method ignore kv_cache_scheme global_compression_ratio version provider quantization_status run_compressed"
    " total_num_heads total_num_kv_heads targets"
) | {
    "format": _FORMAT,
    "transform_config": only(reason="online rotations cannot be served by this kernel", remedy=_AGAIN),
    "sparsity_config": only("dense", reason="sparse weights are not supported", remedy=_AGAIN),  # its format
    "moe_sparsity_config": only(reason="experts are left out or replaced, which vLLM does not know", remedy=_AGAIN),
    "attention_input_activations": named(reason="the output does not quantize attention"),
    "config_groups": tables_of(
        {
            "targets": ANY,
            "format": _FORMAT,
            "weights": table_of(
                any_of("num_bits type symmetric strategy group_size block_structure observer observer_kwargs")
                | any_of("scale_dtype zp_dtype")
                | {
                    "dynamic": only(reason="the weights are quantized at run time", remedy="save the model compressed"),
                    "actorder": only(
                        *("static", "weight", "group", "dynamic", True),
                        reason="an order of the input channels that is not known",
                        remedy="save the model with actorder static",
                    ),
                }
            ),
            "input_activations": table_of(_ACTIVATIONS),
            "output_activations": only(
                reason="outputs of layers are quantized, which the kernel does not do",
                remedy="remove output_activations from config.json to convert the weights without it",
            ),
        }
    ),
}


def settings_of_int4(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings without the groups whose weights are not INT4, and of sparsity_config only the format."""

    def is_other(group: Any) -> bool:
        weights = group.get("weights") if isinstance(group, dict) else None
        return isinstance(weights, dict) and (weights.get("num_bits"), weights.get("type", "int")) != (4, "int")

    sparsity = config.get("sparsity_config")
    sparsity = sparsity.get("format") if isinstance(sparsity, dict) else sparsity
    return {**without(config, "config_groups", is_other), "sparsity_config": sparsity}
