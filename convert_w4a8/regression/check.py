"""Does a checkpoint convert, and as well as it did? A conversion for CI, verified and compared with a baseline.

`--sample` converts one layer of each kind and reads the tensors of these layers only.
"""

import math
import tempfile
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint
from convert_w4a8.checkpoint.names import is_expert, linear_modules, output_name
from convert_w4a8.checkpoint.shards import plan_shards
from convert_w4a8.conversion.plan import LayerPlan, Plan, make_plan
from convert_w4a8.conversion.run import WriteShards, carry_out
from convert_w4a8.errors import ClusterError, ConvertError, PlanError, Problem, W4A8Error
from convert_w4a8.options import Options
from convert_w4a8.regression.baseline import UNKNOWN, Figures, LayerFigures, compare
from convert_w4a8.sources import find_source
from convert_w4a8.targets import find_target
from convert_w4a8.verification.proof import CheckUnits, Verification, verify

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Check:
    """The outcome. figures: None where the conversion was refused. notes: what is better than the baseline.

    problems: what makes the check fail. verified: the conversion itself is right, whatever the baseline says.
    """

    name: str
    figures: Figures | None
    baseline: Figures | None
    verified: bool
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]


def check_choices(*, out: object, sample: bool) -> None:
    """Raise ValueError where choices do not go together. out: None where nothing was said."""
    if sample and out is not None:
        raise ValueError("--sample converts layers of its own, so it does not go with --out")


def check(
    source: Checkpoint,
    options: Options,
    *,
    out: Path | None = None,
    sample: bool = False,
    baseline: Figures | None = None,
    min_sqnr_db: float | None = None,
    tolerance_db: float = 0.1,
    name: str | None = None,
    fetch: Callable[[Iterable[str]], None] = lambda _names: None,
    device: torch.device,
    progress: Progress = lambda _nbytes: None,
    write: WriteShards | None = None,
    prove: CheckUnits | None = None,
) -> Check:
    """Convert a checkpoint in the directory for temporary files, or take `out` for the result; verify and compare.

    name: by which the summary calls it. fetch: called with the names of the tensors of a sample before they are read.
    progress: called with the number of source bytes converted or verified since the last call.
    write, prove: what converts and what verifies, as for `carry_out` and `verify`; this process if None.

    Raises:
        ConvertError: `out` cannot be read, or is not a converted checkpoint.
        ClusterError: nodes fail, or do not see what is written.

    """
    name = name or source.root.resolve().name
    if out is not None:
        figures, found = _verified(open_checkpoint(out), source, min_sqnr_db, progress, prove)
    else:
        try:
            plan = make_plan(source, options, contents=False)  # whose warnings are not shown; a sample is not here yet
            if sample:
                source, plan = sample_layers(source, plan)
                fetch(source.tensors)
            figures, found = _convert(source, plan, min_sqnr_db, device, progress, write, prove)
            figures = replace(figures, scales=str(options.scales), sample=sample)
        except ClusterError as error:  # which says nothing of the checkpoint
            error.add_note(f"a check writes into {tempfile.gettempdir()}: set TMPDIR to a directory that all nodes see")
            raise
        except W4A8Error as error:
            return Check(name, None, baseline, False, _problems(error), ())
    problems, notes = compare(figures, baseline, tolerance_db) if baseline is not None else ((), ())
    return Check(name, figures, baseline, not found.problems, (*found.problems, *problems), notes)


def _problems(error: W4A8Error) -> tuple[Problem, ...]:
    match error:
        case PlanError():
            return error.problems
        case ConvertError():
            return (error.problem,)
    raise error


def _convert(
    source: Checkpoint,
    plan: Plan,
    min_sqnr_db: float | None,
    device: torch.device,
    progress: Progress,
    write: WriteShards | None,
    prove: CheckUnits | None,
) -> tuple[Figures, Verification]:
    with tempfile.TemporaryDirectory(prefix="w4a8-check-") as directory:
        out = Path(directory) / "out"
        carry_out(source, plan, out, device=device, progress=progress, write=write)
        modules = {layer.module for layer in plan.layers}
        return _verified(open_checkpoint(out), source, min_sqnr_db, progress, prove, modules)


def _verified(
    out: Checkpoint,
    source: Checkpoint,
    min_sqnr_db: float | None,
    progress: Progress,
    prove: CheckUnits | None,
    modules: Collection[str] | None = None,
) -> tuple[Figures, Verification]:
    """Verify a conversion. modules: the layers of which it is a sample; all if None."""
    found = verify(out, source, only=modules, min_sqnr_db=min_sqnr_db, progress=progress, check=prove)
    layers = {
        check.module: LayerFigures(check.out_features, check.in_features, check.codes_kept, _rounded(check.sqnr_db))
        for check in found.layers
    }
    reader = find_source(source)
    if modules is None:
        modules = {output_name(spec.name, source.config) for spec in reader.find_layers(source, [])}
    conversion = out.quantization_config.get("conversion")
    figures = Figures(
        source=reader.NAME,
        format=find_target(out).NAME,
        scales=str(conversion.get("scales")) if isinstance(conversion, Mapping) else UNKNOWN,
        sample=False,
        bytes_in=source.nbytes,
        bytes_out=out.nbytes,
        layers=layers,
        dequantized=tuple(sorted(set(modules) - layers.keys())),
    )
    return figures, found


def _rounded(sqnr_db: float) -> float | None:
    """Round to what keeps baselines readable. JSON has no infinity: None is for no loss, −1000 for NaN weights."""
    return None if sqnr_db == math.inf else round(max(sqnr_db, -1000.0), 3)


def sample_layers(source: Checkpoint, plan: Plan) -> tuple[Checkpoint, Plan]:
    """Reduce a checkpoint and its plan to one layer of each kind, the one in the middle, and to its tensors.

    A kind is a projection with its shape and with everything that decides how it is read and converted.
    """
    kinds: dict[Hashable, list[LayerPlan]] = {}
    for layer in plan.layers:
        spec = layer.spec
        kind = (
            spec.name.rpartition(".")[2],
            is_expert(spec.name),
            (spec.out_features, spec.in_features, spec.group_size),
            (spec.symmetric, spec.act_order, spec.zero_offset, tuple(sorted(spec.parts))),
            layer.dequantize is None,
        )
        kinds.setdefault(kind, []).append(layer)
    layers = tuple(alike[len(alike) // 2] for alike in kinds.values())
    tensors = {part.name: source.tensors[part.name] for layer in layers for part in layer.spec.parts.values()}
    outputs = [spec for layer in layers for spec in layer.specs]
    nbytes_out = sum(spec.nbytes for spec in outputs)
    return replace(source, tensors=tensors, side_files=()), replace(
        plan,
        layers=layers,
        tensors=(),
        carried=(),
        ignore=tuple(sorted(linear_modules(outputs))),
        shards=plan_shards(outputs, plan.options.max_shard_size),
        nbytes_in=sum(info.nbytes for info in tensors.values()),
        nbytes_out=nbytes_out,
        disk_nbytes=nbytes_out,
    )
