"""Whose format: input formats, a module each. A module here with the names of `base.Source` is one; that is all."""

from collections.abc import Iterable
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import cast

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import CONFIG
from convert_w4a8.checkpoint.settings import where_looked
from convert_w4a8.errors import ConvertError
from convert_w4a8.sources.base import LayerSpec, Source

__all__ = [
    "LayerSpec",
    "Source",
    "find_notes",
    "find_origin",
    "find_source",
    "source_named",
    "sources",
    "unquantized_source",
]

_NOT_FORMATS = (
    "base",
    "carried",
    "checks",
    "config_groups",
    "ct_settings",
    "fused_experts",
    "patterns",
    "settings",
    "unquantized",
)


@cache
def sources() -> tuple[Source, ...]:
    """Return all input formats, in the order of their names."""
    names = sorted(module.name for module in iter_modules(__path__) if module.name not in _NOT_FORMATS)
    return tuple(cast("Source", import_module(f"{__name__}.{name}")) for name in names)


def source_named(name: str) -> Source:
    """Return the format called `name`, that of unquantized models too; KeyError if there is none."""
    return {source.NAME: source for source in (*sources(), unquantized_source())}[name]


def unquantized_source() -> Source:
    """Return the format of models that are not quantized yet, from which `w4a8 quantize` starts."""
    return cast("Source", import_module(f"{__name__}.unquantized"))


def find_origin(checkpoint: Checkpoint) -> Source:
    """Return the format of what an output was made from: of a quantized checkpoint, or of one that is not.

    Raises:
        ConvertError: it is none that is known.

    """
    model = unquantized_source()
    anchors = tuple(f".{source.ANCHOR}" for source in sources() if source.ANCHOR != model.ANCHOR)
    is_quantized = any(source.matches(checkpoint) for source in sources())
    # Settings of FP8 say themselves what the tensors are; where there are none, the tensors do.
    is_said = bool(checkpoint.quantization_config) or not any(name.endswith(anchors) for name in checkpoint.tensors)
    if not is_quantized and is_said and model.matches(checkpoint):
        return model
    return find_source(checkpoint)


def find_source(checkpoint: Checkpoint) -> Source:
    """Return the format of a checkpoint.

    Raises:
        ConvertError: it is none that is known.

    """
    for source in sources():
        if source.matches(checkpoint):
            return source
    known = ", ".join(source.NAME for source in sources())
    if not checkpoint.quantization_config:
        looked = where_looked(checkpoint.root, checkpoint.config)
        anchors = tuple({f".{source.ANCHOR}" for source in sources()} - {".weight"})
        quantized = next((name for name in checkpoint.tensors if name.endswith(anchors)), None)
        if quantized is not None:
            raise ConvertError(
                str(checkpoint.root),
                f"is quantized ({quantized}), but does not say how: {looked}",
                f"add its quantization_config to {CONFIG}",
            )
        raise ConvertError(
            str(checkpoint.root),
            f"is not quantized: {looked}",
            f"quantize it (w4a8 quantize), or give a W4A16 checkpoint ({known})",
        )
    method = checkpoint.quantization_config.get("quant_method")
    raise ConvertError(
        f"{checkpoint.root / checkpoint.settings_place}: quant_method",
        f"{method!r} is not supported",
        f"supported are {known}, with 4-bit weights",
    )


def find_notes(source: Source, checkpoint: Checkpoint) -> Iterable[str]:
    """Return what a format has to say of a checkpoint's settings in the plan; it need not have a `find_notes`."""
    find = getattr(source, "find_notes", None)
    return find(checkpoint) if find else ()
