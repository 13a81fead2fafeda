"""What is said on stderr before a conversion begins."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from convert_w4a8.cli.output import echo_error
from convert_w4a8.cli.progress import at_terminal

if TYPE_CHECKING:
    import torch

    from convert_w4a8.conversion.plan import Plan


def say_verbose(device: "torch.device", workers: int | None) -> None:
    """Say with what the conversion works."""
    from convert_w4a8.cli.environment import start_lines
    from convert_w4a8.conversion.jobs import use_workers, worker_count

    with use_workers(workers):
        for line in start_lines(device, worker_count()):
            echo_error(line)


def say_compiling(
    plan: "Plan", device: "torch.device", operations: Sequence[str] = ("repack", "codes"), *, verbose: bool
) -> None:
    """Say that kernels of some operations are compiled first, if that is so; in a log only if it is to be verbose."""
    from convert_w4a8.devices import must_compile

    if not (verbose or at_terminal()):
        return
    new = any(layer.codes == "new" for layer in plan.converted)
    needed = [operation for operation in operations if operation != "codes" or new]
    if plan.converted and must_compile(needed, device):
        echo_error("compiling  the kernels for this CPU, once: that takes some seconds")
