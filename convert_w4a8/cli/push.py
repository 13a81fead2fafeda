"""`w4a8 push`: upload a conversion that passes `verify`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.output import echo
from convert_w4a8.cli.paths import CHECKPOINT, LocalPath
from convert_w4a8.cli.progress import at_terminal, progress
from convert_w4a8.errors import ConvertError

if TYPE_CHECKING:
    from convert_w4a8.hub.repository import Repository


@click.command("push", cls=W4A8Command)
@click.argument("out", metavar="OUT", type=LocalPath(path_type=Path, directory=True))
@click.argument("repository", metavar="ORG/NAME")
@click.option(
    "--source", required=True, metavar="IN", type=CHECKPOINT, help="The checkpoint that OUT was converted from."
)
@click.option("--private", is_flag=True, help="If the repository is new, make it private.")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to; it is created if it is absent.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def push_command(out: Path, repository: str, source: str, private: bool, revision: str | None, quiet: bool) -> None:
    """Upload a converted checkpoint OUT to the Hub, if it passes `verify` against its source.

    Log in first: `hf auth login`, or HF_TOKEN. After a failure the same command continues.
    """
    from convert_w4a8.hub.repository import Repository

    verify_and_push(out, source, Repository.parse(repository, revision), private=private, quiet=quiet)


def verify_and_push(out: Path, source: str, repository: "Repository", *, private: bool, quiet: bool) -> None:
    """Upload OUT if it is right. Raises ConvertError if it is not, or if the upload fails."""
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.hub.repository import prepare_repository, resolve_input, upload
    from convert_w4a8.verification.either import verify as run

    again = ["w4a8", "push", str(out), repository.id, "--source", source]
    again += ["--revision", repository.revision] if repository.revision else []
    command = shlex.join([*again, *(["--private"] if private else [])])
    converted, original = open_checkpoint(out), open_checkpoint(resolve_input(source))
    with progress(original.nbytes, "verify", quiet=quiet) as update:
        problems = run(converted, original, progress=update).problems
    if problems:
        first = f"{problems[0].subject}: {problems[0].reason}"
        raise ConvertError(
            str(out),
            f"does not pass verification, nothing was uploaded ({len(problems)} problems; {first})",
            f"see `w4a8 verify`, and convert {source} again",
        )
    prepare_repository(repository, private=private, again=command)
    address = upload(repository, converted, again=command, progress=at_terminal() and not quiet)
    if not quiet:
        echo(f"pushed     {address}")
