"""Plugins for vLLM that take away a part of what the decode kernels do: to find out which part makes a difference."""

import sys
from typing import Any

LATE, DENSE_ONLY, EXPERTS_ONLY = (f"kernel_parts:{name}" for name in ("late", "dense_only", "experts_only"))
"""The entry points."""


def late() -> None:
    """Launch every kernel of Triton when the one ahead of it has ended, for which it then need not wait."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def later(self: Any, *args: Any, **options: Any) -> Any:
        options.pop("launch_pdl", None)
        return run(self, *args, **options)

    JITFunction.run = later


def dense_only() -> None:
    """Have CUTLASS run experts, where it can."""
    _never("convert_w4a8.vllm_plugin.experts", "convert_w4a8.vllm_plugin.moe")


def experts_only() -> None:
    """Have CUTLASS run linear layers, where it can."""
    _never("convert_w4a8.vllm_plugin.gemm")


def _never(module: str, *others: str) -> None:
    """Say no where a module asks whether our kernel is the faster one."""
    __import__(module)
    for name in (module, *others):
        if name in sys.modules:
            sys.modules[name].takes = lambda *_sizes: False  # type: ignore[attr-defined]
