"""A report as one HTML file that needs nothing else: tables, and the pictures embedded."""

import base64
from collections.abc import Mapping
from datetime import UTC, datetime
from statistics import fmean

from convert_w4a8.fp8 import CODE_MAX, E4M3_MAX
from convert_w4a8.report.collect import Report, aggregate, mean, short_kinds, worst
from convert_w4a8.report.layers import LABELS, SCHEMES, LayerReport
from convert_w4a8.report.memory import KV_BYTES
from convert_w4a8.report.page import document, escape, note, table
from convert_w4a8.text import human_bytes
from convert_w4a8.verification.layers import MIN_SQNR_DB_KEPT
from convert_w4a8.version import __version__

_WORST = 10
_SHORT = {"naive": "naive", "reference": "reference", "output": "this checkpoint"}
_LAYER_HEADER = ("SQNR in dB of layer", "N × K", "codes", *_SHORT.values())


def render(report: Report, pictures: Mapping[str, bytes], made: datetime | None = None) -> str:
    """Return the HTML document; `pictures` are PNGs by name, as `pictures.draw` makes them. made: now, if not given."""
    sections = [
        f"<h1>{escape(report.name)}</h1>",
        f'<p class="lead">{escape(_lead(report))}</p>',
        note(_origin(report, made or datetime.now(UTC))),
        *(note(f"Warning: {warning}") for warning in report.warnings),
        _summary(report),
        "<h2>SQNR by layer</h2>",
        _figure(pictures["sqnr"], "SQNR of every layer, by projection and block", _sqnr_caption(report)),
        f"<h2>The {min(_WORST, len(report.layers))} layers with the least SQNR</h2>",
        _worst_layers(report),
        "<h2>Group scales</h2>",
        _figure(pictures["scales"], "Distribution of group scales", _scales_caption(report)),
        "<h2>INT4 × scale</h2>",
        _figure(pictures["products"], "Distribution of code times scale", _products_caption(report)),
        "<h2>Memory</h2>",
        _weights(report),
        _kv_cache(report),
        "<h2>All layers</h2>",
        _all_layers(report),
    ]
    return document(f"W4A8 report: {report.name}", "\n".join(sections))


def _origin(report: Report, made: datetime) -> str:
    tool = f", converted with {report.converted_with}" if report.converted_with else ""
    when = made.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"Source: {report.source_name}{tool}. Measured on {when} with w4a8-convert {__version__}."


def _figure(png: bytes, alt: str, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f'<figure><div class="scroll"><img alt="{escape(alt)}" src="data:image/png;base64,{data}"></div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _lead(report: Report) -> str:
    kept = sum(layer.codes_kept for layer in report.layers)
    new = len(report.layers) - kept
    parts = [f"{kept:,} with the source's INT4 codes"] if kept else []
    parts += [f"{new:,} with new INT4 codes (zero-points, activation order or small groups)"] if new else []
    parts += [f"{len(report.dequantized):,} more kept in BF16"] if report.dequantized else []
    scales = f", scales: {report.scales_mode}" if report.scales_mode else ""
    return (
        f"{report.source_format} to {report.target_format}{scales}."
        f" {len(report.layers):,} W4A8 layers: {', '.join(parts)}."
        f" {human_bytes(report.nbytes_in)} on disk became {human_bytes(report.nbytes_out)}."
    )


def _summary(report: Report) -> str:
    rows = [
        (LABELS[scheme], _db(mean(report, scheme)), _db(least.sqnr_db[scheme]), least.module)
        for scheme in SCHEMES
        for least in (worst(report, scheme),)
    ]
    clipped = report.distributions.clipped
    text = "No table entry clips." if not clipped else f"{clipped:,} table entries clip or are no numbers!"
    return table(("SQNR in dB", "mean", "least", "in layer"), rows, len(rows) - 1) + note(
        "SQNR: energy of the source's dequantized weights over that of the difference from what the tensor core"
        f" multiplies by. Every weight was counted, from the bytes of both checkpoints. {text}"
    )


def _sqnr_caption(report: Report) -> str:
    text = "Naive: group scales cast to FP8 as they are. Reference: vLLM's FP8 group scales with an FP32 channel scale."
    if any(not layer.codes_kept for layer in report.layers):
        text += (
            " Where codes are new, these two start from round to nearest of the source"
            " (groups of 128, scale = amax/7.5, nearest code), and the SQNR contains the loss of the new codes."
        )
    if any(layer.codes_kept for layer in report.layers):
        text += (
            f" Under the line at {MIN_SQNR_DB_KEPT:.0f} dB, `w4a8 verify` takes a layer with kept codes to be wrong."
        )
    if len(aggregate(report.layers)) < len(report.layers):
        text += " Lines are the mean of a block's experts; the shade reaches down to the least of them."
    return text


def _worst_layers(report: Report) -> str:
    layers = sorted(report.layers, key=lambda layer: layer.sqnr_db["output"])[:_WORST]
    return table(_LAYER_HEADER, [_layer_row(layer) for layer in layers])


def _layer_row(layer: LayerReport) -> tuple[str, ...]:
    shape = f"{layer.out_features} × {layer.in_features}"
    codes = "kept" if layer.codes_kept else "new"
    return (layer.module, shape, codes, *(_db(layer.sqnr_db[scheme]) for scheme in SCHEMES))


def _scales_caption(report: Report) -> str:
    source, naive, output = (
        fmean(layer.distinct[name] for layer in report.layers) for name in ("source", "naive", "output")
    )
    zeros = int(report.distributions.fp8["naive"][0]) / int(report.distributions.fp8["naive"].sum())
    text = (
        f"A layer has {source:,.0f} distinct group scales on average. A naive cast leaves {naive:,.0f} of them, because"
        " FP8 has few values among small numbers: below 1/64 only the multiples of 1/512"
    )
    text += f"; {100 * zeros:.2g}% become 0." if zeros else "."
    text += f" A channel scale moves them to where FP8 is finest, and leaves {output:,.0f} effective scales."
    if report.stored_tables:
        text += (
            " This checkpoint stores tables; the scale shown for each is the nearest to its entries by squared error."
        )
    return text


def _products_caption(report: Report) -> str:
    products = report.distributions.products
    without, within = (products.share_above(edge) for edge in (E4M3_MAX, CODE_MAX * E4M3_MAX))
    text = (
        "What a table entry would be before it is rounded to FP8, with the channel's largest scale at 448, FP8's"
        f" largest number. As it is, {100 * without:.3g}% of all weights would be cut off there; with an eighth of the"
        f" scale {100 * within:.3g}%. The code 0, {100 * products.zeros / products.total:.3g}% of the weights, is"
        " counted, but has no place on a logarithmic axis."
    )
    if any(not layer.codes_kept for layer in report.layers):
        text += " Layers with new codes are shown as round to nearest (scale = amax/7.5) has them."
    return text


def _weights(report: Report) -> str:
    w = report.weights
    rows = [
        (
            name,
            human_bytes(size),
            f"{size / w.bf16:.0%}",
            human_bytes(size - w.rest),
            f"{8 * (size - w.rest) / w.quantized_weights:.2f}",
        )
        for name, size in (("BF16", w.bf16), ("INT8", w.int8), ("INT4 (this checkpoint, served)", w.int4))
    ]
    header = ("weights", "all", "of BF16", "of the W4A8 layers", "bits a weight there")
    return table(header, rows, 2) + note(
        f"Every figure contains {human_bytes(w.rest)} of embeddings, norms and whatever else is not quantized."
        " INT8 has an FP32 scale an output channel. INT4 has that too, and for every group of 128 the kernel's table of"
        " 8 FP8 entries."
    )


def _kv_cache(report: Report) -> str:
    kv = report.kv
    if kv.unknown is not None:
        return note(f"KV cache: not known. {kv.unknown}.")
    header = ("KV cache of one sequence", "a token", *(f"{length:,} tokens" for length in kv.per_sequence))
    rows = [
        (name, human_bytes(size * kv.per_token), *(human_bytes(size * values) for values in kv.per_sequence.values()))
        for name, size in KV_BYTES.items()
    ]
    return table(header, rows) + note(f"From config.json: {kv.note}.")


def _all_layers(report: Report) -> str:
    kinds = short_kinds(report.layers)
    order = list(kinds)
    spots = aggregate(report.layers)
    if len(spots) == len(report.layers):
        rendered = table(_LAYER_HEADER, [_layer_row(layer) for layer in report.layers])
    else:
        columns = (column for name in _SHORT.values() for column in (f"{name}, mean", "least"))
        rows = [
            (
                f"{kinds[s.kind]}, block {s.block}",
                f"{s.count:,}",
                *(_db(x) for scheme in SCHEMES for x in (s.mean[scheme], s.least[scheme])),
            )
            for s in sorted(spots, key=lambda s: (s.block, order.index(s.kind)))
        ]
        rendered = table(("SQNR in dB of layers", "count", *columns), rows)
    return f"<details><summary>{len(spots):,} rows</summary>\n{rendered}\n</details>"


def _db(value: float) -> str:
    return f"{value:.2f}"
