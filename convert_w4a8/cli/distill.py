"""`w4a8 distill`: train a W4A8 checkpoint to predict as the model in 16 bits does."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.data import read_data
from convert_w4a8.cli.files import check_writable, write_files
from convert_w4a8.cli.options import NumberRange, data_options
from convert_w4a8.cli.output import echo, echo_error, echo_json
from convert_w4a8.cli.paths import CHECKPOINT, LocalPath
from convert_w4a8.cli.progress import storing_progress, training_progress

if TYPE_CHECKING:
    from convert_w4a8.checkpoint.directory import Checkpoint
    from convert_w4a8.distillation.mix import TrainingData
    from convert_w4a8.samples.masks import MaskOptions


@click.command("distill", cls=W4A8Command)
@click.argument("start", metavar="OUT_W4A8", type=CHECKPOINT)
@click.option(
    "--out",
    required=True,
    metavar="OUT2",
    type=LocalPath(path_type=Path, directory=True),
    help="Where the trained checkpoint goes. It must not exist or be empty; it appears whole or not at all.",
)
@click.option(
    "--teacher", required=True, metavar="MODEL", type=CHECKPOINT, help="The model in 16 bits: a directory or a Hub id."
)
@data_options(
    data="Text to train on, as for w4a8 quantize. Can be given more than once; each file is a domain.",
    masked="Tokens whose prediction does not count",
)
@click.option(
    "--held-out",
    type=LocalPath(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Text to measure on, and to choose the best step by. [default: some of each file of --data]",
)
@click.option(
    "--preset",
    type=click.Choice(["tables", "weights"]),
    default="tables",
    show_default=True,
    help="tables: FP8 tables, channel scales, norms and biases. weights: also the weights, with codes chosen anew.",
)
@click.option(
    "--mix",
    default="drop",
    show_default=True,
    metavar="drop|uniform|FILE",
    help="How much of each domain is trained on. drop: as much as quantization hurt it, measured before the training."
    " uniform: as much of each. FILE: JSON with the drop of each domain.",
)
@click.option("--max-length", type=click.IntRange(min=2), metavar="N", help="Cut samples to so many tokens.")
@click.option("--steps", type=click.IntRange(min=1), default=1000, show_default=True, help="Steps of training.")
@click.option(
    "--batch-tokens", type=click.IntRange(min=1), default=16384, show_default=True, help="Tokens of each step."
)
@click.option(
    "--rate", type=NumberRange(min=0, min_open=True), default=1.0, show_default=True, help="Factor of all rates."
)
@click.option(
    "--damping",
    type=NumberRange(min=0),
    help="How stiff the springs are that draw values to what they are rounded to. [default: by --steps]",
)
@click.option("--every", type=click.IntRange(min=1), default=50, show_default=True, help="Steps between measurements.")
@click.option(
    "--patience",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Stop after so many measurements without a better one. 0: never.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Of the order of the samples, and of what springs of tables draw.",
)
@click.option("--recompute", is_flag=True, help="Compute blocks twice instead of keeping what they computed.")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="auto|cpu|cuda[:N]",
    help="Where the model is trained. auto: on a GPU of compute capability 8.0 or higher, if there is one.",
)
@click.option(
    "--teacher-device", metavar="cpu|cuda[:N]", help="Where the teacher runs. [default: where the model is trained]"
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Spread the models over the first N GPUs of this machine, which share every batch.",
)
@click.option("--replicate", is_flag=True, help="With --gpus: each GPU has the whole of both models.")
@click.option(
    "--teacher-logits",
    type=LocalPath(path_type=Path, directory=True),
    metavar="DIR",
    help="Read the teacher's logits from DIR; write them there first, if they are not there yet.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    metavar="K",
    help="Of each token, the highest logits that --teacher-logits holds; 0: all. [default: 64]",
)
@click.option(
    "--hidden-weight",
    type=NumberRange(min=0),
    default=0.0,
    show_default=True,
    help="Weight in the loss of how far the blocks' outputs are from the teacher's.",
)
@click.option("--embeddings", is_flag=True, help="Train embeddings and lm_head too.")
@click.option("--png", type=LocalPath(path_type=Path), metavar="FILE", help="Draw the curve of the training.")
@click.option("--overwrite", is_flag=True, help="Replace OUT2 if it exists.")
@click.option("--resume", is_flag=True, help="Continue a training to OUT2 that was interrupted, if there is one.")
@click.option("--dry-run", is_flag=True, help="Print what would be trained and what it takes, and stop.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout.")
def distill_command(
    start: str,
    out: Path,
    teacher: str,
    data: tuple[Path, ...],
    held_out: tuple[Path, ...],
    mix: str,
    mask: "MaskOptions | None",
    max_length: int | None,
    device: str,
    teacher_device: str | None,
    gpus: int,
    replicate: bool,
    teacher_logits: Path | None,
    top_k: int | None,
    png: Path | None,
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    quiet: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Train a W4A8 checkpoint to predict as the model in 16 bits does.

    OUT_W4A8 is what `w4a8 quantize` wrote (format lut, free tables). The training minimizes the divergence of its
    predictions, computed as the kernel computes them, from the teacher's. Nothing is written unless that of text that
    is not trained on falls. Needs transformers.
    """
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.cli import render_distilled as render
    from convert_w4a8.devices import resolve_device
    from convert_w4a8.distillation.agreement import check_text
    from convert_w4a8.distillation.first_pass import check_stored
    from convert_w4a8.distillation.options import TOP_K, DistillOptions, check_choices
    from convert_w4a8.distillation.paths import check_paths
    from convert_w4a8.distillation.prediction import predict
    from convert_w4a8.distillation.run import distill
    from convert_w4a8.distillation.sharded import check_gpus
    from convert_w4a8.distillation.student import check_models
    from convert_w4a8.hub.repository import resolve_input
    from convert_w4a8.report import training
    from convert_w4a8.report.drawing import require_matplotlib

    try:
        check_choices(
            gpus=gpus, replicate=replicate, teacher_device=teacher_device, teacher_logits=teacher_logits, top_k=top_k
        )
        options = DistillOptions(**choices)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if png is not None:
        require_matplotlib()
        check_writable(png)
    trained, source = open_checkpoint(resolve_input(start)), open_checkpoint(resolve_input(teacher))
    on = resolve_device(device)
    teacher_on = None if teacher_device is None else resolve_device(teacher_device, "--teacher-device")
    check_paths(trained, source, out, overwrite=overwrite, resume=resume, teacher_logits=teacher_logits)
    logits = TOP_K if top_k is None else top_k
    if teacher_logits is not None:
        check_stored(teacher_logits, logits, options)
    check_models(trained, source, blocks=options.hidden_weight > 0)
    check_gpus(trained, gpus, on, embeddings=options.embeddings, replicate=replicate)
    found = _read(source, data, held_out, mix, mask, max_length)
    check_text(trained, source, (*found.samples, *found.held_out))
    stored = None if teacher_logits is None else logits
    together = teacher_on is None or (on.type, on.index or 0) == (teacher_on.type, teacher_on.index or 0)
    cost = predict(trained, source, found, options, together=together, top_k=stored, gpus=gpus, replicate=replicate)
    if not (quiet or as_json):
        echo(render.plan_text(options, found, cost, gpus, replicate=replicate))
    if dry_run:
        if as_json:
            echo_json(render.plan_dict(options, found, cost, gpus, replicate=replicate))
        return
    if not (quiet or as_json):
        echo_error("distill    begins; Ctrl-C keeps the last measurement for --resume")
    with training_progress(options.steps, quiet=quiet or as_json) as update:
        result = distill(
            trained,
            source,
            found,
            out,
            options,
            device=on,
            teacher_device=teacher_on,
            gpus=gpus,
            replicate=replicate,
            teacher_logits=teacher_logits,
            top_k=top_k,
            overwrite=overwrite,
            resume=resume,
            progress=update,
            storing=storing_progress(quiet=quiet or as_json),
        )
    if png is not None:
        write_files({png: training.draw(result)})
    if as_json:
        echo_json({"output": str(out), **result.as_dict()})
    elif not quiet:
        echo(render.result_text(result, start, out))


def _read(
    source: "Checkpoint",
    data: tuple[Path, ...],
    held_out: tuple[Path, ...],
    mix: str,
    mask: "MaskOptions | None",
    max_length: int | None,
) -> "TrainingData":
    """Read samples and drops."""
    from convert_w4a8.distillation.mix import check_domains, training_data

    check_domains(data)
    samples = read_data(source, data, mask, max_length=max_length).samples
    measured = read_data(source, held_out, mask, max_length=max_length).samples if held_out else None
    return training_data(samples, measured, mix)
