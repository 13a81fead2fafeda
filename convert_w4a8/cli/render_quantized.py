"""What `w4a8 quantize` prints: its plan and its result, as text for people and as JSON for programs."""

import shlex
from pathlib import Path
from statistics import fmean
from typing import Any

from convert_w4a8.calibration.options import QuantizeOptions
from convert_w4a8.calibration.prediction import Cost
from convert_w4a8.calibration.recipe import recipe
from convert_w4a8.checkpoint.directory import open_checkpoint
from convert_w4a8.checkpoint.files import CARD
from convert_w4a8.cli import render
from convert_w4a8.cli.render import verify_command
from convert_w4a8.conversion.model_card import table_row
from convert_w4a8.conversion.plan import Plan
from convert_w4a8.conversion.result import LayerResult, Result
from convert_w4a8.errors import W4A8Error
from convert_w4a8.samples.sample import SampleSet
from convert_w4a8.text import counted, human_bytes, human_seconds, printable

__all__ = ["plan_dict", "plan_text", "result_dict", "result_text", "same_recipe", "verify_command"]


def plan_text(plan: Plan, options: QuantizeOptions, samples: SampleSet | None, cost: Cost) -> str:
    """Render a plan for people."""
    lines = [render.plan_text(plan)]
    if not options.is_w4a16:
        lines.append(f"tables     {options.tables}")
    if samples is None:
        lines.append("data       none: codes and tables from the weights alone")
    else:
        lines.append(
            f"data       {counted(len(samples.samples), 'sample')}, {samples.tokens:,} tokens, of which"
            f" {samples.kept:,} count; preset {options.preset}"
        )
    lines.append(
        f"predicted  {human_seconds(cost.seconds)}{'' if cost.gpu_memory is None else ' on an H100'},"
        f" {human_bytes(cost.memory)} of memory"
        + ("" if cost.gpu_memory is None else f", {human_bytes(cost.gpu_memory)} of the GPU's")
        + (f", {human_bytes(cost.disk)} of hidden states on the disk" if cost.disk else "")
    )
    return "\n".join(lines)


def plan_dict(plan: Plan, options: QuantizeOptions, samples: SampleSet | None, cost: Cost) -> dict[str, Any]:
    """Return a plan for programs."""
    return {
        **render.plan_dict(plan),
        "tables": str(options.tables),
        "preset": None if samples is None else str(options.preset),
        "data": None if samples is None else samples.as_dict(),
        "predicted_seconds": cost.seconds,
        "predicted_memory_bytes": cost.memory,
        "predicted_gpu_memory_bytes": cost.gpu_memory,
        "predicted_states_bytes": cost.disk,
    }


def same_recipe(out: Path, options: QuantizeOptions, samples: SampleSet | None) -> bool:
    """Whether the output at `out` says that it was made by these options from these samples."""
    try:
        said = open_checkpoint(out).quantization_config.get("conversion")
    except W4A8Error:
        return False
    wanted = recipe(options, samples)
    if isinstance(said, dict):
        return all(_agrees(said.get(key), value) for key, value in wanted.record.items())
    try:  # compressed-tensors has no place for it in its settings
        card = (out / CARD).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return wanted.sentence in card and all(table_row(*row) in card for row in wanted.rows)


def _agrees(said: Any, wanted: Any) -> bool:
    """Whether a record is the wanted one.

    Older ones do not say whether inputs were scaled, which follows from the rest.
    """
    if isinstance(said, dict) and isinstance(wanted, dict):
        return {"awq_scaling": wanted.get("awq_scaling"), **said} == wanted
    return bool(said == wanted)


def result_text(result: Result, source: str, out: Path) -> str:
    """Render a finished quantization for people; `source` is the model as they named it."""
    plan = result.plan
    lines = [
        f"quantized  {counted(len(result.converted), 'layer')}, {human_bytes(plan.nbytes_in)} →"
        f" {human_bytes(plan.nbytes_out)} in {human_seconds(result.seconds)}",
    ]
    lines += [f"warning    {printable(warning)}" for warning in result.warnings]
    if result.converted:
        worst, stats = min(result.converted, key=lambda pair: pair[1].sqnr_db)
        mean = fmean(stats.sqnr_db for _, stats in result.converted)
        lines.append(
            f"weights    SQNR against the model's: mean {mean:.1f} dB, worst {stats.sqnr_db:.1f} dB"
            f" ({printable(worst.module)})"
        )
    outputs = [(layer, float(layer.notes["output_sqnr_db"])) for layer in result.layers if _has_outputs(layer)]
    if outputs:
        least, worst_db = min(outputs, key=lambda pair: pair[1])
        lines.append(
            f"outputs    SQNR on the calibration data: mean {fmean(db for _, db in outputs):.1f} dB,"
            f" worst {worst_db:.1f} dB ({printable(least.plan.module)})"
        )
    lines += _scaling_lines(result)
    unseen = [layer for layer in result.layers if layer.notes.get("tokens") == 0]
    if unseen:
        lines.append(
            f"warning    {counted(len(unseen), 'layer')} that the model never called were quantized without data"
            f" ({printable(unseen[0].plan.module)})"
        )
    routed = [layer for layer in result.layers if "routed_tokens" in layer.notes]
    if routed:
        few = [layer for layer in routed if layer.notes["routed_tokens"] < layer.notes["tokens"]]
        counts = sorted(layer.notes["routed_tokens"] for layer in routed)
        lines.append(
            f"experts    {counted(len(routed), 'layer')}: {len(few)} with fewer tokens than inputs, which borrowed"
            f" others; {counts.count(0)} without any; {counts[0]:,} to {counts[-1]:,} tokens were routed to one,"
            f" {counts[len(counts) // 2]:,} or more to half of them"
        )
    lines.append(f"verify     {verify_command(out, source)}")
    lines.append(f"serve      {plan.target.serve_command(shlex.quote(str(out)))}")
    return "\n".join(lines)


def _scaling_lines(result: Result) -> list[str]:
    """Say which layers had their input channels scaled, and where nothing takes the other part of a scale."""
    known = [layer for layer in result.layers if "awq_exponent" in layer.notes]
    if not known:
        return []
    exponents = [layer.notes["awq_exponent"] for layer in known]
    scaled = [exponent for exponent in exponents if exponent]
    of = f", AWQ's exponent {min(scaled):g} to {max(scaled):g}" if scaled else ""
    line = f"scaling    inputs of {counted(len(scaled), 'layer')} by powers of two{of};"
    alone = [layer.plan.module for layer in known if layer.notes["awq_exponent"] is None]
    line += f" of {exponents.count(0.0)} it would not help"
    if alone:
        line += f", {len(alone)} left alone, where nothing is known that takes the other part ({printable(alone[0])})"
    return [line]


def _has_outputs(layer: LayerResult) -> bool:
    return layer.notes.get("output_sqnr_db") is not None


def result_dict(
    result: Result, out: Path, options: QuantizeOptions, samples: SampleSet | None, cost: Cost
) -> dict[str, Any]:
    """Return a finished quantization for programs."""
    return {
        "output": str(out),
        "plan": plan_dict(result.plan, options, samples, cost),
        "warnings": list(result.warnings),
        "seconds": result.seconds,
        "layers": [
            {
                "module": layer.plan.module,
                "out_features": layer.plan.spec.out_features,
                "in_features": layer.plan.spec.in_features,
                "weight_sqnr_db": layer.stats.sqnr_db,
                "output_sqnr_db": layer.notes.get("output_sqnr_db"),
                "tokens": layer.notes.get("tokens"),
                "routed_tokens": layer.notes.get("routed_tokens"),
                "awq_exponent": layer.notes.get("awq_exponent"),
            }
            for layer in result.layers
            if layer.stats is not None
        ],
    }
