"""`w4a8 verify`: prove a conversion from the bytes of both directories."""

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.options import RAY, Number
from convert_w4a8.cli.output import echo, echo_json
from convert_w4a8.cli.paths import CHECKPOINT
from convert_w4a8.cli.progress import progress
from convert_w4a8.cli.ray import cluster_of_command, ray_dict, ray_lines
from convert_w4a8.cluster.access import path_on, units_on


@click.command("verify", cls=W4A8Command)
@click.argument("out", metavar="OUT", type=CHECKPOINT)
@click.option(
    "--source", required=True, metavar="IN", type=CHECKPOINT, help="The checkpoint that OUT was converted from."
)
@click.option(
    "--min-sqnr-db",
    type=Number(),
    help="Least SQNR of a layer. [default: 25 where codes are kept, else that of round to nearest − 2]",
)
@RAY
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def verify_command(out: str, source: str, min_sqnr_db: float | None, ray: str | None, as_json: bool) -> None:
    """Compare a converted checkpoint OUT with its source, from the bytes of both. Exit code 1 if it is not right.

    What `w4a8 distill` wrote is compared with the W4A8 checkpoint that it trained, given as IN.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.cli import render
    from convert_w4a8.hub.repository import resolve_input
    from convert_w4a8.verification.either import check_choices
    from convert_w4a8.verification.either import verify as run

    converted, original = (open_checkpoint(path_on(ray, resolve_input(name))) for name in (out, source))
    try:
        check_choices(converted, min_sqnr_db=min_sqnr_db, ray=ray)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    cluster = cluster_of_command()
    with progress(original.nbytes, "verify", quiet=as_json) as update:
        check = units_on(cluster)
        verification = run(converted, original, min_sqnr_db=min_sqnr_db, progress=update, check=check)
    if as_json:
        echo_json(render.verification_dict(verification) | ray_dict(cluster))
    else:
        echo("\n".join([render.verification_text(verification), *ray_lines(cluster)]))
    if verification.problems:
        click.get_current_context().exit(1)
