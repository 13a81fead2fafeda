"""A plugin for vLLM that has no kernel of Triton launched before the one ahead of it has ended."""

from typing import Any

MORE = "late_launches:register"
"""The entry point."""


def register() -> None:
    """Leave out what has a kernel start early; that it waits for its predecessor then does nothing."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def late(self: Any, *args: Any, **options: Any) -> Any:
        options.pop("launch_pdl", None)
        return run(self, *args, **options)

    JITFunction.run = late
