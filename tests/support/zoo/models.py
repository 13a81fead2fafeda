"""Tiny random models of transformers' architectures, saved as transformers saves them."""

import contextlib
import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto as auto
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel
from transformers.utils import logging

from zoo.architectures import Architecture
from zoo.sizes import TEXT, VISION

_HEADS = (
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "MODEL_FOR_CAUSAL_LM_MAPPING",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "MODEL_MAPPING",
)
"""transformers' mappings from a configuration to a model class, the most capable class first."""
_MAX_PARAMETERS = 60_000_000
_NOT_TEXT = re.compile("vision|audio|visual|encoder|projector|qformer")
_LAYER_KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")


def silence() -> None:
    """Turn off progress bars and advice."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]


def build(architecture: Architecture, directory: Path) -> None:
    """Save a model of random weights. Raises whatever transformers raises for settings that do not go together."""
    config = make_config(architecture)
    kind = _class_of(config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(copy.deepcopy(config)).parameters())
    if size > _MAX_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters: not all sizes of {config.model_type} are made small")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = kind(config)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.nn.Module.to(model, torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            # Vectors too: norms that are all ones, and biases that are all zeros, could change places unseen.
            offset = 0.0 if parameter.dim() > 1 else 1.0
            torch.nn.init.normal_(parameter, mean=offset, std=0.02)
    model.save_pretrained(directory)
    if architecture.saved:
        path = directory / "config.json"
        path.write_text(json.dumps(_merged(json.loads(path.read_text()), architecture.saved), indent=1))
    for name, content in architecture.files.items():
        (directory / name).write_text(json.dumps(content))


def make_config(architecture: Architecture) -> PretrainedConfig:
    """Return transformers' default configuration of a model type, made tiny."""
    kind = CONFIG_MAPPING[architecture.model_type]
    config: PretrainedConfig = kind(**architecture.given)
    _make_small(config, TEXT)
    _put(config, architecture.settings)
    config.dtype = torch.bfloat16
    return config


def _make_small(config: PretrainedConfig, sizes: Mapping[str, object]) -> None:
    """Replace the sizes of a configuration, or of its parts, down to those that have none."""
    parts = [name for name in type(config).sub_configs if isinstance(getattr(config, name, None), PretrainedConfig)]
    for name in parts:
        _make_small(getattr(config, name), VISION if _NOT_TEXT.search(name) and "text" not in name else sizes)
    if not parts:
        _shrink(config, sizes)


def _shrink(config: PretrainedConfig, sizes: Mapping[str, object]) -> None:
    for name, size in sizes.items():
        before = _get(config, name)
        if before is not None or name == "head_dim":
            # Some sizes are lists, of one a layer.
            _set(config, name, [size] * 2 if isinstance(before, list) and not isinstance(size, list) else size)
    for name in _LAYER_KINDS:
        kinds = _get(config, name)
        if isinstance(kinds, list):
            distinct = list(dict.fromkeys(kinds))
            _set(config, name, (distinct * 2)[:2])


def _get(config: PretrainedConfig, name: str) -> Any:
    """Return a setting; None where there is none, or where it differs between layers."""
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001 (transformers' own for what differs between layers)
        return None


def _set(config: PretrainedConfig, name: str, value: object) -> None:
    """Set a setting, unless it is computed from others."""
    with contextlib.suppress(AttributeError):
        setattr(config, name, value)


def _merged(before: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with more keys, also in its parts."""
    inner = {
        key: _merged(before[key], value) if isinstance(value, dict) and isinstance(before.get(key), dict) else value
        for key, value in more.items()
    }
    return before | inner


def _put(config: PretrainedConfig, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        inner = getattr(config, name, None)
        if isinstance(value, dict) and isinstance(inner, PretrainedConfig):
            _put(inner, value)
        else:
            setattr(config, name, value)


def _class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    for name in _HEADS:
        mapping = getattr(auto, name, {})
        if type(config) in mapping:
            found = mapping[type(config)]
            kind: type[PreTrainedModel] = found[0] if isinstance(found, tuple) else found
            return kind
    raise LookupError(f"transformers has no model class for {type(config).__name__}")
