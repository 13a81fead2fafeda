"""`w4a8 quantize`: from a model in 16 bits to W4A8."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convert_w4a8.calibration.options import Preset, QuantizeOptions, TableKind
from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.data import page_of, read_data
from convert_w4a8.cli.options import LAYERS, RAY, SIZE, data_options, max_tokens_option
from convert_w4a8.cli.output import echo, echo_error, echo_json
from convert_w4a8.cli.paths import CHECKPOINT, LocalPath
from convert_w4a8.cli.progress import progress
from convert_w4a8.cli.ray import cluster_of_command, ray_dict, ray_lines
from convert_w4a8.cluster.access import calls_on, path_on, shards_on
from convert_w4a8.targets import W4A16, target_names

if TYPE_CHECKING:
    from convert_w4a8.calibration.prediction import Cost
    from convert_w4a8.conversion.plan import Plan
    from convert_w4a8.samples.masks import MaskOptions


@click.command("quantize", cls=W4A8Command)
@click.argument("model", metavar="MODEL", type=CHECKPOINT)
@click.argument("out", metavar="OUT", type=LocalPath(path_type=Path, directory=True))
@data_options("[default: none: codes and tables from the weights alone]", required=False)
@max_tokens_option
@click.option(
    "--preset",
    type=click.Choice(list(map(str, Preset))),
    default="full",
    show_default=True,
    help="With --data. full: error feedback and coordinate descent, block by block. fast: by the energies of inputs.",
)
@click.option(
    "--format",
    "output_format",
    type=click.Choice(target_names()),
    default="lut",
    show_default=True,
    help="lut: in the kernel's own order, for our vLLM plugin. compressed-tensors: for vLLM without it.",
)
@click.option(
    "--tables",
    type=click.Choice(list(map(str, TableKind))),
    help="free: eight FP8 entries for every group of 128 weights. scale: one FP8 scale."
    " [default: free, with --format compressed-tensors scale]",
)
@click.option(
    "--keep-w4a16",
    type=LocalPath(path_type=Path, directory=True),
    metavar="DIR",
    help="Quantize the model a second time, to W4A16 in DIR: symmetric INT4 with 16-bit activations in the"
    " compressed-tensors format, from the same data.",
)
@click.option(
    "--keep",
    type=LAYERS,
    multiple=True,
    metavar="PATTERN",
    help="Keep these layers in BF16, with all that vLLM serves together with them: a full name, or re: and a"
    " regular expression. Can be given more than once.",
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    help="Where the arithmetic runs. auto: on a GPU of compute capability 8.0 or higher, if there is one.",
)
@click.option(
    "--states-memory",
    type=SIZE,
    default="8GiB",
    show_default=True,
    help="Memory for the hidden states of the calibration data; what is beyond lies on OUT's disk meanwhile.",
)
@click.option(
    "--html",
    type=LocalPath(path_type=Path),
    metavar="FILE",
    help="With --data. Write a page with the counts of tokens and the text of one sample, coloured by what counts.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--max-shard-size", type=SIZE, default="5GB", show_default=True, help="Largest output file.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--resume", is_flag=True, help="Continue a quantization to OUT that was interrupted, if there is one.")
@RAY
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout.")
def quantize_command(
    model: str,
    out: Path,
    data: tuple[Path, ...],
    mask: "MaskOptions | None",
    max_tokens: int | None,
    keep_w4a16: Path | None,
    device: str,
    states_memory: int,
    html: Path | None,
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    ray: str | None,
    quiet: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Quantize a model in BF16, FP16, FP32, or FP8 in blocks, to W4A8 for vLLM on Hopper.

    MODEL is a local directory or a Hub id, org/name[@revision]. OUT must not exist or be empty; it appears whole or not
    at all. With --data, codes and tables are chosen for what the layers see; that needs transformers.
    """
    import torch

    from convert_w4a8.calibration.matrix import BYTES_PER_WEIGHT
    from convert_w4a8.calibration.plan import plan_quantization, with_samples
    from convert_w4a8.calibration.prediction import predict_cost
    from convert_w4a8.calibration.run import quantize, quantize_shard
    from convert_w4a8.calibration.spread import one_by_one
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.cli import render_quantized as render
    from convert_w4a8.cli.files import check_writable, write_files
    from convert_w4a8.conversion.destination import is_finished
    from convert_w4a8.conversion.run import check_paths
    from convert_w4a8.devices import resolve_device
    from convert_w4a8.hub.repository import resolve_input

    if not data and (mask is not None or max_tokens is not None or html is not None):
        raise click.UsageError("--mask, --max-tokens and --html go with --data")
    check_writable(*([html] if html is not None else []))
    torch_device = resolve_device(device if ray is None else "cpu")
    checkpoint = open_checkpoint(path_on(ray, resolve_input(model)))
    cluster = cluster_of_command()
    calls = calls_on(cluster, device) if data else None
    torch_device = torch_device if calls is None else calls.device
    works_here = ray is None or bool(data)
    wanted = [(out, _options(choices))]
    if keep_w4a16 is not None:
        wanted.append((keep_w4a16, replace(wanted[0][1], format=W4A16)))
    for _, options in wanted:
        plan_quantization(checkpoint, options)  # refuses what it must before the data is read
    samples = read_data(checkpoint, data, mask, max_tokens) if data else None
    elsewhere = None if works_here else shards_on(cluster, device, None, lambda _nbytes: None)
    predicted_on = torch_device if elsewhere is None else torch.device(elsewhere.device_type)
    outputs = []
    for path, chosen in wanted:
        plan = plan_quantization(checkpoint, with_samples(chosen, samples))
        carried_out = plan.options
        assert isinstance(carried_out, QuantizeOptions)
        cost = predict_cost(checkpoint, plan, carried_out, samples, predicted_on, states_memory)
        outputs.append(_Output(path, carried_out, plan, cost))
        if not (quiet or as_json):
            echo(render.plan_text(plan, carried_out, samples, cost))
    unfinished: list[_Output] = []
    for output in outputs:
        finished = resume and not dry_run and is_finished(output.path, checkpoint, output.plan)
        if not (finished and render.same_recipe(output.path, output.options, samples)):
            others = {other.path: other.plan.disk_nbytes for other in unfinished}
            check_paths(
                checkpoint,
                output.path,
                output.plan,
                overwrite=overwrite,
                resume=resume,
                before=others,
                works_here=works_here,
            )
            unfinished.append(output)
        elif not (quiet or as_json):
            command = render.verify_command(output.path, model)
            echo(f"finished   {output.path} is this quantization already; see {command}")
    if html is not None and samples is not None:
        write_files({html: page_of(samples, checkpoint)})
    if dry_run:
        if as_json:
            echo_json(_together([render.plan_dict(o.plan, o.options, samples, o.cost) for o in outputs]))
        return
    if unfinished and not (quiet or as_json):
        echo_error("quantize   begins; Ctrl-C keeps what is finished for --resume")
    if unfinished and calls is not None:
        calls.hold(max(output.cost.memory for output in unfinished))
    documents = {output.path: {"output": str(output.path), "finished_before": True} for output in outputs}
    for output in unfinished:
        with progress(output.plan.nbytes_in, "quantize", quiet=quiet or as_json) as update:
            result = quantize(
                checkpoint,
                output.plan,
                output.path,
                samples,
                device=torch_device,
                overwrite=overwrite,
                resume=resume,
                states_bytes=states_memory,
                progress=update,
                write_shards=None
                if works_here
                else shards_on(cluster, device, None, update, quantize_shard, BYTES_PER_WEIGHT),
                spread=calls or one_by_one,
            )
        documents[output.path] = render.result_dict(result, output.path, output.options, samples, output.cost)
        if not (quiet or as_json):
            echo(render.result_text(result, model, output.path))
    if as_json:
        echo_json(_together(list(documents.values())) | ray_dict(cluster))
    elif not quiet:
        for line in ray_lines(cluster):
            echo(line)


@dataclass(frozen=True)
class _Output:
    """A directory that is to be written."""

    path: Path
    options: QuantizeOptions
    plan: "Plan"
    cost: "Cost"


def _together(documents: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what is said of OUT, with what is said of the W4A16 beside it under `w4a16`."""
    first, *others = documents
    return {**first, **({"w4a16": others[0]} if others else {})}


def _options(choices: dict[str, Any]) -> QuantizeOptions:
    from convert_w4a8.targets import target_named

    at_load = target_named(choices["output_format"]).SCALES_AT_LOAD
    return QuantizeOptions(
        format=choices["output_format"],
        tables=choices["tables"] or (TableKind.SCALE if at_load else TableKind.FREE),
        preset=choices["preset"],
        keep=choices["keep"],
        max_shard_size=choices["max_shard_size"],
    )
