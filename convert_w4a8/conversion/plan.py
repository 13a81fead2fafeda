"""What a conversion will do, decided from headers and configuration alone: a Plan, or every refusal at once."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import (
    fusion_key,
    is_expert,
    is_lm_head,
    linear_modules,
    merged_name,
    natural_key,
    output_name,
)
from convert_w4a8.checkpoint.safetensors_file import TensorInfo, TensorSpec
from convert_w4a8.checkpoint.shards import ShardPlan, plan_shards
from convert_w4a8.errors import PlanError, Refusal
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.lut_format import TABLE_BYTES, TILE_N
from convert_w4a8.options import Options, Policy, Unsupported
from convert_w4a8.sources import LayerSpec, Source, find_source
from convert_w4a8.targets import Target, target_named


@dataclass(frozen=True)
class LayerPlan:
    """One quantized layer and what becomes of it under its name in the output.

    dequantize: why the layer is kept in BF16, or None where it is converted.
    requantize: why its codes will be chosen anew, as far as the configuration tells; None where they are kept.
    """

    spec: LayerSpec
    module: str
    dequantize: str | None
    requantize: str | None
    outputs: tuple[TensorSpec, ...]


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

    @property
    def converted(self) -> tuple[LayerPlan, ...]:
        """The layers that become W4A8."""
        return tuple(layer for layer in self.layers if layer.dequantize is None)


def make_plan(checkpoint: Checkpoint, options: Options) -> Plan:
    """Plan a conversion from headers and configuration alone.

    Raises:
        ConvertError: the checkpoint is of no known format.
        PlanError: something cannot be converted; every such thing is listed.

    """
    source = find_source(checkpoint)
    target = target_named(options.format)
    refusals: list[Refusal] = []
    specs = source.find_layers(checkpoint, refusals)
    if not specs and not refusals:
        refusals.append(Refusal(str(checkpoint.root), f"has no {source.NAME} layers", "check quantization_config"))
    if options.scales not in target.MODES:
        refusals.append(
            Refusal(f"--scales {options.scales}", f"cannot be stored by --format {target.NAME}", "use --format lut")
        )
    if target.NAME == "lut" and checkpoint.quantization_config.get("kv_cache_scheme"):
        refusals.append(
            Refusal(
                "quantization_config: kv_cache_scheme", "is not part of --format lut", "use --format compressed-tensors"
            )
        )
    refusals.extend(_orphans(checkpoint, source))
    layers = _plan_layers(checkpoint, specs, target, options, refusals)
    consumed = {name for spec in specs for name in spec.parts.values()}
    tensors = tuple(_plan_tensor(checkpoint, info) for name, info in checkpoint.tensors.items() if name not in consumed)
    refusals.extend(_collisions(layers, tensors))
    if refusals:
        raise PlanError(tuple(dict.fromkeys(refusals)))  # a wrong setting is refused by every layer

    outputs = [spec for layer in layers for spec in layer.outputs] + [tensor.output for tensor in tensors]
    outputs.sort(key=lambda spec: natural_key(spec.name))
    ignore = tuple(sorted(linear_modules(outputs), key=natural_key))
    nbytes_out = sum(spec.nbytes for spec in outputs)
    side_nbytes = sum((checkpoint.root / path).stat().st_size for path in checkpoint.side_files)
    return Plan(
        source=source,
        target=target,
        options=options,
        layers=layers,
        tensors=tensors,
        shards=plan_shards(outputs, options.max_shard_size),
        ignore=ignore,
        warnings=tuple(_warnings(layers)),
        nbytes_in=checkpoint.nbytes,
        nbytes_out=nbytes_out,
        serving_nbytes=_serving_nbytes(layers, tensors),
        disk_nbytes=nbytes_out + side_nbytes,
    )


def check_tensors(checkpoint: Checkpoint, plan: Plan) -> None:
    """Read the small tensors that decide whether codes can be kept, where the options refuse what cannot.

    A configuration may claim desc_act or zero-points that its tensors do not have; the tensors count.

    Raises:
        PlanError: every layer that `--asymmetric error` or `--act-order error` refuses.

    """
    refusals = []
    for layer in plan.converted:
        spec, source = layer.spec, plan.source
        if plan.options.act_order is Policy.ERROR and source.read_g_idx(checkpoint, spec) is not None:
            refusals.append(
                Refusal(
                    spec.name,
                    "g_idx reorders the input channels, which the kernel cannot follow",
                    "pass --act-order requantize to choose new codes (with a loss that is reported)",
                )
            )
        if plan.options.asymmetric is Policy.ERROR and source.read_zeros(checkpoint, spec) is not None:
            refusals.append(
                Refusal(
                    spec.name,
                    "has zero-points other than 8, which the kernel does not know",
                    "pass --asymmetric requantize to choose new codes (with a loss that is reported)",
                )
            )
    if refusals:
        raise PlanError(refusals)


def _orphans(checkpoint: Checkpoint, source: Source) -> Iterable[Refusal]:
    """Yield quantization tensors that belong to no layer: the tensor that makes one is missing."""
    for name in checkpoint.tensors:
        module, _, role = name.rpartition(".")
        if role in source.ROLES and role != "weight" and f"{module}.{source.ANCHOR}" not in checkpoint.tensors:
            yield Refusal(name, "belongs to no quantized layer", "download or write the checkpoint again")


def _collisions(layers: Sequence[LayerPlan], tensors: Sequence[TensorPlan]) -> Iterable[Refusal]:
    """Yield output names that stand for two tensors of the input, such as a plain weight beside a quantized one."""
    claims = Counter(tensor.output.name for tensor in tensors)
    for layer in layers:
        claims.update({f"{layer.module}.weight", *(spec.name for spec in layer.outputs)})
    for name, count in claims.items():
        if count > 1:
            yield Refusal(name, f"is claimed by {count} tensors of the checkpoint", "remove all but one of them")


def _plan_layers(
    checkpoint: Checkpoint, specs: Sequence[LayerSpec], target: Target, options: Options, refusals: list[Refusal]
) -> tuple[LayerPlan, ...]:
    kept: dict[str, str] = {}
    for spec in specs:
        reason = _unsupported_reason(spec)
        if reason is None:
            if spec.group_size % GROUP_SIZE and options.group_size is Policy.ERROR:
                refusals.append(
                    Refusal(
                        spec.name,
                        f"group_size {spec.group_size} is not a multiple of the kernel's {GROUP_SIZE}",
                        "pass --group-size requantize to choose new codes (with a loss that is reported)",
                    )
                )
        elif options.unsupported is Unsupported.DEQUANTIZE or is_lm_head(spec.name):
            kept[spec.name] = reason
        else:
            refusals.append(Refusal(spec.name, reason, "pass --unsupported dequantize to keep it in BF16"))
    # vLLM quantizes merged layers, and the experts of a layer, all or none.
    fused = {fusion_key(name): name for name in kept}
    layers = []
    for spec in sorted(specs, key=lambda spec: natural_key(spec.name)):
        reason = kept.get(spec.name)
        if reason is None and fusion_key(spec.name) in fused:
            reason = f"served together with {fused[fusion_key(spec.name)]}"
        module = output_name(spec.name, checkpoint.config)
        n, k = spec.out_features, spec.in_features
        if reason is None and not _unsupported_reason(spec):
            outputs = target.outputs(module, n, k, options.scales)
        else:
            outputs = (TensorSpec(f"{module}.weight", "BF16", (n, k)),)
        layers.append(LayerPlan(spec, module, reason, _requantize_reason(spec), outputs))
    return tuple(layers)


def _unsupported_reason(spec: LayerSpec) -> str | None:
    if is_lm_head(spec.name):
        return "the kernel does not serve lm_head"
    if spec.out_features % TILE_N:
        return f"N = {spec.out_features} is not a multiple of {TILE_N}"
    if spec.in_features % GROUP_SIZE:
        return f"K = {spec.in_features} is not a multiple of {GROUP_SIZE}"
    return None


def _requantize_reason(spec: LayerSpec) -> str | None:
    if spec.act_order:
        return "activation order, if g_idx permutes"
    if spec.group_size % GROUP_SIZE:
        return f"group size {spec.group_size}"
    if not spec.symmetric:
        return "zero-points, where they are not 8"
    return None


def _plan_tensor(checkpoint: Checkpoint, info: TensorInfo) -> TensorPlan:
    dtype = "BF16" if info.dtype == "F16" else info.dtype
    return TensorPlan(info, TensorSpec(output_name(info.name, checkpoint.config), dtype, info.shape))


def _serving_nbytes(layers: Sequence[LayerPlan], tensors: Sequence[TensorPlan]) -> int:
    total = sum(tensor.output.nbytes for tensor in tensors)
    for layer in layers:
        n, k = layer.spec.out_features, layer.spec.in_features
        total += 2 * n * k if layer.dequantize else n * k // 2 + TABLE_BYTES * n * (k // GROUP_SIZE) + 4 * n
    return total


def _warnings(layers: Sequence[LayerPlan]) -> Iterable[str]:
    """Yield what converts, but cannot be served as it is."""
    dense: dict[str, int] = {}
    experts: dict[str, int] = {}
    for layer in layers:
        if layer.dequantize is not None:
            continue
        if is_expert(layer.module):
            odd = layer.spec.out_features % 256 or layer.spec.in_features % 256
            if odd:
                experts[layer.module] = odd
        else:
            merged = merged_name(layer.module)
            dense[merged] = dense.get(merged, 0) + layer.spec.out_features
    wide = {name: width for name, width in dense.items() if width % 128}
    if wide:
        name, width = next(iter(wide.items()))
        yield f"{len(wide)} layers are not a multiple of 128 wide, which vLLM's kernel needs: {name} has N = {width}"
    if experts:
        name = next(iter(experts))
        yield f"{len(experts)} expert layers have a size that is no multiple of 256, which vLLM's kernel needs: {name}"


def kinds(plan: Plan) -> Mapping[str, int]:
    """Count the layers by what becomes of them."""
    converted = plan.converted
    experts = sum(is_expert(layer.module) for layer in converted)
    requantized = sum(layer.requantize is not None for layer in converted)
    return {
        "dense": len(converted) - experts,
        "expert": experts,
        "exact": len(converted) - requantized,
        "requantized": requantized,
        "dequantized": len(plan.layers) - len(converted),
    }
