"""Output formats, one module each. A new one is a module with the names of `base.Target`, listed here."""

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.errors import ConvertError
from convert_w4a8.targets import compressed_tensors, lut
from convert_w4a8.targets.base import Target

__all__ = ["TARGETS", "Target", "find_target", "target_named"]

TARGETS: tuple[Target, ...] = (lut, compressed_tensors)


def target_named(name: str) -> Target:
    """Return the format called `name`; KeyError if there is none."""
    return {target.NAME: target for target in TARGETS}[name]


def find_target(checkpoint: Checkpoint) -> Target:
    """Return the output format that a converted checkpoint is in.

    Raises:
        ConvertError: it is none of ours.

    """
    for target in TARGETS:
        if target.matches(checkpoint.quantization_config):
            return target
    method = checkpoint.quantization_config.get("quant_method")
    raise ConvertError(f"{checkpoint.root}: quant_method", f"{method!r} is not an output format", "convert it first")
