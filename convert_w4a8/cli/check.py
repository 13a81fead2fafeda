"""`w4a8 check`: whether a checkpoint still converts as well as it did."""

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.files import append_for_the_job, check_writable, write_files
from convert_w4a8.cli.options import RAY, Number, NumberRange, conversion_options, read_options
from convert_w4a8.cli.output import echo, echo_json
from convert_w4a8.cli.paths import CHECKPOINT, LocalPath
from convert_w4a8.cli.progress import progress
from convert_w4a8.cli.ray import cluster_of_command, ray_dict
from convert_w4a8.cli.start import say_verbose
from convert_w4a8.cluster.access import path_on, shards_on, units_on


@click.command("check", cls=W4A8Command)
@click.argument("source", metavar="IN", type=CHECKPOINT)
@conversion_options
@click.option(
    "--out",
    metavar="OUT",
    type=LocalPath(path_type=Path, directory=True),
    help="Check this conversion; make none.",
)
@click.option(
    "--sample", is_flag=True, help="Convert one layer of each kind; read, and fetch from the Hub, nothing else."
)
@click.option(
    "--baseline",
    type=LocalPath(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Fail where layers, codes, SQNR or sizes are not those of this baseline.",
)
@click.option(
    "--write-baseline",
    type=LocalPath(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write a baseline, if the conversion is right.",
)
@click.option(
    "--tolerance-db",
    type=NumberRange(min=0),
    default=0.1,
    show_default=True,
    help="How far the SQNR of a layer may fall under the baseline.",
)
@click.option(
    "--min-sqnr-db",
    type=Number(),
    help="Least SQNR of a layer. [default: 25 where codes are kept, else that of round to nearest − 2]",
)
@RAY
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of Markdown.")
def check_command(
    source: str,
    out: Path | None,
    sample: bool,
    baseline: Path | None,
    write_baseline: Path | None,
    tolerance_db: float,
    min_sqnr_db: float | None,
    device: str,
    workers: int | None,
    ray: str | None,
    verbose: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Check that IN still converts as well as it did: convert, verify, compare with a baseline. For CI.

    The conversion goes to the directory for temporary files (TMPDIR) and is removed again. Exit code 1 if anything is
    wrong. The summary is Markdown; in GitHub Actions it is appended to the job's summary too.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.conversion.jobs import use_workers
    from convert_w4a8.devices import resolve_device
    from convert_w4a8.hub.partial import open_remote
    from convert_w4a8.hub.repository import is_hub_id, resolve_input
    from convert_w4a8.regression import baseline as baseline_module
    from convert_w4a8.regression import check as check_module
    from convert_w4a8.regression import text

    try:
        check_module.check_choices(out=out, sample=sample)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    torch_device = resolve_device(device if ray is None else "cpu")
    if verbose:
        say_verbose(torch_device, workers)
    check_writable(*([write_baseline] if write_baseline is not None else []))
    known = None if baseline is None else baseline_module.read_baseline(baseline)
    with ExitStack() as stack:
        fetch: Callable[[Iterable[str]], None] = lambda _names: None  # noqa: E731
        if sample and is_hub_id(source):
            remote = open_remote(source, Path(stack.enter_context(TemporaryDirectory(prefix="w4a8-check-"))))
            checkpoint, fetch = remote.checkpoint, remote.fetch
        else:
            checkpoint = open_checkpoint(path_on(ray, resolve_input(source)))
        cluster = cluster_of_command()
        total = checkpoint.nbytes * (1 if out else 2)
        stack.enter_context(use_workers(workers))
        update = stack.enter_context(progress(total, "check", quiet=as_json or sample))
        outcome = check_module.check(
            checkpoint,
            read_options(choices),
            out=None if out is None else path_on(ray, out),
            sample=sample,
            baseline=known,
            min_sqnr_db=min_sqnr_db,
            tolerance_db=tolerance_db,
            name=source if is_hub_id(source) else None,
            fetch=fetch,
            device=torch_device,
            progress=update,
            write=shards_on(cluster, device, workers, update),
            prove=units_on(cluster),
        )
    summary = text.as_markdown(outcome)
    if write_baseline is not None and outcome.figures is not None and outcome.verified:
        write_files(
            {write_baseline: (json.dumps(baseline_module.baseline_dict(outcome.figures), indent=1) + "\n").encode()}
        )
    if as_json:
        echo_json(text.as_dict(outcome) | ray_dict(cluster))
    else:
        echo(summary, nl=False)
    append_for_the_job(summary)
    if outcome.problems:
        click.get_current_context().exit(1)
