"""`w4a8 env`: what this machine has, for a bug report and for whoever wonders why it is slow."""

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.output import echo, echo_json


class _WithoutTorch(W4A8Command):
    """Works where torch does not."""

    needs_torch = False


@click.command("env", cls=_WithoutTorch)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def env_command(as_json: bool) -> None:
    """Show versions, cores, memory, GPUs, which kernels are in use and why not, and where caches are."""
    from convert_w4a8.cli.environment import as_text, environment

    found = environment()
    if as_json:
        echo_json(found)
    else:
        echo(as_text(found))
