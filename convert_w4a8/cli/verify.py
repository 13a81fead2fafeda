"""`w4a8 verify`: prove a conversion from the bytes of both directories."""

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.output import echo, echo_json
from convert_w4a8.cli.paths import CHECKPOINT
from convert_w4a8.cli.progress import progress


@click.command("verify", cls=W4A8Command)
@click.argument("out", metavar="OUT", type=CHECKPOINT)
@click.option(
    "--source", required=True, metavar="IN", type=CHECKPOINT, help="The checkpoint that OUT was converted from."
)
@click.option(
    "--min-sqnr-db",
    type=float,
    help="Least SQNR of a layer. [default: 25 where codes are kept, else that of round to nearest − 2]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def verify_command(out: str, source: str, min_sqnr_db: float | None, as_json: bool) -> None:
    """Compare a converted checkpoint OUT with its source, from the bytes of both. Exit code 1 if it is not right.

    What `w4a8 distill` wrote is compared with the W4A8 checkpoint that it trained, given as IN.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.cli import render
    from convert_w4a8.hub.repository import resolve_input
    from convert_w4a8.verification.distilled import is_distilled
    from convert_w4a8.verification.either import verify as run

    converted, original = open_checkpoint(resolve_input(out)), open_checkpoint(resolve_input(source))
    if min_sqnr_db is not None and is_distilled(converted):
        raise click.UsageError("--min-sqnr-db is not for what w4a8 distill wrote")
    with progress(original.nbytes, "verify", quiet=as_json) as update:
        verification = run(converted, original, min_sqnr_db=min_sqnr_db, progress=update)
    if as_json:
        echo_json(render.verification_dict(verification))
    else:
        echo(render.verification_text(verification))
    if verification.problems:
        click.get_current_context().exit(1)
