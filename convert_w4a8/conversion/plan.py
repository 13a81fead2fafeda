"""What a conversion will do, decided from headers and configuration alone: a Plan, or every problem at once.

The warnings of a plan know some zero-points too (`contradictions.py`); they decide nothing.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import LeftOut
from convert_w4a8.checkpoint.mixture import Mixture
from convert_w4a8.checkpoint.names import find_mixtures, is_expert, natural_key, output_name
from convert_w4a8.checkpoint.safetensors_file import TensorInfo, TensorSpec, read_tensor
from convert_w4a8.checkpoint.shards import ShardPlan, plan_shards
from convert_w4a8.conversion.advice import left_out_warnings, module_problems, unlisted_warnings, width_warnings
from convert_w4a8.conversion.contradictions import content_warnings, setting_warnings
from convert_w4a8.conversion.fused import mixed_problems
from convert_w4a8.conversion.ignore import ignore_list
from convert_w4a8.conversion.layers import Codes, LayerPlan, plan_layers
from convert_w4a8.conversion.leftovers import leftover_notes, leftover_problems
from convert_w4a8.conversion.missing import missing_problems, missing_warnings, parts_of
from convert_w4a8.conversion.sixteen_bits import Kind, find_kinds
from convert_w4a8.errors import ConvertError, PlanError, Problem
from convert_w4a8.linear import GROUP_SIZE, kept_zeros
from convert_w4a8.lut_format import TABLE_BYTES
from convert_w4a8.options import Options, Policy, ScalesMode
from convert_w4a8.sources import Source, find_notes, find_source
from convert_w4a8.sources.carried import CarriedLayer, carried_groups, find_carried
from convert_w4a8.targets import target_named, target_names, targets
from convert_w4a8.targets.base import Target

__all__ = ["Codes", "LayerPlan", "Plan", "TensorPlan", "check_tensors", "kinds", "make_plan"]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor that is copied: byte for byte, or from FP16 to BF16 where it is of no carried layer."""

    info: TensorInfo
    output: TensorSpec


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do. Sizes are in bytes.

    ignore: the linear modules of the output that are not quantized, by name and by pattern.
    sixteen_bits: all that is in 16 bits or more in the output, by kind.
    carried: the FP8 layers, whose tensors are among `tensors`.
    serving_nbytes: weight memory at serving time, the expanded tables included.
    side_files, left_out: what else of the input is copied as it is, and what is not carried over.
    """

    source: Source
    target: Target
    options: Options
    layers: tuple[LayerPlan, ...]
    tensors: tuple[TensorPlan, ...]
    shards: tuple[ShardPlan, ...]
    ignore: tuple[str, ...]
    warnings: tuple[str, ...]
    nbytes_in: int
    nbytes_out: int
    serving_nbytes: int
    disk_nbytes: int
    sixteen_bits: tuple[Kind, ...] = ()
    carried: tuple[CarriedLayer, ...] = ()
    side_files: tuple[Path, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def converted(self) -> tuple[LayerPlan, ...]:
        """The layers that become W4A8."""
        return tuple(layer for layer in self.layers if layer.dequantize is None)

    def mixture(self, config: Mapping[str, Any]) -> Mixture:
        """Return the layers of each kind, by their names in the output of a model with this config."""
        return Mixture(tuple(layer.module for layer in self.converted), carried_groups(self.carried, config))


def make_plan(
    checkpoint: Checkpoint,
    options: Options,
    *,
    contents: bool = True,
    source: Source | None = None,
    formats: Sequence[str] = (),
    part_of: Callable[[str], Hashable] = lambda _name: None,
) -> Plan:
    """Plan a conversion from headers and configuration alone.

    contents: read the zero-points and g_idx of some layers for the warnings, too; not where only headers are here.
    source: the input format, if it is known. formats: those that there are to choose from, by default those of W4A8.
    part_of: tensors of the output of which this differs lie in other files.

    Raises:
        ConvertError: the checkpoint is of no known format.
        PlanError: something cannot be converted; every such thing is listed.

    """
    source = source or find_source(checkpoint)
    if options.format not in (formats or target_names()):
        raise ConvertError(
            f"--format {options.format}", "is not an output format", f"use {' or '.join(target_names())}"
        )
    target = target_named(options.format)
    problems: list[Problem] = []
    specs = source.find_layers(checkpoint, problems)
    carried = find_carried(source, checkpoint, problems)
    consumed = {part.name for spec in specs for part in spec.parts.values()}
    known = consumed | {part.name for layer in carried for part in layer.parts.values()}
    orphans = list(_orphans(checkpoint, source))
    if not problems:  # settings that are not read may explain tensors that are not
        problems.extend(leftover_problems(checkpoint, specs, known | {orphan.subject for orphan in orphans}))
    if not specs and not problems:
        problems.append(
            Problem(str(checkpoint.root), "has FP8 layers only: nothing to convert", "serve it as it is")
            if carried
            else Problem(str(checkpoint.root), f"has no {source.NAME} layers", "check quantization_config")
        )
    problems.extend(mixed_problems(checkpoint, specs, carried, known))
    parts = parts_of(checkpoint, specs)
    problems.extend(missing_problems(parts, checkpoint.config))
    if options.scales not in target.MODES:
        problems.append(
            Problem(
                f"--scales {options.scales}",
                f"cannot be stored by --format {target.NAME}",
                _formats_with(options.scales),
            )
        )
    problems.extend(target.find_problems(checkpoint.quantization_config))
    problems.extend(orphans)
    problems.extend(module_problems(checkpoint))
    mixtures = find_mixtures(checkpoint.tensors.values(), checkpoint.config)
    eight_bit = {layer.name for layer in carried}
    layers = plan_layers(checkpoint, specs, eight_bit, mixtures, target, options, problems)
    names = {info.name: name for layer in carried for name, info in layer.outputs(checkpoint.config).items()}
    tensors = tuple(
        TensorPlan(info, TensorSpec(names[name], info.dtype, info.shape))
        if name in names
        else _plan_tensor(checkpoint, info)
        for name, info in checkpoint.tensors.items()
        if name not in consumed
    )
    problems.extend(_collisions(layers, tensors))
    if problems:
        raise PlanError(tuple(dict.fromkeys(problems)))  # a wrong setting is refused by every layer

    outputs = [spec for layer in layers for spec in layer.specs] + [tensor.output for tensor in tensors]
    outputs.sort(key=lambda spec: natural_key(spec.name))
    plain = [spec for layer in layers if layer.dequantize is not None for spec in layer.specs]
    plain += [tensor.output for tensor in tensors if tensor.info.name not in names]
    quantized = {layer.module for layer in layers if layer.dequantize is None}
    quantized |= {output_name(layer.name, checkpoint.config) for layer in carried}
    excluded: list[str] = []
    ignore = ignore_list(checkpoint.config, checkpoint.quantization_config, quantized, plain, excluded)
    nbytes_out = sum(spec.nbytes for spec in outputs)
    side_nbytes = sum((checkpoint.root / path).stat().st_size for path in checkpoint.side_files)
    return Plan(
        source=source,
        target=target,
        options=options,
        layers=layers,
        tensors=tensors,
        shards=plan_shards(outputs, options.max_shard_size, _named(checkpoint, layers, tensors), part_of),
        ignore=ignore,
        warnings=(
            *width_warnings(layers),
            *excluded,
            *find_notes(source, checkpoint),
            *leftover_notes(checkpoint, known),
            *setting_warnings(checkpoint, specs),
            *missing_warnings(parts, checkpoint.config),
            *(content_warnings(source, specs) if contents else ()),
            *unlisted_warnings(checkpoint),
            *left_out_warnings(checkpoint),
        ),
        nbytes_in=checkpoint.nbytes,
        nbytes_out=nbytes_out,
        serving_nbytes=_serving_nbytes(layers, tensors, target),
        disk_nbytes=nbytes_out + side_nbytes,
        sixteen_bits=find_kinds(
            layers,
            [tensor.output for tensor in tensors if tensor.info.name not in names],
            mixtures,
            checkpoint.config,
        ),
        carried=carried,
        side_files=checkpoint.side_files,
        left_out=checkpoint.left_out,
    )


def _named(checkpoint: Checkpoint, layers: Iterable[LayerPlan], tensors: Iterable[TensorPlan]) -> dict[str, str]:
    """Return output tensor → file, of the files that keep their names (`Checkpoint.named_files`)."""
    files = {tensor.output.name: tensor.info.path.name for tensor in tensors}
    for layer in layers:
        files |= dict.fromkeys((spec.name for spec in layer.specs), min(i.path.name for i in layer.spec.parts.values()))
    return {name: file for name, file in files.items() if file in checkpoint.named_files}


def _formats_with(mode: ScalesMode) -> str:
    return "use --format " + " or ".join(target.NAME for target in targets() if mode in target.MODES)


def check_tensors(plan: Plan) -> None:
    """Read the small tensors that decide whether codes can be kept, where the options refuse what cannot.

    A configuration may claim desc_act or zero-points that its tensors do not have; the tensors count.

    Raises:
        PlanError: every layer that `--asymmetric error` or `--act-order error` refuses.

    """
    problems = []
    for layer in plan.converted:
        spec, source = layer.spec, plan.source
        if plan.options.act_order is Policy.ERROR and source.read_g_idx(spec, read_tensor) is not None:
            problems.append(
                Problem(
                    spec.name,
                    "g_idx reorders the input channels, which the kernel cannot follow",
                    "pass --act-order requantize to choose new codes (with a loss that is reported)",
                )
            )
        zeros = source.read_zeros(spec, read_tensor) if plan.options.asymmetric is Policy.ERROR else None
        if zeros is not None and not bool(kept_zeros(zeros).all()):
            problems.append(
                Problem(
                    spec.name,
                    "has zero-points other than 8 and 7, which the kernel does not know",
                    "pass --asymmetric requantize to choose new codes (with a loss that is reported)",
                )
            )
    if problems:
        raise PlanError(problems)


def _orphans(checkpoint: Checkpoint, source: Source) -> Iterable[Problem]:
    """Yield quantization tensors that belong to no layer: the tensor that makes one is missing."""
    for name in checkpoint.tensors:
        module, _, role = name.rpartition(".")
        if role in source.ROLES and role != "weight" and f"{module}.{source.ANCHOR}" not in checkpoint.tensors:
            yield Problem(name, "belongs to no quantized layer", "download or write the checkpoint again")


def _collisions(layers: Sequence[LayerPlan], tensors: Sequence[TensorPlan]) -> Iterable[Problem]:
    """Yield output names that stand for two tensors of the input, such as a plain weight beside a quantized one."""
    claims = Counter(tensor.output.name for tensor in tensors)
    for layer in layers:
        claims.update({f"{layer.module}.weight", *(spec.name for spec in layer.specs)})
    for name, count in claims.items():
        if count > 1:
            yield Problem(name, f"is claimed by {count} tensors of the checkpoint", "remove all but one of them")


def _plan_tensor(checkpoint: Checkpoint, info: TensorInfo) -> TensorPlan:
    dtype = "BF16" if info.dtype == "F16" else info.dtype
    return TensorPlan(info, TensorSpec(output_name(info.name, checkpoint.config), dtype, info.shape))


def _serving_nbytes(layers: Sequence[LayerPlan], tensors: Sequence[TensorPlan], target: Target) -> int:
    total = sum(tensor.output.nbytes for tensor in tensors)
    if target.SCHEME == "W4A16":
        return total + sum(spec.nbytes for layer in layers for spec in layer.specs)
    for layer in layers:
        n, k = layer.spec.out_features, layer.spec.in_features
        total += 2 * n * k if layer.dequantize else n * k // 2 + TABLE_BYTES * n * (k // GROUP_SIZE) + 4 * n
    return total


def kinds(plan: Plan) -> Mapping[str, int]:
    """Count the layers by what becomes of them."""
    codes = Counter(layer.codes for layer in plan.converted)
    return {
        "converted": len(plan.converted),
        "experts": sum(is_expert(layer.module) for layer in plan.converted),
        "codes_kept": codes[Codes.KEPT],
        "codes_new": codes[Codes.NEW],
        "codes_decided_when_read": codes[Codes.UNDECIDED],
        "in_bf16": len(plan.layers) - len(plan.converted),
    }
