"""A conversion in numbers, from the bytes of both directories: what `w4a8 report` shows."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import torch

from convert_w4a8.checkpoint.directory import Checkpoint
from convert_w4a8.checkpoint.names import natural_key, output_name
from convert_w4a8.checkpoint.safetensors_file import read_tensor
from convert_w4a8.errors import ConvertError, PlanError, Problem
from convert_w4a8.fp8 import CODE_MAX, E4M3, E4M3_MAX
from convert_w4a8.linear import DenseLinear, W4A8Linear
from convert_w4a8.report.layers import LABELS, SCHEMES, Distributions, LayerReport, measure_layer
from convert_w4a8.report.memory import KV_BYTES, KvCache, WeightMemory, kv_cache, weight_memory
from convert_w4a8.report.values import value_warnings
from convert_w4a8.sources import find_origin
from convert_w4a8.targets import find_target
from convert_w4a8.text import human_bytes, printable, table
from convert_w4a8.verification.scaling import find_scaling
from convert_w4a8.version import __version__

_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "w1", "up_proj", "w3", "down_proj", "w2")


@dataclass(frozen=True)
class Report:
    """Everything that the report shows. Layers in natural order; sizes in bytes.

    name, source_name: of the directories, or the Hub ids. converted_with: tool and version that OUT names, if it does.
    """

    name: str
    source_name: str
    converted_with: str | None
    source_format: str
    target_format: str
    scales_mode: str | None
    layers: tuple[LayerReport, ...]
    dequantized: tuple[str, ...]
    distributions: Distributions
    stored_tables: bool
    weights: WeightMemory
    kv: KvCache
    nbytes_in: int
    nbytes_out: int
    warnings: tuple[str, ...]


def collect(out: Checkpoint, source: Checkpoint, *, progress: Callable[[int], None] = lambda _nbytes: None) -> Report:
    """Measure a converted checkpoint against its source.

    progress: called with the number of source bytes measured since the last call.

    Raises:
        ConvertError: one of the two cannot be read, or OUT was not converted from this source.
        PlanError: layers of the source cannot be read.

    """
    reader, target = find_origin(source), find_target(out)
    if target.SCHEME == "W4A16":
        raise ConvertError(str(out.root), "is W4A16, which has no FP8 tables to show", "give an output in W4A8")
    problems: list[Problem] = []
    specs = {output_name(spec.name, source.config): spec for spec in reader.find_layers(source, problems)}
    if problems:
        raise PlanError(problems)
    converted = set(target.find_layers(out))
    consumed = {part.name for spec in specs.values() for part in spec.parts.values()}
    copies = {output_name(name, source.config): info for name, info in source.tensors.items() if name not in consumed}
    scaling = find_scaling(out, reader, target, read_tensor, specs, copies)
    distributions = Distributions()
    layers, dequantized = [], []
    stored_tables = False
    for module, spec in sorted(specs.items(), key=lambda item: natural_key(item[0])):
        if module in converted:
            w4a8 = target.decode(out, module, read_tensor)
            assert isinstance(w4a8, W4A8Linear)
            stored_tables |= w4a8.entries is not None
            w = reader.read_layer(spec, read_tensor)
            if scaling is not None and isinstance(w, DenseLinear):
                w = scaling.layer(module, w)
            if w4a8.shape_nk != w.shape_nk:
                raise _foreign(module, f"is {w4a8.shape_nk} in OUT, but {w.shape_nk} in the source")
            layers.append(measure_layer(module, w, w4a8, distributions))
        elif f"{module}.weight" in out.tensors:
            dequantized.append(module)
        else:
            raise _foreign(module, "is a quantized layer of the source, but is not in OUT")
        progress(spec.nbytes)
    strange = sorted(converted - {layer.module for layer in layers})
    if strange:
        raise _foreign(strange[0], "is a layer of OUT, but not of the source")
    if not layers:
        raise _foreign(str(out.root), "holds no converted layer")
    shapes = [(layer.module, layer.out_features, layer.in_features) for layer in layers]
    names = {part.name for mode in target.MODES for shape in shapes for part in target.tensor_specs(*shape, mode)}
    others = [info for info in out.tensors.values() if info.name not in names]
    conversion = out.quantization_config.get("conversion")
    made = conversion if isinstance(conversion, Mapping) else {}
    mode, tool = made.get("scales"), (made.get("tool"), made.get("tool_version"))
    return Report(
        name=_name(out),
        source_name=_name(source),
        converted_with=" ".join(map(str, tool)) if all(tool) else None,
        source_format=reader.NAME,
        target_format=target.NAME,
        scales_mode=None if mode is None else str(mode),
        layers=tuple(layers),
        dequantized=tuple(dequantized),
        distributions=distributions,
        stored_tables=stored_tables,
        weights=weight_memory(
            [(n, k) for _, n, k in shapes],
            sum(info.nbytes for info in others),
        ),
        kv=kv_cache(out.config),
        nbytes_in=source.nbytes,
        nbytes_out=out.nbytes,
        warnings=value_warnings(others),
    )


def _name(checkpoint: Checkpoint) -> str:
    """Return the name of a checkpoint's directory; in the Hub's cache, where that is a commit, the Hub id with it."""
    root = checkpoint.root.resolve()
    owner = root.parent.parent.name
    if root.parent.name == "snapshots" and owner.startswith("models--"):
        return f"{owner.removeprefix('models--').replace('--', '/')}@{root.name[:12]}"
    return root.name


def _foreign(subject: str, reason: str) -> ConvertError:
    return ConvertError(subject, reason, "give as --source the checkpoint that OUT was converted from")


@dataclass(frozen=True)
class Spot:
    """The layers of one kind in one block of the model: one, or as many as there are experts. SQNR in dB by scheme."""

    kind: str
    block: int
    count: int
    mean: Mapping[str, float]
    least: Mapping[str, float]


def aggregate(layers: Iterable[LayerReport]) -> list[Spot]:
    """Gather layers by kind and block, in the order in which they come."""
    gathered: dict[tuple[str, int], list[LayerReport]] = {}
    for layer in layers:
        gathered.setdefault((layer.kind, layer.block), []).append(layer)
    return [
        Spot(
            kind=kind,
            block=block,
            count=len(alike),
            mean={scheme: fmean(layer.sqnr_db[scheme] for layer in alike) for scheme in SCHEMES},
            least={scheme: min(layer.sqnr_db[scheme] for layer in alike) for scheme in SCHEMES},
        )
        for (kind, block), alike in gathered.items()
    ]


def short_kinds(layers: Iterable[LayerReport]) -> dict[str, str]:
    """Return every kind of layer with its name less what all begin with; attention first, as the model computes."""
    kinds = {layer.kind: layer.kind.split(".") for layer in layers}
    first = next(iter(kinds.values()))
    common = 0
    while all(len(parts) > common + 1 and parts[common] == first[common] for parts in kinds.values()):
        common += 1
    short = {kind: ".".join(parts[common:]) for kind, parts in kinds.items()}
    return dict(sorted(short.items(), key=_model_order))


def _model_order(item: tuple[str, str]) -> tuple[bool, str, int, str]:
    parent, _, leaf = item[0].rpartition(".")
    return "attn" not in parent, parent, _ORDER.index(leaf) if leaf in _ORDER else len(_ORDER), leaf


def fp8_values(counts: torch.Tensor) -> list[tuple[float, int]]:
    """Return (value, count) of the FP8 magnitudes that occur, from their counts by bit pattern, [128]."""
    values = torch.arange(128, dtype=torch.uint8).view(E4M3).float().tolist()
    return [(value, count) for value, count in zip(values, counts.tolist(), strict=True) if count]


def as_dict(report: Report) -> dict[str, Any]:
    """Return the report for programs. Infinite SQNRs (nothing was lost) are null."""
    distributions = report.distributions
    products = distributions.products
    return {
        "name": report.name,
        "source_name": report.source_name,
        "converted_with": report.converted_with,
        "version": __version__,
        "source": report.source_format,
        "target": report.target_format,
        "scales": report.scales_mode,
        "bytes_in": report.nbytes_in,
        "bytes_out": report.nbytes_out,
        "warnings": list(report.warnings),
        "sqnr_db": {
            scheme: {"mean": _finite(mean(report, scheme)), "least": _finite(worst(report, scheme).sqnr_db[scheme])}
            for scheme in SCHEMES
        },
        "layers": [
            {**asdict(layer), "sqnr_db": {scheme: _finite(db) for scheme, db in layer.sqnr_db.items()}}
            for layer in report.layers
        ],
        "dequantized": list(report.dequantized),
        "group_scales": {
            name: {"bins": histogram.bins(), "zeros": histogram.zeros}
            for name, histogram in distributions.scales.items()
        },
        "fp8_scales": {name: fp8_values(counts) for name, counts in distributions.fp8.items()},
        "stored_tables": report.stored_tables,
        "products": {
            "bins": products.bins(),
            "zeros": products.zeros,
            "clipped_without_eighth": products.share_above(E4M3_MAX),
            "clipped_with_eighth": products.share_above(CODE_MAX * E4M3_MAX),
        },
        "clipped_table_entries": distributions.clipped,
        "weight_bytes": asdict(report.weights),
        "kv_cache": {
            "unknown": report.kv.unknown,
            "note": report.kv.note,
            "bytes_per_token": {name: size * report.kv.per_token for name, size in KV_BYTES.items()},
            "bytes_per_sequence": {
                name: {length: size * values for length, values in report.kv.per_sequence.items()}
                for name, size in KV_BYTES.items()
            },
        },
    }


def as_text(report: Report) -> str:
    """Render the summary for people."""
    rows = [
        (LABELS[scheme], f"{mean(report, scheme):.2f}", f"{least.sqnr_db[scheme]:.2f}", least.module)
        for scheme in SCHEMES
        for least in (worst(report, scheme),)
    ]
    w = report.weights
    memory = f"{human_bytes(w.int4)} of weights when served, {human_bytes(w.bf16)} in BF16"
    if report.kv.unknown is None:
        memory += f"; KV cache {human_bytes(KV_BYTES['BF16'] * report.kv.per_token)} a token in BF16"
    lines = [f"memory     {memory}", *(f"warning    {printable(warning)}" for warning in report.warnings)]
    return "\n".join([table(rows, ("scales", "mean dB", "least dB", "in")), "", *lines])


def mean(report: Report, scheme: str) -> float:
    """Return the mean SQNR of the layers in dB."""
    return fmean(layer.sqnr_db[scheme] for layer in report.layers)


def worst(report: Report, scheme: str) -> LayerReport:
    """Return the layer with the least SQNR."""
    return min(report.layers, key=lambda layer: layer.sqnr_db[scheme])


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
