"""Output formats, a module each. A module here with the names of `base.Target` is one; that is all.

One of them is W4A16, which no conversion writes, but `w4a8 quantize` beside W4A8. `target_names` imports none of them,
and so nothing heavy: the command line asks it.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, cast

from convert_w4a8.errors import ConvertError

if TYPE_CHECKING:
    from convert_w4a8.checkpoint.directory import Checkpoint
    from convert_w4a8.targets.base import Target

__all__ = ["W4A16", "find_target", "target_named", "target_names", "targets"]

W4A16 = "w4a16"
"""The name of the format that is not W4A8."""
_NOT_FORMATS = ("base", "pack_quantized", W4A16)


def target_names() -> tuple[str, ...]:
    """Return the names of all formats of W4A8, as `--format` takes them: those of their files, with dashes."""
    names = sorted(module.name for module in iter_modules(__path__) if module.name not in _NOT_FORMATS)
    return tuple(name.replace("_", "-") for name in names)


@cache
def targets() -> tuple["Target", ...]:
    """Return all formats of W4A8, in the order of their names."""
    return tuple(map(target_named, target_names()))


def target_named(name: str) -> "Target":
    """Return the format called `name`; KeyError if there is none."""
    if name not in (*target_names(), W4A16):
        raise KeyError(name)
    return cast("Target", import_module(f"{__name__}.{name.replace('-', '_')}"))


def find_target(checkpoint: "Checkpoint") -> "Target":
    """Return the output format that a converted checkpoint is in.

    Raises:
        ConvertError: it is none of ours.

    """
    for target in (target_named(W4A16), *targets()):  # a special case of compressed-tensors
        if target.matches(checkpoint.quantization_config):
            return target
    method = checkpoint.quantization_config.get("quant_method")
    raise ConvertError(f"{checkpoint.root}: quant_method", f"{method!r} is not an output format", "convert it first")
