"""The output's config.json."""

from collections.abc import Sequence
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.settings import without_settings
from convert_w4a8.conversion.plan import Plan
from convert_w4a8.conversion.result import LayerResult, Recipe
from convert_w4a8.targets.base import make_block
from convert_w4a8.version import __version__


def output_config(
    checkpoint: Checkpoint, plan: Plan, results: Sequence[LayerResult], recipe: Recipe | None = None
) -> dict[str, Any]:
    """Return the output's config.json: the source's, in bfloat16, with the new quantization_config and no other.

    It is at the top, where vLLM looks first, wherever the source had its own.
    """
    stats = [result.stats for result in results if result.stats is not None]
    conversion = {
        "tool": "w4a8-convert",
        "tool_version": __version__,
        "source": plan.source.NAME,
        "scales": str(plan.options.scales),
        "layers_with_codes_kept": sum(s.codes_kept for s in stats),
        "layers_with_new_codes": sum(not s.codes_kept for s in stats),
        "layers_in_bf16": len(results) - len(stats),
        **({} if recipe is None else recipe.record),
    }
    config = _in_bfloat16(without_settings(checkpoint.config))
    if not {"dtype", "torch_dtype"} & set(config):
        config["torch_dtype"] = "bfloat16"
    config["quantization_config"] = make_block(
        plan.target,
        checkpoint.quantization_config,
        plan.ignore,
        plan.options.scales,
        conversion,
        plan.mixture(checkpoint.config),
    )
    return config


def _in_bfloat16(config: dict[str, Any]) -> dict[str, Any]:
    """Set every dtype of a model configuration to bfloat16, those of its sub-models too."""
    for key, value in config.items():
        if key in ("dtype", "torch_dtype"):  # whatever it was: an object names a dtype for each sub-model
            config[key] = "bfloat16"
        elif isinstance(value, dict):
            config[key] = _in_bfloat16(value)
    return config
