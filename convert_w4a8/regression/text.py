"""The outcome of `w4a8 check` as Markdown, for a terminal as for a job summary, and as JSON."""

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from convert_w4a8.errors import ProblemGroup, grouped
from convert_w4a8.regression.baseline import Figures, LayerFigures, baseline_dict
from convert_w4a8.regression.check import Check
from convert_w4a8.text import human_bytes, markdown_cell, markdown_code, markdown_table

_LISTED = 20


def as_dict(outcome: Check) -> dict[str, Any]:
    """Return a check for programs."""
    return {
        "ok": not outcome.problems,
        "name": outcome.name,
        "verified": outcome.verified,
        "figures": None if outcome.figures is None else baseline_dict(outcome.figures),
        "problems": [group.as_dict() for group in grouped(outcome.problems)],
        "notes": list(outcome.notes),
    }


def as_markdown(outcome: Check) -> str:
    """Return a check for people."""
    now, baseline = outcome.figures, outcome.baseline
    parts = [f"## w4a8 check of {markdown_code(outcome.name)}: {'failed' if outcome.problems else 'passed'}"]
    if now is not None:
        extent = "one layer of each kind" if now.sample else "every layer"
        parts.append(f"{now.source} to {now.format}, scales: {now.scales}, {extent}.")
    if outcome.problems:
        groups = grouped(outcome.problems)
        rows = [
            [_where(group), markdown_cell(group.first.reason), markdown_cell(group.first.remedy)]
            for group in groups[:_LISTED]
        ]
        parts += [
            f"### {_more('Problems', len(groups))}",
            markdown_table(["where", "what", "what to do"], rows, "lll"),
        ]
    if now is not None:
        columns = [_summary(figures) for figures in (now, baseline) if figures is not None]
        header = ["", "now", *(["baseline"] if baseline is not None else [])]
        parts.append(
            markdown_table(
                header, [[name, *(c[name] for c in columns)] for name in columns[0]], "l" + "r" * len(columns)
            )
        )
        if now.layers:
            parts.append(_kinds(now.layers, {} if baseline is None else baseline.layers))
    if outcome.notes:
        parts.append(f"### {_more('Better than the baseline', len(outcome.notes))}")
        parts.append("\n".join(f"* {markdown_cell(note)}" for note in outcome.notes[:_LISTED]))
    return "\n\n".join(parts) + "\n"


def _where(group: ProblemGroup) -> str:
    more = f" and {group.count - 1:,} more" if group.count > 1 else ""
    return markdown_code(group.first.subject) + more


def _more(title: str, count: int) -> str:
    return title if count <= _LISTED else f"{title} (the first {_LISTED} of {count:,})"


def _summary(figures: Figures) -> dict[str, str]:
    layers = figures.layers
    kept = sum(layer.codes_kept for layer in layers.values())
    return {
        "layers converted": f"{len(layers):,}",
        "of these with the source's INT4 codes": f"{kept:,}",
        "of these with new INT4 codes": f"{len(layers) - kept:,}",
        "layers kept in BF16": f"{len(figures.dequantized):,}",
        "mean SQNR": _decibels(_mean(layers.values())),
        "worst SQNR": _decibels(_worst(layers.values())),
        "tensors before": human_bytes(figures.bytes_in),
        "tensors after": human_bytes(figures.bytes_out),
    }


def _kinds(layers: Mapping[str, LayerFigures], baseline: Mapping[str, LayerFigures]) -> str:
    """Render the layers by projection, shape and whether their codes are kept."""
    kinds: dict[tuple[str, str, str], list[str]] = {}
    for module, layer in layers.items():
        shape = f"{layer.out_features}×{layer.in_features}"
        key = (module.rpartition(".")[2], shape, "kept" if layer.codes_kept else "new")
        kinds.setdefault(key, []).append(module)
    rows = []
    for (projection, shape, codes), modules in kinds.items():
        found = [layers[module] for module in modules]
        before = [baseline[module] for module in modules if module in baseline]
        row = [
            markdown_code(projection),
            str(len(modules)),
            shape,
            codes,
            _number(_mean(found)),
            _number(_worst(found)),
        ]
        rows.append(row + ([_number(_worst(before))] if baseline else []))
    header = ["projection", "layers", "N×K", "codes", "mean dB", "worst dB", *(["worst before"] if baseline else [])]
    return markdown_table(header, rows, "lrrl" + "r" * (len(header) - 4))


def _mean(layers: Any) -> float | None:
    finite = [layer.sqnr_db for layer in layers if layer.sqnr_db is not None]
    return fmean(finite) if finite else None


def _worst(layers: Any) -> float | None:
    return min((layer.sqnr_db for layer in layers if layer.sqnr_db is not None), default=None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _decibels(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} dB"
