"""`w4a8-convert` and `w4a8 convert`: the conversion itself."""

from pathlib import Path
from typing import Any

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.options import RAY, SIZE, conversion_options, read_options
from convert_w4a8.cli.output import echo, echo_json
from convert_w4a8.cli.paths import CHECKPOINT, LocalPath
from convert_w4a8.cli.progress import progress
from convert_w4a8.cli.push import verify_and_push
from convert_w4a8.cli.ray import cluster_of_command, ray_dict, ray_lines
from convert_w4a8.cli.start import say_compiling, say_verbose
from convert_w4a8.cluster.access import path_on, shards_on
from convert_w4a8.version import __version__


@click.command("convert", cls=W4A8Command)
@click.argument("source", metavar="IN", type=CHECKPOINT)
@click.argument("out", metavar="OUT", type=LocalPath(path_type=Path, directory=True))
@conversion_options
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--max-shard-size", type=SIZE, default="5GB", show_default=True, help="Largest output file.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--resume", is_flag=True, help="Continue a conversion to OUT that was interrupted, if there is one.")
@RAY
@click.option("--push-to", metavar="ORG/NAME[@BRANCH]", help="Verify OUT, then upload it to the Hub.")
@click.option("--private", is_flag=True, help="With --push-to: if the repository is new, make it private.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout.")
@click.version_option(__version__, package_name="w4a8-convert")
def convert_command(
    source: str,
    out: Path,
    device: str,
    workers: int | None,
    verbose: bool,
    dry_run: bool,
    max_shard_size: int,
    overwrite: bool,
    resume: bool,
    ray: str | None,
    push_to: str | None,
    private: bool,
    quiet: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Convert a W4A16 checkpoint (AWQ, GPTQ, compressed-tensors) to W4A8 for vLLM on Hopper.

    IN is a local directory or a Hub id, org/name[@revision]. OUT must not exist or be empty; it appears whole or not
    at all. No GPU is needed.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.cli import render
    from convert_w4a8.conversion.destination import is_finished
    from convert_w4a8.conversion.jobs import use_workers
    from convert_w4a8.conversion.plan import check_tensors, make_plan
    from convert_w4a8.conversion.prediction import predict
    from convert_w4a8.conversion.run import carry_out, check_paths
    from convert_w4a8.devices import resolve_device
    from convert_w4a8.hub.repository import Repository, prepare_repository, resolve_input

    if verbose and quiet:
        raise click.UsageError("--verbose does not go with --quiet")
    torch_device = resolve_device(device if ray is None else "cpu")
    if verbose:
        say_verbose(torch_device, workers)
    checkpoint = open_checkpoint(path_on(ray, resolve_input(source)))
    cluster = cluster_of_command()
    plan = make_plan(checkpoint, read_options(choices, max_shard_size))
    prediction = None
    if as_json or not quiet:
        say_compiling(plan, resolve_device("cpu"), ["codes"], verbose=verbose)
        prediction = predict(plan)
    if not (quiet or as_json):
        echo(render.plan_text(plan, prediction))
    if resume and not dry_run and is_finished(out, checkpoint, plan):
        if as_json:
            echo_json({"output": str(out), "finished_before": True})
        elif not quiet:
            echo(f"finished   {out} is this conversion already; see {render.verify_command(out, source)}")
        return
    check_paths(checkpoint, out, plan, overwrite=overwrite, resume=resume, works_here=ray is None)
    if dry_run:
        check_tensors(plan)
        if as_json:
            echo_json(render.plan_dict(plan, prediction))
        return
    repository = Repository.parse(push_to) if push_to else None
    if repository is not None:  # before the work, so that a wrong token is found now
        prepare_repository(repository, private=private, again="the same command")
    if not (quiet or as_json) or verbose:
        say_compiling(plan, torch_device, verbose=verbose)
    with use_workers(workers), progress(plan.nbytes_in, "convert", quiet=quiet or as_json) as update:
        write = shards_on(cluster, device, workers, update)
        result = carry_out(
            checkpoint, plan, out, device=torch_device, overwrite=overwrite, resume=resume, progress=update, write=write
        )
    if not (quiet or as_json):
        echo(render.result_text(result, source, out))
        for line in ray_lines(cluster):
            echo(line)
    if repository is not None:
        verify_and_push(out, source, repository, private=private, quiet=quiet or as_json)
    if as_json:  # at the end: a refusal of the upload is a document too, and there is one only
        echo_json(render.result_dict(result, out, prediction) | ray_dict(cluster))
