"""Output formats, a module each. A module here with the names of `base.Target` is one; that is all.

`target_names` imports none of them, and so nothing heavy: the command line asks it.
"""

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, cast

from convert_w4a8.errors import ConvertError

if TYPE_CHECKING:
    from convert_w4a8.checkpoint.directory import Checkpoint
    from convert_w4a8.targets.base import Target

__all__ = ["find_target", "target_named", "target_names", "targets"]

_NOT_FORMATS = ("base",)


def target_names() -> tuple[str, ...]:
    """Return the names of all output formats, as `--format` takes them: those of their files, with dashes."""
    names = sorted(module.name for module in iter_modules(__path__) if module.name not in _NOT_FORMATS)
    return tuple(name.replace("_", "-") for name in names)


@cache
def targets() -> tuple["Target", ...]:
    """Return all output formats, in the order of their names."""
    return tuple(map(target_named, target_names()))


def target_named(name: str) -> "Target":
    """Return the format called `name`; KeyError if there is none."""
    if name not in target_names():
        raise KeyError(name)
    return cast("Target", import_module(f"{__name__}.{name.replace('-', '_')}"))


def find_target(checkpoint: "Checkpoint") -> "Target":
    """Return the output format that a converted checkpoint is in.

    Raises:
        ConvertError: it is none of ours.

    """
    for target in targets():
        if target.matches(checkpoint.quantization_config):
            return target
    method = checkpoint.quantization_config.get("quant_method")
    raise ConvertError(f"{checkpoint.root}: quant_method", f"{method!r} is not an output format", "convert it first")
