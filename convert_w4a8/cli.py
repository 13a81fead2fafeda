"""Command line: parse, call, render, exit. Everything heavy is imported by the command that needs it."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from convert_w4a8 import __version__
from convert_w4a8.cli_options import Size, conversion_options, read_options
from convert_w4a8.errors import ConvertError, PlanError, W4A8Error
from convert_w4a8.startup import import_torch

if TYPE_CHECKING:
    from convert_w4a8.hub import Repository


class W4A8Command(click.Command):
    """A command whose user errors become lines on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Errors that are not the user's keep their traceback."""
        try:
            import_torch()
            return super().invoke(ctx)
        except PlanError as error:
            count = len(error.refusals)
            click.echo(f"Error: {count} obstacle{'s' * (count != 1)}; nothing was written.", err=True)
            for refusal in error.refusals:
                click.echo(f"  {refusal}", err=True)
        except W4A8Error as error:
            click.echo("; ".join([f"Error: {error}", *getattr(error, "__notes__", ())]), err=True)
        except KeyboardInterrupt as error:
            click.echo("; ".join(["Interrupted", *getattr(error, "__notes__", ["nothing was written"])]), err=True)
            ctx.exit(130)
        return ctx.exit(1)


@contextmanager
def _progress(total: int, label: str, *, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar in bytes on stderr, if that is a terminal."""
    from tqdm import tqdm

    hidden = quiet or not sys.stderr.isatty()
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=hidden) as bar:
        yield bar.update


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
    from convert_w4a8 import render
    from convert_w4a8.checkpoint import open_checkpoint
    from convert_w4a8.convert import check_paths, resolve_device
    from convert_w4a8.convert import convert as run
    from convert_w4a8.hub import Repository, prepare_repository, resolve_input
    from convert_w4a8.plan import make_plan

    torch_device = resolve_device(device)
    checkpoint = open_checkpoint(resolve_input(source))
    plan = make_plan(checkpoint, read_options(choices, max_shard_size))
    if not (quiet or as_json):
        click.echo(render.plan_text(plan))
    if dry_run:
        if as_json:
            _echo_json(render.plan_dict(plan))
        return
    check_paths(checkpoint, out, plan, overwrite=overwrite, resume=resume)
    repository = Repository.parse(push_to) if push_to else None
    if repository is not None:  # before the work, so that a wrong token is found now
        prepare_repository(repository, private=private, again="the same command")
    with _progress(plan.nbytes_in, "convert", quiet=quiet) as update:
        result = run(checkpoint, plan, out, device=torch_device, overwrite=overwrite, resume=resume, progress=update)
    if as_json:
        _echo_json(render.result_dict(result, out))
    elif not quiet:
        click.echo(render.result_text(result, source, out))
    if repository is not None:
        _verify_and_push(out, source, repository, private=private, quiet=quiet or as_json)


def _echo_json(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, indent=2))


def _verify_and_push(out: Path, source: str, repository: "Repository", *, private: bool, quiet: bool) -> None:
    """Upload OUT if it is right. Raises ConvertError if it is not, or if the upload fails."""
    from convert_w4a8.checkpoint import open_checkpoint
    from convert_w4a8.hub import prepare_repository, resolve_input, upload
    from convert_w4a8.verify import verify as run

    again = ["w4a8", "push", str(out), repository.id, "--source", source]
    again += ["--revision", repository.revision] if repository.revision else []
    command = shlex.join([*again, *(["--private"] if private else [])])
    converted, original = open_checkpoint(out), open_checkpoint(resolve_input(source))
    with _progress(original.nbytes, "verify", quiet=quiet) as update:
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


@main.command(cls=W4A8Command)
@click.argument("source", metavar="DIR")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def inspect(source: str, as_json: bool) -> None:
    """Show what a checkpoint holds: format, layers, zero-points, activation order, sizes.

    DIR is a local directory or a Hub id; a W4A16 checkpoint or one that this tool wrote.
    """
    from convert_w4a8 import inspection
    from convert_w4a8.checkpoint import open_checkpoint
    from convert_w4a8.hub import resolve_input

    found = inspection.inspect(open_checkpoint(resolve_input(source)))
    if as_json:
        _echo_json(inspection.as_dict(found))
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
    from convert_w4a8 import render
    from convert_w4a8.checkpoint import open_checkpoint
    from convert_w4a8.hub import resolve_input
    from convert_w4a8.verify import verify as run

    converted, original = open_checkpoint(resolve_input(out)), open_checkpoint(resolve_input(source))
    with _progress(original.nbytes, "verify", quiet=as_json) as update:
        verification = run(converted, original, min_sqnr_db=min_sqnr_db, progress=update)
    if as_json:
        _echo_json(render.verification_dict(verification))
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
    from convert_w4a8.hub import Repository

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
    from convert_w4a8 import report as reports
    from convert_w4a8 import report_html, report_pictures
    from convert_w4a8.checkpoint import open_checkpoint
    from convert_w4a8.hub import resolve_input

    if html is None and png_dir is None and not as_json:
        raise click.UsageError("give --html, --png-dir or --json")
    with_pictures = html is not None or png_dir is not None
    if with_pictures:
        report_pictures.require_matplotlib()
    converted, original = open_checkpoint(resolve_input(out)), open_checkpoint(resolve_input(source))
    with _progress(original.nbytes, "report", quiet=as_json) as update:
        found = reports.collect(converted, original, progress=update)
    if with_pictures:
        pictures = report_pictures.draw(found)
        written = {png_dir / f"{name}.png": png for name, png in pictures.items()} if png_dir is not None else {}
        if html is not None:
            written[html] = report_html.render(found, pictures).encode()
        _write_files(written)
    if as_json:
        _echo_json(reports.as_dict(found))
    else:
        click.echo(reports.as_text(found))


def _write_files(files: dict[Path, bytes]) -> None:
    for path, content in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        except OSError as error:
            raise ConvertError(str(path), f"cannot be written ({error.strerror})", "choose another path") from error


@main.command(cls=W4A8Command)
@click.argument("source", metavar="IN")
@conversion_options
@click.option("--out", metavar="OUT", type=click.Path(path_type=Path), help="Check this conversion; make none.")
@click.option(
    "--sample", is_flag=True, help="Convert one layer of each kind; read, and fetch from the Hub, nothing else."
)
@click.option(
    "--baseline",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Fail where layers, codes, SQNR or sizes are not those of this baseline.",
)
@click.option(
    "--write-baseline",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a baseline, if the conversion is right.",
)
@click.option(
    "--tolerance-db",
    type=click.FloatRange(min=0),
    default=0.1,
    show_default=True,
    help="How far the SQNR of a layer may fall under the baseline.",
)
@click.option(
    "--min-sqnr-db",
    type=float,
    help="Least SQNR of a layer. [default: 25 where codes are kept, else that of plain rounding − 2]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of Markdown.")
def check(
    source: str,
    out: Path | None,
    sample: bool,
    baseline: Path | None,
    write_baseline: Path | None,
    tolerance_db: float,
    min_sqnr_db: float | None,
    device: str,
    as_json: bool,
    **choices: str,
) -> None:
    """Check that IN still converts as well as it did: convert, verify, compare with a baseline. For CI.

    The conversion goes to the directory for temporary files (TMPDIR) and is removed again. Exit code 1 if anything is
    wrong. The summary is Markdown; in GitHub Actions it is appended to the job's summary too.
    """
    from convert_w4a8 import check as checks
    from convert_w4a8 import check_text
    from convert_w4a8.checkpoint import open_checkpoint
    from convert_w4a8.convert import resolve_device
    from convert_w4a8.hub import is_hub_id, resolve_input
    from convert_w4a8.remote import open_remote

    if sample and out is not None:
        raise click.UsageError("--sample converts layers of its own, so it does not go with --out")
    torch_device = resolve_device(device)
    known = None if baseline is None else checks.read_baseline(baseline)
    with ExitStack() as stack:
        fetch: Callable[[Iterable[str]], None] = lambda _names: None  # noqa: E731
        if sample and is_hub_id(source):
            remote = open_remote(source, Path(stack.enter_context(TemporaryDirectory(prefix="w4a8-check-"))))
            checkpoint, fetch = remote.checkpoint, remote.fetch
        else:
            checkpoint = open_checkpoint(resolve_input(source))
        total = checkpoint.nbytes * (1 if out else 2)
        update = stack.enter_context(_progress(total, "check", quiet=as_json or sample))
        outcome = checks.check(
            checkpoint,
            read_options(choices),
            out=out,
            sample=sample,
            baseline=known,
            min_sqnr_db=min_sqnr_db,
            tolerance_db=tolerance_db,
            name=source if is_hub_id(source) else None,
            fetch=fetch,
            device=torch_device,
            progress=update,
        )
    summary = check_text.as_markdown(outcome)
    if write_baseline is not None and outcome.figures is not None and outcome.verified:
        _write_files({write_baseline: (json.dumps(checks.baseline_dict(outcome.figures), indent=1) + "\n").encode()})
    if "GITHUB_STEP_SUMMARY" in os.environ:
        with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as file:
            file.write(summary)
    if as_json:
        _echo_json(check_text.as_dict(outcome))
    else:
        click.echo(summary, nl=False)
    if outcome.problems:
        click.get_current_context().exit(1)
