"""The settings of a checkpoint's quantization: in config.json, at the top or in a part of it, or in a file beside it.

transformers and vLLM read `quantization_config` of config.json. Models of several parts may have it in the part that is
quantized (`llm_config`, `text_config`, …), compressed-tensors called it `compression_config` in 2024, and other tools
wrote files of their own (`files.SETTINGS_FILES`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.files import CONFIG, SETTINGS_FILES
from convert_w4a8.checkpoint.json_file import read_json
from convert_w4a8.errors import ConvertError
from convert_w4a8.text import shortened

SETTINGS_KEYS = ("quantization_config", "compression_config")
_SPARSITY = "sparsity_config"
"""compressed-tensors had this beside `quantization_config`, before it was a part of it."""
_AWQ_KEYS = frozenset({"w_bit", "q_group_size"})
_METHODS = {"compressed_tensors": "compressed-tensors", "sparseml": "compressed-tensors"}
"""Older names of methods."""
_DEFAULT_METHODS = {
    "compression_config": "compressed-tensors",
    "quantize_config.json": "gptq",
    "hf_quant_config.json": "modelopt",
}
"""The method of settings that name none, by the key or the file that holds them."""
_DECISIVE = ("bits", "w_bit", "group_size", "q_group_size", "sym", "zero_point", "desc_act", "version")
"""Settings by which tensors are read one way or another."""
_FORMATS = ("checkpoint_format", "format")
_SETTINGS_SUFFIXES = (".json", ".yaml", ".yml")
_LISTED = 4


@dataclass(frozen=True)
class Settings:
    """The settings of a quantization, empty where there are none, and where they were found, in words."""

    block: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""


def find_settings(root: Path, config: Mapping[str, Any]) -> Settings:
    """Return the settings of a checkpoint whose config.json holds `config`; config.json wins over other files.

    Raises:
        ConvertError: what should be settings is no JSON object, or there are two that differ.

    """
    found = []
    for place, key, value in _walk(config):
        if key in SETTINGS_KEYS and value is not None:
            if not isinstance(value, Mapping):
                raise ConvertError(f"{root / CONFIG}: {place}", "is not a JSON object", "repair the file")
            found.append(_settings(value, f"{CONFIG}: {place}", _DEFAULT_METHODS.get(key)))
    if not any(settings.block for settings in found):
        found = [_of_file(root / name) for name in SETTINGS_FILES if (root / name).is_file()]
    found = [settings for settings in found if settings.block]
    for other in found[1:]:
        if _meaning(other.block) != _meaning(found[0].block):
            raise ConvertError(
                str(root),
                f"has two settings of its quantization that differ: {found[0].place}, and {other.place}",
                "keep those that describe the weights, and remove the others",
            )
    if found and config.get(_SPARSITY) and _SPARSITY not in found[0].block:
        return Settings({**found[0].block, _SPARSITY: config[_SPARSITY]}, found[0].place)
    return found[0] if found else Settings()


def _of_file(path: Path) -> Settings:
    """Return the settings that a file beside config.json holds; none where it does not say of what method."""
    value = read_json(path)
    method = _DEFAULT_METHODS.get(path.name)
    if path.name == "quant_config.json" and not _AWQ_KEYS.isdisjoint(value):
        method = "awq"
    return _settings(value, path.name, method) if value.get("quant_method") or method else Settings()


def _settings(block: Mapping[str, Any], place: str, method: str | None) -> Settings:
    """Return settings under the name of their method that is usual today; `method` where they name none."""
    if not block:
        return Settings()
    named = block.get("quant_method") or method
    if isinstance(named, str):  # of any case, as for vLLM
        named = _METHODS.get(named.lower(), named.lower())
    return Settings(block if named == block.get("quant_method") else {**block, "quant_method": named}, place)


def _meaning(block: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what counts of settings: what is null is not said."""
    return {key: value for key, value in block.items() if value is not None}


def contradictions(root: Path, settings: Settings) -> Iterator[str]:
    """Yield what a file beside config.json says of how tensors are to be read, and the settings that count do not."""
    for name in SETTINGS_FILES:
        if settings.place == name or not (root / name).is_file():
            continue
        try:
            other = _of_file(root / name).block
        except ConvertError:  # nobody reads it
            continue
        pairs = [(key, settings.block.get(key), other.get(key)) for key in _DECISIVE]
        ours, theirs = (next(filter(None, map(block.get, _FORMATS)), None) for block in (settings.block, other))
        pairs.append((_FORMATS[0], ours or settings.block.get("quant_method"), theirs))  # gptq: version 1 of it
        for key, ours, theirs in pairs:
            if None not in (ours, theirs) and str(ours).lower() != str(theirs).lower():
                yield f"{name} says {key} {theirs}, and {settings.place} {ours}, which counts"


def without_settings(value: Any) -> Any:
    """Return a copy of what config.json holds, without the settings of a quantization in any part of it."""
    if isinstance(value, Mapping):
        return {key: without_settings(item) for key, item in value.items() if key not in (*SETTINGS_KEYS, _SPARSITY)}
    return [without_settings(item) for item in value] if isinstance(value, list) else value


def where_looked(root: Path, config: Mapping[str, Any]) -> str:
    """Say where settings were looked for in vain, and what else there is that may hold some."""
    seen = [f"{CONFIG}: {place}" for place, key, value in _walk(config) if value and _may_hold(key)]
    files = sorted(path.name for path in root.iterdir() if path.suffix in _SETTINGS_SUFFIXES and _may_hold(path.name))
    seen += files
    absent = [name for name in SETTINGS_FILES if name not in files]
    looked = f"no {' or '.join(SETTINGS_KEYS)} in {CONFIG} or a part of it" + (
        f", no {', '.join(absent)}" if absent else ""
    )
    return f"{looked}; of {shortened(seen, listed=_LISTED)} the meaning is not known" if seen else looked


def _may_hold(name: str) -> bool:
    return "quant" in name.lower() or name == "recipe.yaml"


def _walk(config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield place, key and value of all keys at any depth, the outermost first, but not those within settings."""
    waiting: list[tuple[str, Any]] = [("", config)]
    for place, value in waiting:  # which grows meanwhile
        if isinstance(value, Mapping):
            for key, item in value.items():
                name = f"{place}.{key}" if place else key
                yield name, key, item
                if key not in SETTINGS_KEYS:
                    waiting.append((name, item))
        elif isinstance(value, list):
            waiting += [(f"{place}[{number}]", item) for number, item in enumerate(value)]
