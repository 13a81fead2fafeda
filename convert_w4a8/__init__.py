"""Convert W4A16 checkpoints (AWQ, GPTQ, compressed-tensors) to W4A8 for vLLM on NVIDIA Hopper.

The public names are loaded when they are asked for: importing this package is cheap, and needs no GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from convert_w4a8.version import __version__

if TYPE_CHECKING:
    from convert_w4a8.api import (
        check,
        convert,
        distill,
        evaluate,
        inspect,
        make_plan,
        make_report,
        open_checkpoint,
        quantize,
        verify,
    )
    from convert_w4a8.calibration.options import Preset, QuantizeOptions, TableKind
    from convert_w4a8.distillation.options import DistillOptions
    from convert_w4a8.errors import ConvertError, PlanError, Problem, W4A8Error
    from convert_w4a8.evaluation.options import EvaluateOptions
    from convert_w4a8.options import Options, Policy, ScalesMode, Unsupported

__all__ = [
    "ConvertError",
    "DistillOptions",
    "EvaluateOptions",
    "Options",
    "PlanError",
    "Policy",
    "Preset",
    "Problem",
    "QuantizeOptions",
    "ScalesMode",
    "TableKind",
    "Unsupported",
    "W4A8Error",
    "__version__",
    "check",
    "convert",
    "distill",
    "evaluate",
    "inspect",
    "make_plan",
    "make_report",
    "open_checkpoint",
    "quantize",
    "verify",
]

_HOMES = {
    "convert_w4a8.api": (
        "check",
        "convert",
        "distill",
        "evaluate",
        "inspect",
        "make_plan",
        "make_report",
        "open_checkpoint",
        "quantize",
        "verify",
    ),
    "convert_w4a8.calibration.options": ("Preset", "QuantizeOptions", "TableKind"),
    "convert_w4a8.distillation.options": ("DistillOptions",),
    "convert_w4a8.errors": ("ConvertError", "PlanError", "Problem", "W4A8Error"),
    "convert_w4a8.evaluation.options": ("EvaluateOptions",),
    "convert_w4a8.options": ("Options", "Policy", "ScalesMode", "Unsupported"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
