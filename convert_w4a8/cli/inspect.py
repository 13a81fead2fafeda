"""`w4a8 inspect`: what a checkpoint holds."""

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.output import echo, echo_json
from convert_w4a8.cli.paths import CHECKPOINT


@click.command("inspect", cls=W4A8Command)
@click.argument("source", metavar="DIR", type=CHECKPOINT)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def inspect_command(source: str, as_json: bool) -> None:
    """Show what a checkpoint holds: format, layers, zero-points, activation order, sizes.

    DIR is a local directory or a Hub id; a W4A16 checkpoint or one that this tool wrote.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.hub.repository import resolve_input
    from convert_w4a8.report import inspection

    found = inspection.inspect(open_checkpoint(resolve_input(source)))
    if as_json:
        echo_json(inspection.as_dict(found))
    else:
        echo(inspection.as_text(found))
