"""Input formats, one module each. A new one is a module with the names of `base.Source`, listed here."""

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.errors import ConvertError
from convert_w4a8.sources import awq, compressed_tensors, gptq
from convert_w4a8.sources.base import LayerSpec, Source

__all__ = ["SOURCES", "LayerSpec", "Source", "find_source"]

SOURCES: tuple[Source, ...] = (awq, gptq, compressed_tensors)


def find_source(checkpoint: Checkpoint) -> Source:
    """Return the format of a checkpoint.

    Raises:
        ConvertError: it is none that is known.

    """
    for source in SOURCES:
        if source.matches(checkpoint.quantization_config):
            return source
    method = checkpoint.quantization_config.get("quant_method")
    known = ", ".join(source.NAME for source in SOURCES)
    raise ConvertError(
        f"{checkpoint.root}: quant_method", f"{method!r} is not supported", f"supported are {known}, with 4-bit weights"
    )
