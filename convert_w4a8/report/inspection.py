"""What a checkpoint holds, source or converted, tensor by tensor where the configuration cannot be trusted."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import is_expert
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.errors import PlanError, Problem
from convert_w4a8.linear import GROUP_SIZE
from convert_w4a8.report.values import value_warnings
from convert_w4a8.sources import find_source, sources
from convert_w4a8.sources.carried import find_by_groups, find_carried
from convert_w4a8.targets import targets
from convert_w4a8.targets.base import Target
from convert_w4a8.text import counted, human_bytes, printable, table

_SMALL_BYTES = 1 << 20
"""Norms, biases, routers: reading larger tensors would take as long as a conversion."""


@dataclass(frozen=True)
class LayerKind:
    """Layers that are alike: their count, shape, group size, and what their tensors say (not the configuration)."""

    projection: str
    expert: bool
    out_features: int
    in_features: int
    group_size: int
    zero_points: bool
    act_order: bool


@dataclass(frozen=True)
class Inspection:
    """A checkpoint at a glance. Sizes in bytes.

    warnings: of values in small tensors that are not quantized.
    carried: how many layers of each kind are beside those that are, or can be, converted: FP8 ones.
    settings_place: where its quantization's settings are, in words.
    """

    format: str
    architectures: tuple[str, ...]
    nbytes: int
    files: int
    tensors: int
    kinds: Mapping[LayerKind, int]
    settings: Mapping[str, Any]
    warnings: tuple[str, ...]
    carried: Mapping[str, int]
    settings_place: str = ""


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Read headers, of each layer its zero-points and g_idx, and small tensors that are not quantized.

    Raises:
        ConvertError: the format is unknown.
        PlanError: a layer cannot be read.

    """
    config = checkpoint.quantization_config
    kinds: dict[LayerKind, int] = {}
    problems: list[Problem] = []
    quantized: set[str] = set()
    source = next((source for source in sources() if source.matches(checkpoint)), None)
    if source is None:
        target = _target_of(checkpoint)
        name = str(config["quant_method"])
        for module in target.find_layers(checkpoint):
            w = target.decode(checkpoint, module, read_tensor)
            quantized.update(
                spec.name for mode in target.MODES for spec in target.tensor_specs(module, *w.shape_nk, mode)
            )
            _count(
                kinds, LayerKind(module.rpartition(".")[2], is_expert(module), *w.shape_nk, GROUP_SIZE, False, False)
            )
    else:
        name = source.NAME
        for spec in source.find_layers(checkpoint, problems):
            quantized.update(part.name for part in spec.parts.values())
            kind = LayerKind(
                projection=spec.name.rpartition(".")[2],
                expert=is_expert(spec.name),
                out_features=spec.out_features,
                in_features=spec.in_features,
                group_size=spec.group_size,
                zero_points=source.read_zeros(spec, read_tensor) is not None,
                act_order=source.read_g_idx(spec, read_tensor) is not None,
            )
            _count(kinds, kind)
    carried = (
        find_by_groups(checkpoint, config.get("carried") or {}, problems)
        if source is None
        else find_carried(source, checkpoint, problems)
    )
    counts = Counter(layer.kind for layer in carried)
    if problems:
        raise PlanError(problems)
    return Inspection(
        format=name,
        architectures=_architectures(checkpoint.config.get("architectures")),
        nbytes=checkpoint.nbytes,
        files=len({info.path for info in checkpoint.tensors.values()}),
        tensors=len(checkpoint.tensors),
        kinds=kinds,
        warnings=value_warnings(
            info for name, info in checkpoint.tensors.items() if name not in quantized and info.nbytes <= _SMALL_BYTES
        ),
        settings={key: value for key, value in config.items() if isinstance(value, str | int | float | bool)},
        carried=counts,
        settings_place=checkpoint.settings_place,
    )


def _target_of(checkpoint: Checkpoint) -> Target:
    """Return the output format of a checkpoint that is in none of the input formats."""
    for target in targets():
        if target.matches(checkpoint.quantization_config):
            return target
    find_source(checkpoint)  # says what is wrong
    raise AssertionError


def _count(kinds: dict[LayerKind, int], kind: LayerKind) -> None:
    kinds[kind] = kinds.get(kind, 0) + 1


def _architectures(named: object) -> tuple[str, ...]:
    """Return the architectures that a configuration names, whatever stands there."""
    if named is None:
        return ()
    return tuple(map(str, named)) if isinstance(named, list) else (str(named),)


def as_dict(found: Inspection) -> dict[str, Any]:
    """Return an inspection for programs."""
    return {
        "format": found.format,
        "architectures": list(found.architectures),
        "bytes": found.nbytes,
        "files": found.files,
        "tensors": found.tensors,
        "layers": [{**asdict(kind), "count": count} for kind, count in found.kinds.items()],
        "settings": dict(found.settings),
        "carried": dict(found.carried),
        "settings_place": found.settings_place,
        "warnings": list(found.warnings),
    }


def as_text(found: Inspection) -> str:
    """Render an inspection for people."""
    rows = [
        (
            f"{'expert ' if kind.expert else ''}{kind.projection}",
            str(count),
            f"{kind.out_features}×{kind.in_features}",
            str(kind.group_size),
            "yes" if kind.zero_points else "-",
            "yes" if kind.act_order else "-",
        )
        for kind, count in found.kinds.items()
    ]
    architectures = ", ".join(map(printable, found.architectures))
    head = [
        f"format     {printable(found.format)} ({architectures or 'architecture not named'})",
        f"size       {human_bytes(found.nbytes)} in {counted(found.files, 'file')}, {counted(found.tensors, 'tensor')}",
        "settings   " + ", ".join(printable(f"{key}={value}") for key, value in found.settings.items()),
        f"           in {printable(found.settings_place)}",
        *(f"beside     {counted(count, 'layer')}: {printable(kind)}" for kind, count in found.carried.items()),
        *(f"warning    {printable(warning)}" for warning in found.warnings),
        "",
    ]
    return "\n".join(head) + table(rows, ("layer", "count", "N×K", "group", "zero-points", "act-order"))
