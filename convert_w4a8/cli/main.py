"""Command line: parse, call, render, exit. Everything heavy is imported by the command that needs it."""

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from convert_w4a8 import __version__
from convert_w4a8.cli.base import W4A8Command, echo_json, progress, write_files
from convert_w4a8.cli.check import check
from convert_w4a8.cli.options import Size, conversion_options, read_options
from convert_w4a8.errors import ConvertError

if TYPE_CHECKING:
    from convert_w4a8.hub.repository import Repository


@click.command("convert", cls=W4A8Command)
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@conversion_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--resume", is_flag=True, help="Continue a conversion to OUT that was interrupted, if there is one.")
@click.option("--push-to", metavar="ORG/NAME[@BRANCH]", help="Verify OUT, then upload it to the Hub.")
@click.option("--private", is_flag=True, help="With --push-to: if the repository is new, make it private.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout.")
@click.version_option(__version__, package_name="w4a8-convert")
def convert(
    source: str,
    out: Path,
    device: str,
    dry_run: bool,
    max_shard_size: int,
    overwrite: bool,
    resume: bool,
    push_to: str | None,
    private: bool,
    quiet: bool,
    as_json: bool,
    **choices: str,
) -> None:
    """Convert a W4A16 checkpoint (AWQ, GPTQ, compressed-tensors) to W4A8 for vLLM on Hopper.

    IN is a local directory or a Hub id, org/name[@revision]. OUT must not exist or be empty; it appears whole or not
    at all. No GPU is needed.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.cli import render
    from convert_w4a8.conversion.plan import make_plan
    from convert_w4a8.conversion.run import check_paths
    from convert_w4a8.conversion.run import convert as run
    from convert_w4a8.devices import resolve_device
    from convert_w4a8.hub.repository import Repository, prepare_repository, resolve_input

    torch_device = resolve_device(device)
    checkpoint = open_checkpoint(resolve_input(source))
    plan = make_plan(checkpoint, read_options(choices, max_shard_size))
    if not (quiet or as_json):
        click.echo(render.plan_text(plan))
    if dry_run:
        if as_json:
            echo_json(render.plan_dict(plan))
        return
    check_paths(checkpoint, out, plan, overwrite=overwrite, resume=resume)
    repository = Repository.parse(push_to) if push_to else None
    if repository is not None:  # before the work, so that a wrong token is found now
        prepare_repository(repository, private=private, again="the same command")
    with progress(plan.nbytes_in, "convert", quiet=quiet) as update:
        result = run(checkpoint, plan, out, device=torch_device, overwrite=overwrite, resume=resume, progress=update)
    if as_json:
        echo_json(render.result_dict(result, out))
    elif not quiet:
        click.echo(render.result_text(result, source, out))
    if repository is not None:
        _verify_and_push(out, source, repository, private=private, quiet=quiet or as_json)


def _verify_and_push(out: Path, source: str, repository: "Repository", *, private: bool, quiet: bool) -> None:
    """Upload OUT if it is right. Raises ConvertError if it is not, or if the upload fails."""
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.hub.repository import prepare_repository, resolve_input, upload
    from convert_w4a8.verification.proof import verify as run

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
    address = upload(repository, converted, again=command, progress=sys.stderr.isatty() and not quiet)
    if not quiet:
        click.echo(f"pushed     {address}")


@click.group()
@click.version_option(__version__, package_name="w4a8-convert")
def main() -> None:
    """W4A8 checkpoints for vLLM on Hopper: convert, inspect, verify, report, push, check."""


main.add_command(convert)
main.add_command(check)


@main.command(cls=W4A8Command)
@click.argument("source", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def inspect(source: str, as_json: bool) -> None:
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
        click.echo(inspection.as_text(found))


@main.command(cls=W4A8Command)
@click.argument("out", metavar="OUT")
@click.option("--source", required=True, metavar="IN", help="The checkpoint that OUT was converted from.")
@click.option(
    "--min-sqnr-db",
    type=float,
    help="Least SQNR of a layer. [default: 25 where codes are kept, else that of plain rounding − 2]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def verify(out: str, source: str, min_sqnr_db: float | None, as_json: bool) -> None:
    """Compare a converted checkpoint OUT with its source, from the bytes of both. Exit code 1 if it is not right."""
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.cli import render
    from convert_w4a8.hub.repository import resolve_input
    from convert_w4a8.verification.proof import verify as run

    converted, original = open_checkpoint(resolve_input(out)), open_checkpoint(resolve_input(source))
    with progress(original.nbytes, "verify", quiet=as_json) as update:
        verification = run(converted, original, min_sqnr_db=min_sqnr_db, progress=update)
    if as_json:
        echo_json(render.verification_dict(verification))
    else:
        click.echo(render.verification_text(verification))
    if verification.problems:
        click.get_current_context().exit(1)


@main.command(cls=W4A8Command)
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--source", required=True, metavar="IN", help="The checkpoint that OUT was converted from.")
@click.option("--private", is_flag=True, help="If the repository is new, make it private.")
@click.option("--revision", metavar="BRANCH", help="Branch to upload to; it is created if it is absent.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
def push(out: Path, repository: str, source: str, private: bool, revision: str | None, quiet: bool) -> None:
    """Upload a converted checkpoint OUT to the Hub, if it passes `verify` against its source.

    Log in first: `hf auth login`, or HF_TOKEN. After a failure the same command continues.
    """
    from convert_w4a8.hub.repository import Repository

    _verify_and_push(out, source, Repository.parse(repository, revision), private=private, quiet=quiet)


@main.command(cls=W4A8Command)
@click.argument("out", metavar="OUT")
@click.option("--source", required=True, metavar="IN", help="The checkpoint that OUT was converted from.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write one self-contained HTML file.",
)
@click.option("--png-dir", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Write the pictures.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers behind it as one JSON document on stdout.")
def report(out: str, source: str, html: Path | None, png_dir: Path | None, as_json: bool) -> None:
    """Show what a conversion did: SQNR by layer, group scales, clipping, memory. From the bytes of both checkpoints.

    The pictures need matplotlib: pip install 'w4a8-convert[report]'.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.hub.repository import resolve_input
    from convert_w4a8.report import collect as reports
    from convert_w4a8.report import html as report_html
    from convert_w4a8.report import pictures as report_pictures

    if html is None and png_dir is None and not as_json:
        raise click.UsageError("give --html, --png-dir or --json")
    with_pictures = html is not None or png_dir is not None
    if with_pictures:
        report_pictures.require_matplotlib()
    converted, original = open_checkpoint(resolve_input(out)), open_checkpoint(resolve_input(source))
    with progress(original.nbytes, "report", quiet=as_json) as update:
        found = reports.collect(converted, original, progress=update)
    if with_pictures:
        pictures = report_pictures.draw(found)
        written = {png_dir / f"{name}.png": png for name, png in pictures.items()} if png_dir is not None else {}
        if html is not None:
            written[html] = report_html.render(found, pictures).encode()
        write_files(written)
    if as_json:
        echo_json(reports.as_dict(found))
    else:
        click.echo(reports.as_text(found))
