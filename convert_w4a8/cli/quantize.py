"""`w4a8 quantize`: from a model in 16 bits to W4A8."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convert_w4a8.calibration.options import Preset, QuantizeOptions, TableKind
from convert_w4a8.cli.base import W4A8Command
from convert_w4a8.cli.options import LAYERS, SIZE
from convert_w4a8.cli.output import echo, echo_error, echo_json
from convert_w4a8.cli.paths import CHECKPOINT, LocalPath
from convert_w4a8.cli.progress import progress
from convert_w4a8.targets import target_names

if TYPE_CHECKING:
    from convert_w4a8.checkpoint.directory import Checkpoint
    from convert_w4a8.samples.masks import MaskOptions
    from convert_w4a8.samples.sample import SampleSet


class Mask(click.ParamType):  # type: ignore[type-arg]  # a generic from Click 8.4 on only
    """What `parse_mask` reads."""

    name = "mask"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the mask; a usage error if the value is none."""
        from convert_w4a8.samples.masks import parse_mask

        try:
            return parse_mask(value) if isinstance(value, str) else value
        except ValueError as error:
            self.fail(str(error), param, ctx)


@click.command("quantize", cls=W4A8Command)
@click.argument("model", metavar="MODEL", type=CHECKPOINT)
@click.argument("out", metavar="OUT", type=LocalPath(path_type=Path, directory=True))
@click.option(
    "--data",
    type=LocalPath(path_type=Path),
    multiple=True,
    metavar="FILE",
    help="Calibration data: JSON lines of messages (and tools), text or input_ids. Can be given more than once."
    " [default: none: codes and tables from the weights alone]",
)
@click.option(
    "--mask",
    type=Mask(),
    metavar="MASK",
    help="Tokens that count in no statistic: template, system, tools, repeated, with commas between. [default: none]",
)
@click.option("--max-tokens", type=click.IntRange(min=1), metavar="N", help="Use so many tokens of the data at most.")
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
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--max-shard-size", type=SIZE, default="5GB", show_default=True, help="Largest output file.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--resume", is_flag=True, help="Continue a quantization to OUT that was interrupted, if there is one.")
@click.option("--quiet", is_flag=True, help="Print errors only.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON document on stdout.")
def quantize_command(
    model: str,
    out: Path,
    data: tuple[Path, ...],
    mask: "MaskOptions | None",
    max_tokens: int | None,
    device: str,
    states_memory: int,
    dry_run: bool,
    overwrite: bool,
    resume: bool,
    quiet: bool,
    as_json: bool,
    **choices: Any,
) -> None:
    """Quantize a model in BF16, FP16 or FP32 to W4A8 for vLLM on Hopper.

    MODEL is a local directory or a Hub id, org/name[@revision]. OUT must not exist or be empty; it appears whole or not
    at all. With --data, codes and tables are chosen for what the layers see; that needs transformers.
    """
    from convert_w4a8.calibration.plan import plan_quantization, with_samples
    from convert_w4a8.calibration.prediction import predict_cost
    from convert_w4a8.calibration.run import quantize
    from convert_w4a8.checkpoint.directory import open_checkpoint
    from convert_w4a8.cli import render_quantized as render
    from convert_w4a8.conversion.destination import is_finished
    from convert_w4a8.conversion.run import check_paths
    from convert_w4a8.devices import resolve_device
    from convert_w4a8.hub.repository import resolve_input

    if not data and (mask is not None or max_tokens is not None):
        raise click.UsageError("--mask and --max-tokens go with --data")
    torch_device = resolve_device(device)
    checkpoint = open_checkpoint(resolve_input(model))
    options = _options(choices)
    plan_quantization(checkpoint, options)  # refuses what it must before the data is read
    samples = read_data(checkpoint, data, mask, max_tokens) if data else None
    options = with_samples(options, samples)
    plan = plan_quantization(checkpoint, options)
    cost = predict_cost(checkpoint, plan, options, samples, torch_device, states_memory)
    if not (quiet or as_json):
        echo(render.plan_text(plan, options, samples, cost))
    if resume and not dry_run and is_finished(out, checkpoint, plan) and render.same_recipe(out, options, samples):
        if as_json:
            echo_json({"output": str(out), "finished_before": True})
        elif not quiet:
            echo(f"finished   {out} is this quantization already; see {render.verify_command(out, model)}")
        return
    check_paths(checkpoint, out, plan, overwrite=overwrite, resume=resume)
    if dry_run:
        if as_json:
            echo_json(render.plan_dict(plan, options, samples, cost))
        return
    if not (quiet or as_json):
        echo_error("quantize   begins; Ctrl-C keeps what is finished for --resume")
    with progress(plan.nbytes_in, "quantize", quiet=quiet or as_json) as update:
        result = quantize(
            checkpoint,
            plan,
            out,
            samples,
            device=torch_device,
            overwrite=overwrite,
            resume=resume,
            states_bytes=states_memory,
            progress=update,
        )
    if as_json:
        echo_json(render.result_dict(result, out, options, samples, cost))
    elif not quiet:
        echo(render.result_text(result, model, out))


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


class _Tokenizer:
    """The tokenizer of a checkpoint, opened when something asks for it: data of input_ids need none."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @cached_property
    def _opened(self) -> Any:
        from convert_w4a8.samples.tokenizer import open_tokenizer

        return open_tokenizer(self._root)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __call__(self, *args: Any, **more: Any) -> Any:
        return self._opened(*args, **more)

    def __len__(self) -> int:
        return len(self._opened)


def read_data(
    checkpoint: "Checkpoint",
    data: tuple[Path, ...],
    mask: "MaskOptions | None",
    max_tokens: int | None = None,
    max_length: int | None = None,
) -> "SampleSet":
    """Read data with the tokenizer of a checkpoint. max_tokens, max_length: as for `read_samples`."""
    from convert_w4a8.samples.masks import NO_MASK
    from convert_w4a8.samples.read import read_samples

    return read_samples(
        data,
        _Tokenizer(checkpoint.root),
        mask or NO_MASK,
        max_tokens=max_tokens,
        max_length=max_length,
        vocab_size=_vocabulary(checkpoint),
    )


def _vocabulary(checkpoint: "Checkpoint") -> int | None:
    """Return how many tokens the model has embeddings of, if its configuration says so."""
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        size = config.get("vocab_size")
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            return size
    return None
