"""What a conversion will do, decided from headers and configuration alone: a Plan, or every problem at once.

The warnings of a plan know some zero-points too (`contradictions.py`); they decide nothing.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.files import LeftOut
from convert_w4a8.checkpoint.names import fusion_key, is_expert, is_lm_head, linear_modules, natural_key, output_name
from convert_w4a8.checkpoint.safetensors_file import TensorInfo, TensorSpec, read_tensor
from convert_w4a8.checkpoint.shards import ShardPlan, plan_shards
from convert_w4a8.conversion.advice import left_out_warnings, module_problems, size_warnings, unlisted_warnings
from convert_w4a8.conversion.contradictions import content_warnings, setting_warnings
from convert_w4a8.errors import ConvertError, PlanError, Problem
from convert_w4a8.linear import GROUP_SIZE, kept_zeros
from convert_w4a8.lut_format import TABLE_BYTES
from convert_w4a8.options import Options, Policy, ScalesMode, Unsupported
from convert_w4a8.sources import LayerSpec, Source, find_source
from convert_w4a8.targets import target_named, target_names, targets
from convert_w4a8.targets.base import Target


class Codes(StrEnum):
    """What becomes of a layer's INT4 codes, as far as headers tell (`linear.kept_groups` says what kept means)."""

    KEPT = "kept"
    NEW = "new"
    UNDECIDED = "decided when read"


@dataclass(frozen=True)
class LayerPlan:
    """One layer and what becomes of it under its name in the output. Plain data, which can be pickled.

    dequantize: why the layer is kept in BF16, or None where it is converted.
    codes, why: what becomes of its codes, and why they are new or not decided yet.
    specs: the tensors of the output that it becomes.
    """

    spec: LayerSpec
    module: str
    dequantize: str | None
    codes: Codes
    why: str | None
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class TensorPlan:
    """One tensor that is copied: byte for byte, or from FP16 to BF16."""

    info: TensorInfo
    output: TensorSpec


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do. Sizes are in bytes.

    ignore: the linear modules of the output that are not quantized.
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
    side_files: tuple[Path, ...] = ()
    left_out: tuple[LeftOut, ...] = ()

    @property
    def converted(self) -> tuple[LayerPlan, ...]:
        """The layers that become W4A8."""
        return tuple(layer for layer in self.layers if layer.dequantize is None)


def make_plan(checkpoint: Checkpoint, options: Options, *, contents: bool = True) -> Plan:
    """Plan a conversion from headers and configuration alone.

    contents: read the zero-points and g_idx of some layers for the warnings, too; not where only headers are here.

    Raises:
        ConvertError: the checkpoint is of no known format.
        PlanError: something cannot be converted; every such thing is listed.

    """
    source = find_source(checkpoint)
    if options.format not in target_names():
        raise ConvertError(
            f"--format {options.format}", "is not an output format", f"use {' or '.join(target_names())}"
        )
    target = target_named(options.format)
    problems: list[Problem] = []
    specs = source.find_layers(checkpoint, problems)
    if not specs and not problems:
        problems.append(Problem(str(checkpoint.root), f"has no {source.NAME} layers", "check quantization_config"))
    if options.scales not in target.MODES:
        problems.append(
            Problem(
                f"--scales {options.scales}",
                f"cannot be stored by --format {target.NAME}",
                _formats_with(options.scales),
            )
        )
    problems.extend(target.find_problems(checkpoint.quantization_config))
    problems.extend(_orphans(checkpoint, source))
    problems.extend(module_problems(checkpoint))
    layers = _plan_layers(checkpoint, specs, target, options, problems)
    consumed = {part.name for spec in specs for part in spec.parts.values()}
    tensors = tuple(_plan_tensor(checkpoint, info) for name, info in checkpoint.tensors.items() if name not in consumed)
    problems.extend(_collisions(layers, tensors))
    if problems:
        raise PlanError(tuple(dict.fromkeys(problems)))  # a wrong setting is refused by every layer

    outputs = [spec for layer in layers for spec in layer.specs] + [tensor.output for tensor in tensors]
    outputs.sort(key=lambda spec: natural_key(spec.name))
    ignore = tuple(sorted(linear_modules(outputs), key=natural_key))
    converted = [(layer.module, layer.spec) for layer in layers if layer.dequantize is None]
    nbytes_out = sum(spec.nbytes for spec in outputs)
    side_nbytes = sum((checkpoint.root / path).stat().st_size for path in checkpoint.side_files)
    return Plan(
        source=source,
        target=target,
        options=options,
        layers=layers,
        tensors=tensors,
        shards=plan_shards(outputs, options.max_shard_size, _named(checkpoint, layers, tensors)),
        ignore=ignore,
        warnings=(
            *size_warnings(converted),
            *setting_warnings(checkpoint, specs),
            *(content_warnings(source, specs) if contents else ()),
            *unlisted_warnings(checkpoint),
            *left_out_warnings(checkpoint),
        ),
        nbytes_in=checkpoint.nbytes,
        nbytes_out=nbytes_out,
        serving_nbytes=_serving_nbytes(layers, tensors),
        disk_nbytes=nbytes_out + side_nbytes,
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


def _plan_layers(
    checkpoint: Checkpoint, specs: Sequence[LayerSpec], target: Target, options: Options, problems: list[Problem]
) -> tuple[LayerPlan, ...]:
    kept: dict[str, str] = {}
    for spec in specs:
        reason = _unsupported_reason(spec, target)
        if reason is None:
            if spec.group_size % GROUP_SIZE and options.group_size is Policy.ERROR:
                problems.append(
                    Problem(
                        spec.name,
                        f"group_size {spec.group_size} is not a multiple of the kernel's {GROUP_SIZE}",
                        "pass --group-size requantize to choose new codes (with a loss that is reported)",
                    )
                )
        elif options.unsupported is Unsupported.DEQUANTIZE or is_lm_head(spec.name):
            kept[spec.name] = reason
        else:
            problems.append(Problem(spec.name, reason, "pass --unsupported dequantize to keep it in BF16"))
    # vLLM quantizes merged layers, and the experts of a layer, all or none.
    fused = {fusion_key(name): name for name in kept}
    layers = []
    for spec in sorted(specs, key=lambda spec: natural_key(spec.name)):
        reason = kept.get(spec.name)
        if reason is None and fusion_key(spec.name) in fused:
            reason = f"served together with {fused[fusion_key(spec.name)]}"
        module = output_name(spec.name, checkpoint.config)
        n, k = spec.out_features, spec.in_features
        if reason is None and not _unsupported_reason(spec, target):
            outputs = target.tensor_specs(module, n, k, options.scales)
        else:
            outputs = (TensorSpec(f"{module}.weight", "BF16", (n, k)),)
        layers.append(LayerPlan(spec, module, reason, *_codes(spec), outputs))
    return tuple(layers)


def _unsupported_reason(spec: LayerSpec, target: Target) -> str | None:
    if is_lm_head(spec.name):
        return "the kernel does not serve lm_head"
    return target.unsupported_size(spec.out_features, spec.in_features)


def _codes(spec: LayerSpec) -> tuple[Codes, str | None]:
    """Return what headers tell about a layer's codes, and why they are not kept for sure."""
    if spec.dense:
        return Codes.NEW, "not quantized in the source"
    if spec.group_size % GROUP_SIZE:
        return Codes.NEW, f"group size {spec.group_size}"
    if spec.act_order:
        return Codes.UNDECIDED, "activation order: new, unless g_idx is trivial"
    if not spec.symmetric:
        return Codes.UNDECIDED, "zero-points: kept where all are 8 or 7"
    if spec.has_zeros or spec.has_g_idx:
        return Codes.UNDECIDED, "kept, if the layer is symmetric as the configuration says"
    return Codes.KEPT, None


def _plan_tensor(checkpoint: Checkpoint, info: TensorInfo) -> TensorPlan:
    dtype = "BF16" if info.dtype == "F16" else info.dtype
    return TensorPlan(info, TensorSpec(output_name(info.name, checkpoint.config), dtype, info.shape))


def _serving_nbytes(layers: Sequence[LayerPlan], tensors: Sequence[TensorPlan]) -> int:
    total = sum(tensor.output.nbytes for tensor in tensors)
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
