"""Does a checkpoint convert, and as well as it did? A conversion for CI, verified and compared with a baseline.

`--sample` converts one layer of each kind and reads the tensors of these layers only.
"""

import math
import tempfile
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint, open_checkpoint, read_json
from convert_w4a8.checkpoint.names import is_expert, linear_modules, output_name
from convert_w4a8.checkpoint.shards import plan_shards
from convert_w4a8.conversion.plan import LayerPlan, Plan, make_plan
from convert_w4a8.conversion.run import convert
from convert_w4a8.errors import ConvertError, PlanError, Refusal, W4A8Error
from convert_w4a8.options import Options
from convert_w4a8.sources import find_source
from convert_w4a8.targets import find_target
from convert_w4a8.verification.proof import Verification, verify

VERSION = 1
UNKNOWN = "unknown"
"""The scales of an output that does not record how they were chosen."""

Progress = Callable[[int], None]


@dataclass(frozen=True)
class LayerFigures:
    """What is compared of one converted layer. exact: its codes are kept. sqnr_db: None where nothing was lost."""

    out_features: int
    in_features: int
    exact: bool
    sqnr_db: float | None


@dataclass(frozen=True)
class Figures:
    """A conversion as it is compared and kept as a baseline. Sizes in bytes of tensors.

    sample: only one layer of each kind was converted.
    """

    source: str
    format: str
    scales: str
    sample: bool
    bytes_in: int
    bytes_out: int
    layers: Mapping[str, LayerFigures]
    dequantized: tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """The outcome. figures: None where the conversion was refused. notes: what is better than the baseline.

    problems: what makes the check fail. verified: the conversion itself is right, whatever the baseline says.
    """

    name: str
    figures: Figures | None
    baseline: Figures | None
    verified: bool
    problems: tuple[Refusal, ...]
    notes: tuple[str, ...]


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
) -> Check:
    """Convert a checkpoint in the directory for temporary files, or take `out` for the result; verify and compare.

    name: by which the summary calls it. fetch: called with the names of the tensors of a sample before they are read.
    progress: called with the number of source bytes converted or verified since the last call.

    Raises:
        ConvertError: `out` cannot be read, or is not a converted checkpoint.

    """
    name = name or source.root.resolve().name
    if out is not None:
        figures, found = _verified(open_checkpoint(out), source, min_sqnr_db, progress)
    else:
        try:
            plan = make_plan(source, options)
            if sample:
                source, plan = sample_layers(source, plan)
                fetch(source.tensors)
            figures, found = _convert(source, plan, min_sqnr_db, device, progress)
            figures = replace(figures, scales=str(options.scales), sample=sample)
        except W4A8Error as error:
            return Check(name, None, baseline, False, _refusals(error), ())
    problems, notes = compare(figures, baseline, tolerance_db) if baseline is not None else ((), ())
    return Check(name, figures, baseline, not found.problems, (*found.problems, *problems), notes)


def _refusals(error: W4A8Error) -> tuple[Refusal, ...]:
    match error:
        case PlanError():
            return error.refusals
        case ConvertError():
            return (error.refusal,)
    raise error


def _convert(
    source: Checkpoint,
    plan: Plan,
    min_sqnr_db: float | None,
    device: torch.device,
    progress: Progress,
) -> tuple[Figures, Verification]:
    with tempfile.TemporaryDirectory(prefix="w4a8-check-") as directory:
        out = Path(directory) / "out"
        convert(source, plan, out, device=device, progress=progress)
        return _verified(open_checkpoint(out), source, min_sqnr_db, progress)


def _verified(
    out: Checkpoint, source: Checkpoint, min_sqnr_db: float | None, progress: Progress
) -> tuple[Figures, Verification]:
    found = verify(out, source, min_sqnr_db=min_sqnr_db, progress=progress)
    layers = {
        check.module: LayerFigures(check.out_features, check.in_features, check.exact, _rounded(check.sqnr_db))
        for check in found.layers
    }
    reader = find_source(source)
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
        dequantized=tuple(sorted(modules - layers.keys())),
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
    tensors = {name: source.tensors[name] for layer in layers for name in layer.spec.parts.values()}
    outputs = [spec for layer in layers for spec in layer.outputs]
    nbytes_out = sum(spec.nbytes for spec in outputs)
    return replace(source, tensors=tensors, side_files=()), replace(
        plan,
        layers=layers,
        tensors=(),
        ignore=tuple(sorted(linear_modules(outputs))),
        shards=plan_shards(outputs, plan.options.max_shard_size),
        nbytes_in=sum(info.nbytes for info in tensors.values()),
        nbytes_out=nbytes_out,
        disk_nbytes=nbytes_out,
    )


def compare(now: Figures, baseline: Figures, tolerance_db: float) -> tuple[tuple[Refusal, ...], tuple[str, ...]]:
    """Return what is worse than in a baseline or not comparable with it, and what is better."""
    problems = []
    for key in ("source", "format", "scales", "sample", "bytes_in", "bytes_out"):
        ours, theirs = getattr(now, key), getattr(baseline, key)
        if ours != theirs and UNKNOWN not in (ours, theirs):
            problems.append(_regression(key, f"is {ours}, in the baseline {theirs}"))
    absent, added = baseline.layers.keys() - now.layers.keys(), now.layers.keys() - baseline.layers.keys()
    problems += [_regression(module, "is in the baseline, but was not converted") for module in sorted(absent)]
    problems += [_regression(module, "was converted, but is not in the baseline") for module in sorted(added)]
    notes = []
    for module in sorted(now.layers.keys() & baseline.layers.keys()):
        ours, theirs = now.layers[module], baseline.layers[module]
        shapes = [(layer.out_features, layer.in_features) for layer in (ours, theirs)]
        if shapes[0] != shapes[1]:
            problems.append(_regression(module, f"is {shapes[0]}, in the baseline {shapes[1]}"))
        if theirs.exact and not ours.exact:
            problems.append(_regression(module, "has new INT4 codes, in the baseline those of the source"))
        elif ours.exact and not theirs.exact:
            notes.append(f"{module}: keeps its INT4 codes, in the baseline they are new")
        gain = _gain(ours.sqnr_db, theirs.sqnr_db)
        if gain < -tolerance_db:
            problems.append(_regression(module, f"SQNR is {_db(ours.sqnr_db)}, in the baseline {_db(theirs.sqnr_db)}"))
        elif gain > tolerance_db:
            notes.append(f"{module}: SQNR is {_db(ours.sqnr_db)}, in the baseline {_db(theirs.sqnr_db)}")
    return tuple(problems), tuple(notes)


def _regression(subject: str, reason: str) -> Refusal:
    return Refusal(subject, reason, "if that is meant, write the baseline again")


def _gain(ours: float | None, theirs: float | None) -> float:
    return 0.0 if ours == theirs else (math.inf if ours is None else ours) - (math.inf if theirs is None else theirs)


def _db(value: float | None) -> str:
    return "without loss" if value is None else f"{value:.2f} dB"


def read_baseline(path: Path) -> Figures:
    """Read what `--write-baseline` wrote.

    Raises:
        ConvertError: it is something else.

    """
    document = read_json(path)
    wrong = ConvertError(str(path), f"is not a version {VERSION} baseline", "write it again with --write-baseline")
    if document.pop("w4a8_check", None) != VERSION:
        raise wrong
    try:
        layers = {str(module): LayerFigures(**figures) for module, figures in document.pop("layers").items()}
        found = Figures(layers=layers, dequantized=tuple(document.pop("dequantized")), **document)
    except (KeyError, TypeError, AttributeError) as error:
        raise wrong from error
    numbers = [found.bytes_in, found.bytes_out, *(layer.sqnr_db or 0 for layer in found.layers.values())]
    if not all(isinstance(number, int | float) for number in numbers):
        raise wrong
    return found


def baseline_dict(figures: Figures) -> dict[str, Any]:
    """Return the baseline document."""
    return {"w4a8_check": VERSION, **asdict(figures)}
