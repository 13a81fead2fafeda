"""The Python interface: what the commands do, for scripts and notebooks.

Paths are strings or `Path`s; a source may also be a Hub id, `org/name[@revision]`. What a caller can mend raises
`W4A8Error`: a `ConvertError` for one problem, a `PlanError` for all that cannot be converted.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path

from convert_w4a8.calibration import run as calibration
from convert_w4a8.calibration.matrix import BYTES_PER_WEIGHT
from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.calibration.plan import plan_quantization, with_samples
from convert_w4a8.calibration.prediction import predict_cost
from convert_w4a8.calibration.spread import one_by_one
from convert_w4a8.checkpoint import directory
from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.cluster.access import calls_on, cluster_at, path_on, shards_on, units_on
from convert_w4a8.conversion import plan as planning
from convert_w4a8.conversion.jobs import use_workers
from convert_w4a8.conversion.plan import Plan
from convert_w4a8.conversion.result import Result
from convert_w4a8.conversion.run import carry_out
from convert_w4a8.devices import resolve_device
from convert_w4a8.distillation import run as distillation
from convert_w4a8.distillation.mix import DROP, training_data
from convert_w4a8.distillation.options import DistillOptions
from convert_w4a8.distillation.result import DistillResult
from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation import evaluate as evaluation
from convert_w4a8.evaluation.options import EvaluateOptions
from convert_w4a8.evaluation.results import Evaluation
from convert_w4a8.evaluation.servers import is_url
from convert_w4a8.hub.repository import resolve_input
from convert_w4a8.options import Options
from convert_w4a8.regression import check as regression
from convert_w4a8.regression.baseline import Figures, read_baseline
from convert_w4a8.report import collect, inspection
from convert_w4a8.samples.sample import SampleSet
from convert_w4a8.verification import either, proof

__all__ = [
    "check",
    "convert",
    "distill",
    "evaluate",
    "inspect",
    "make_plan",
    "make_report",
    "open_checkpoint",
    "quantize",
    "verify",
]

PathOrId = str | PathLike[str]
_DEFAULTS = Options()
_DEFAULTS_OF_QUANTIZE = QuantizeOptions()
_DEFAULTS_OF_DISTILL = DistillOptions()
_DEFAULTS_OF_EVALUATE = EvaluateOptions()


def _ignore(_nbytes: int) -> None:
    """Take no notice of progress."""


def _ignore_step(_step: int, _divergence: float) -> None:
    """Take no notice of a step."""


def local_path(path: PathOrId) -> Path:
    """Return a path with `~` expanded.

    Raises:
        ConvertError: it begins with `~user`, and there is no such user.

    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConvertError(
            os.fspath(path), "begins with the home directory of a user that there is not", "write ./~ if that is meant"
        ) from error


def open_checkpoint(source: PathOrId) -> Checkpoint:
    """Open a checkpoint, reading its JSON files and safetensors headers only.

    Raises:
        ConvertError: it is absent, damaged or inconsistent.

    """
    return directory.open_checkpoint(_directory(source))


def _directory(source: PathOrId, ray: str | None = None) -> Path:
    """Return the directory that a path or an id stands for; absolute where other processes are to open it."""
    name = os.fspath(source)
    return path_on(ray, resolve_input(str(local_path(name)) if name.startswith("~") else name))


def make_plan(source: PathOrId, options: Options = _DEFAULTS) -> Plan:
    """Return what a conversion would do, from headers and configuration alone.

    Raises:
        ConvertError: the checkpoint is of no known format.
        PlanError: something cannot be converted; every such thing is listed.

    """
    return planning.make_plan(open_checkpoint(source), options)


def convert(
    source: PathOrId,
    out: PathOrId,
    options: Options = _DEFAULTS,
    *,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    progress: Callable[[int], None] = _ignore,
) -> Result:
    """Convert a checkpoint; `out` appears whole, at the end, or not at all.

    device: "auto", "cpu" or "cuda[:N]". overwrite: replace `out`. resume: continue a conversion that was interrupted.
    workers: how many layers are converted at a time; None: one a core, up to 4.
    ray: "local", "auto" or host:port: let the tasks of a Ray cluster write the files, as `--ray` does.
    progress: called with the number of source bytes that are done with since the last call, from any thread.

    Raises:
        ConvertError, PlanError: the input, the output path, the options or the device do not allow it.

    """
    checkpoint = directory.open_checkpoint(_directory(source, ray))
    plan = planning.make_plan(checkpoint, options)
    with use_workers(workers), cluster_at(ray) as cluster:
        return carry_out(
            checkpoint,
            plan,
            local_path(out),
            device=resolve_device(device if cluster is None else "cpu"),
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            write=shards_on(cluster, device, workers, progress),
        )


def quantize(
    model: PathOrId,
    out: PathOrId,
    options: QuantizeOptions = _DEFAULTS_OF_QUANTIZE,
    *,
    samples: SampleSet | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = False,
    ray: str | None = None,
    progress: Callable[[int], None] = _ignore,
) -> Result:
    """Quantize a model that is in 16 or 32 bits; `out` appears whole, at the end, or not at all.

    samples: calibration data, from `convert_w4a8.samples`; None: codes and tables from the weights alone. The other
    parameters are those of `convert`; with samples, tasks of Ray quantize matrices, and this process does the rest.

    Raises:
        ConvertError, PlanError: the model, the output path, the options or the device do not allow it.

    """
    checkpoint = directory.open_checkpoint(_directory(model, ray))
    plan = plan_quantization(checkpoint, with_samples(options, samples))
    with cluster_at(ray) as cluster:
        calls = None if samples is None else calls_on(cluster, device)
        here = resolve_device(device if cluster is None else "cpu") if calls is None else calls.device
        if calls is not None:
            assert isinstance(plan.options, QuantizeOptions)
            calls.hold(predict_cost(checkpoint, plan, plan.options, samples, here, calibration.STATES_BYTES).memory)
        return calibration.quantize(
            checkpoint,
            plan,
            local_path(out),
            samples,
            device=here,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
            write_shards=shards_on(
                None if calls else cluster, device, None, progress, calibration.quantize_shard, BYTES_PER_WEIGHT
            ),
            spread=calls or one_by_one,
        )


def distill(
    start: PathOrId,
    teacher: PathOrId,
    out: PathOrId,
    samples: SampleSet,
    options: DistillOptions = _DEFAULTS_OF_DISTILL,
    *,
    held_out: SampleSet | None = None,
    mix: str | PathLike[str] | Mapping[str, float] = DROP,
    device: str = "auto",
    teacher_device: str | None = None,
    gpus: int = 1,
    replicate: bool = False,
    teacher_logits: PathOrId | None = None,
    top_k: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[int, float], None] = _ignore_step,
) -> DistillResult:
    """Train a W4A8 checkpoint to predict as the model in 16 bits does; `out` appears whole, at the end, or not at all.

    samples, held_out: from `convert_w4a8.samples`; a domain is what a file's name is without endings. held_out: to
    measure on; None: some of each domain. mix: "drop", "uniform", the drop of each domain, or a JSON file
    that has them. gpus, replicate: over how many both models are spread, or on how many each has the whole of them, as
    with `--gpus` and `--replicate`. teacher_logits: directory of the teacher's logits, which are written there if they
    are not there yet, the `top_k` highest of each token, or all with 0; None: 64. progress: called with each step and
    its divergence in nats per token. The other parameters are those of `convert`.

    Raises:
        ConvertError: the models, the output path, the data or the device do not allow it, or training did not help.
        ValueError: arguments that do not go together.

    """
    return distillation.distill(
        open_checkpoint(start),
        open_checkpoint(teacher),
        training_data(samples.samples, None if held_out is None else held_out.samples, mix),
        local_path(out),
        options,
        device=resolve_device(device),
        teacher_device=None if teacher_device is None else resolve_device(teacher_device, "--teacher-device"),
        gpus=gpus,
        replicate=replicate,
        teacher_logits=None if teacher_logits is None else local_path(teacher_logits),
        top_k=top_k,
        overwrite=overwrite,
        resume=resume,
        progress=progress,
    )


def verify(
    out: PathOrId,
    source: PathOrId,
    *,
    min_sqnr_db: float | None = None,
    ray: str | None = None,
    progress: Callable[[int], None] = _ignore,
) -> proof.Verification:
    """Compare a converted checkpoint with its source; without `problems` in the result the conversion is right.

    What `w4a8 distill` wrote is compared with the W4A8 checkpoint that it trained, given as `source`.
    min_sqnr_db: least SQNR of a layer in dB, instead of the bounds that `w4a8 verify` uses. ray: as in `convert`.
    Raises ConvertError if one of the two cannot be read, and ValueError for either choice where `out` was distilled.
    """
    converted, original = (directory.open_checkpoint(_directory(path, ray)) for path in (out, source))
    either.check_choices(converted, min_sqnr_db=min_sqnr_db, ray=ray)
    with cluster_at(ray) as cluster:
        return either.verify(converted, original, min_sqnr_db=min_sqnr_db, progress=progress, check=units_on(cluster))


def inspect(source: PathOrId) -> inspection.Inspection:
    """Describe a checkpoint, source or converted, at a glance.

    Raises ConvertError or PlanError if it cannot be read.
    """
    return inspection.inspect(open_checkpoint(source))


def make_report(out: PathOrId, source: PathOrId, *, progress: Callable[[int], None] = _ignore) -> collect.Report:
    """Measure a conversion: error by layer, distributions of scales, memory.

    Raises ConvertError or PlanError if one of the two cannot be read, or `out` was not converted from `source`.
    """
    return collect.collect(open_checkpoint(out), open_checkpoint(source), progress=progress)


def check(
    source: PathOrId,
    options: Options = _DEFAULTS,
    *,
    out: PathOrId | None = None,
    sample: bool = False,
    baseline: Figures | PathOrId | None = None,
    tolerance_db: float = 0.1,
    device: str = "auto",
    workers: int | None = None,
    ray: str | None = None,
) -> regression.Check:
    """Convert, verify and compare with a baseline, as `w4a8 check` does; without `problems` all is as it was.

    out: a conversion that exists, to be checked instead of making one. baseline: figures, or the file that
    `w4a8 check --write-baseline` wrote. sample: convert one layer of each kind only. workers, ray: as in `convert`.
    Raises ConvertError if `source` or `out` cannot be read, and ValueError for `out` and `sample` together.
    """
    regression.check_choices(out=out, sample=sample)
    checkpoint = directory.open_checkpoint(_directory(source, ray))
    with use_workers(workers), cluster_at(ray) as cluster:
        return regression.check(
            checkpoint,
            options,
            out=None if out is None else path_on(ray, local_path(out)),
            sample=sample,
            baseline=read_baseline(local_path(baseline)) if isinstance(baseline, str | PathLike) else baseline,
            tolerance_db=tolerance_db,
            device=resolve_device(device if cluster is None else "cpu"),
            write=shards_on(cluster, device, workers, _ignore),
            prove=units_on(cluster),
        )


def evaluate(
    baseline: PathOrId | None,
    candidate: PathOrId | None,
    prompts: PathOrId | None = None,
    options: EvaluateOptions = _DEFAULTS_OF_EVALUATE,
    *,
    logs: Sequence[PathOrId] = (),
    out: PathOrId | None = None,
    resume: bool = False,
    ratings: PathOrId | None = None,
    progress: Callable[[int], None] = _ignore,
) -> Evaluation:
    """Ask two servers the same prompts and compare, as `w4a8 evaluate` does; `verdict.decision` says what may be done.

    baseline, candidate: a URL, or a directory that is served for the time being; None for both where `logs` hold the
    answers. prompts, logs: files; one of the two. out: a directory where answers are kept, and `resume` goes on.
    ratings: of the answers in `out`. progress: called with the number of answers that came since the last call.

    Raises:
        ConvertError: a file, a directory or a server is not as it should be.
        ValueError: arguments that do not go together.

    """
    prepared = evaluation.prepare(
        None if baseline is None else _place(baseline),
        None if candidate is None else _place(candidate),
        None if prompts is None else local_path(prompts),
        [local_path(path) for path in logs],
        options,
    )
    return evaluation.evaluate(
        prepared,
        None if out is None else local_path(out),
        resume=resume,
        ratings=None if ratings is None else local_path(ratings),
        progress=progress,
    )


def _place(place: PathOrId) -> str:
    """Return a URL as it is, or a directory."""
    name = os.fspath(place)
    return name if is_url(name) else str(local_path(name))
