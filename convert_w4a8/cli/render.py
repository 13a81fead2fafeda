"""Plans, results and verifications as text for people and as JSON for programs."""

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from convert_w4a8.checkpoint.files import SAFETENSORS, LeftOut
from convert_w4a8.conversion.plan import LayerPlan, Plan, kinds
from convert_w4a8.conversion.prediction import Prediction
from convert_w4a8.conversion.result import Result
from convert_w4a8.errors import grouped
from convert_w4a8.text import LISTED, counted, human_bytes, printable, shortened, table
from convert_w4a8.verification.layers import LayerCheck
from convert_w4a8.verification.proof import Verification


def plan_text(plan: Plan, prediction: Prediction | None = None) -> str:
    """Render a plan for people. prediction: of the error of its layers with new codes, if there is one."""
    counts = kinds(plan)
    options = plan.options
    lines = [
        f"input      {plan.source.NAME}, {human_bytes(plan.nbytes_in)}",
        f"output     {plan.target.NAME}, {human_bytes(plan.nbytes_out)} in {counted(len(plan.shards), 'file')},"
        f" scales: {options.scales if plan.target.SCHEME == 'W4A8' else 'BF16, symmetric, by groups of 128'}",
        f"convert    {counted(counts['converted'], 'layer')}, {counts['experts']} of them of experts",
    ]
    lines += [
        f"codes      {counted(count, 'layer')}: {fate}" for fate, count in _tally(map(_codes, plan.converted)).items()
    ]
    if prediction is not None:
        worst = prediction.worst
        lines.append(
            f"predicted  new INT4 codes of {counted(prediction.layers, 'layer')}: mean SQNR"
            f" {prediction.mean_db:.1f} dB, worst {worst.worst_db:.1f} dB ({printable(worst.worst)}),"
            f" from a sample of {prediction.read}"
        )
    lines += [
        f"to BF16    {counted(kind.count, 'layer')}, {human_bytes(kind.nbytes)}: {kind.kind}"
        f" ({shortened(kind.names[:3], kind.count)})"
        for kind in plan.sixteen_bits
        if not kind.of_source
    ]
    lines += [
        f"carried    {counted(count, 'layer')}, byte for byte: {printable(kind)}"
        for kind, count in _tally(layer.kind for layer in plan.carried).items()
    ]
    halves = sum(tensor.output.dtype != tensor.info.dtype for tensor in plan.tensors)
    lines.append(
        f"as it is   {counted(len(plan.tensors) - halves, 'tensor')} byte for byte,"
        f" {counted(halves, 'tensor')} from FP16 to BF16"
    )
    if plan.side_files:
        weights = [str(path) for path in plan.side_files if path.name.endswith(SAFETENSORS)]
        among = f", weights among them: {shortened(weights)}" if weights else ""
        lines.append(f"files      {counted(len(plan.side_files), 'side file')} byte for byte{among}")
    lines += [
        f"16-bit     {counted(kind.count, 'tensor')}, {human_bytes(kind.nbytes)}: {kind.kind}"
        f" ({shortened(kind.names[:3], kind.count)})"
        for kind in plan.sixteen_bits
        if kind.of_source
    ]
    lines.append(f"ignore     {shortened(plan.ignore)}")
    lines.append(
        f"memory     {human_bytes(plan.serving_nbytes)} of weights when served;"
        f" free disk needed: {human_bytes(plan.disk_nbytes)}"
    )
    lines += [f"warning    {printable(warning)}" for warning in plan.warnings]
    return "\n".join(lines)


def plan_dict(plan: Plan, prediction: Prediction | None = None) -> dict[str, Any]:
    """Return a plan for programs. prediction: as for `plan_text`."""
    return {
        "source": plan.source.NAME,
        "target": plan.target.NAME,
        "scales": str(plan.options.scales),
        "layers": dict(kinds(plan)),
        "codes": _tally(map(_codes, plan.converted)),
        "predicted": None if prediction is None else _prediction_dict(prediction),
        "dequantize": {layer.module: layer.dequantize for layer in plan.layers if layer.dequantize is not None},
        "carried": _tally(layer.kind for layer in plan.carried),
        "copied_tensors": len(plan.tensors),
        "ignore": list(plan.ignore),
        "in_16_bits": [
            {
                "kind": kind.kind,
                "quantized_in_source": not kind.of_source,
                "count": kind.count,
                "bytes": kind.nbytes,
                "first": list(kind.names),
            }
            for kind in plan.sixteen_bits
        ],
        "warnings": list(plan.warnings),
        "files": [shard.file_name for shard in plan.shards],
        "side_files": list(map(str, plan.side_files)),
        "left_out_files": left_out_dict(plan.left_out),
        "bytes_in": plan.nbytes_in,
        "bytes_out": plan.nbytes_out,
        "serving_bytes": plan.serving_nbytes,
        "disk_bytes": plan.disk_nbytes,
    }


def left_out_dict(left_out: Iterable[LeftOut]) -> dict[str, str]:
    """Return file → why it is left out."""
    return {item.path: item.reason for item in left_out}


def _prediction_dict(prediction: Prediction) -> dict[str, Any]:
    return {
        "layers": prediction.layers,
        "layers_read": prediction.read,
        "mean_sqnr_db": _rounded(prediction.mean_db),
        "worst_sqnr_db": _rounded(prediction.worst.worst_db),
        "worst": prediction.worst.worst,
        "kinds": [
            {
                "kind": kind.kind,
                "layers": kind.layers,
                "layers_read": kind.read,
                "layers_read_with_new_codes": kind.new,
                "mean_sqnr_db": _rounded(kind.mean_db),
                "worst_sqnr_db": _rounded(kind.worst_db),
                "worst": kind.worst,
            }
            for kind in prediction.kinds
        ],
    }


def result_text(result: Result, source: str, out: Path) -> str:
    """Render a finished conversion for people; `source` is the input as they named it."""
    plan = result.plan
    new = [(layer, stats) for layer, stats in result.converted if not stats.codes_kept]
    rate = plan.nbytes_in / 1e6 / result.seconds
    lines = [
        f"converted  {counted(len(result.converted), 'layer')}, {human_bytes(plan.nbytes_in)} →"
        f" {human_bytes(plan.nbytes_out)} in {result.seconds:.1f} s ({rate:.0f} MB/s)",
    ]
    lines += [f"warning    {printable(warning)}" for warning in result.warnings]
    if new:
        worst, stats = min(new, key=lambda pair: pair[1].sqnr_db)
        mean = fmean(stats.sqnr_db for _, stats in new)
        lines.append(
            f"warning    {counted(len(new), 'layer')} got new INT4 codes: mean SQNR {mean:.1f} dB,"
            f" worst {stats.sqnr_db:.1f} dB ({printable(worst.module)})"
        )
    if result.converted:
        worst, stats = min(result.converted, key=lambda pair: pair[1].sqnr_db)
        lines.append(
            f"worst      {printable(worst.module)}: SQNR {stats.sqnr_db:.1f} dB against the source (estimated)"
        )
    lines.append(f"verify     {verify_command(out, source)}")
    lines.append(f"serve      {plan.target.serve_command(shlex.quote(str(out)))}")
    return "\n".join(lines)


def verify_command(out: Path, source: str) -> str:
    """Return the command that proves a conversion."""
    return shlex.join(["w4a8", "verify", str(out), "--source", source])


def result_dict(result: Result, out: Path, prediction: Prediction | None = None) -> dict[str, Any]:
    """Return a finished conversion for programs. prediction: what the plan said of its error."""
    return {
        "output": str(out),
        "plan": plan_dict(result.plan, prediction),
        "warnings": list(result.warnings),
        "seconds": result.seconds,
        "megabytes_per_second": result.plan.nbytes_in / 1e6 / result.seconds,
        "layers": [
            {
                "module": layer.module,
                "out_features": layer.spec.out_features,
                "in_features": layer.spec.in_features,
                "codes_kept": stats.codes_kept,
                "estimated_sqnr_db": _finite(stats.sqnr_db),
            }
            for layer, stats in result.converted
        ],
    }


def verification_text(verification: Verification) -> str:
    """Render a verification for people."""
    rows = [
        (
            check.module,
            f"{check.out_features}×{check.in_features}",
            "kept" if check.codes_kept else "new",
            f"{check.sqnr_db:.2f}",
            f"{check.worst_channel_db:.2f}",
            f"{check.max_error:.2e}",
            str(check.clipped),
            "-" if check.distinct_scales is None else str(check.distinct_scales),
        )
        for check in verification.layers
    ]
    lines = [table(rows, ("layer", "N×K", "codes", "SQNR dB", "worst channel", "max error", "clipped", "scales"))]
    if verification.layers:
        worst = _worst(verification.layers)
        mean = fmean(check.sqnr_db for check in verification.layers)
        lines.append(
            f"\n{counted(len(verification.layers), 'layer')}: mean {mean:.2f} dB,"
            f" worst {worst.sqnr_db:.2f} dB ({printable(worst.module)})"
        )
    if verification.carried:
        lines.append(f"carried    {counted(verification.carried, 'layer')}, byte for byte")
    if verification.copied_weights:
        lines.append(f"copied     {shortened(verification.copied_weights)}: weights beside those of the model")
    lines += [f"left out   {printable(str(item))}" for item in verification.left_out[:LISTED]]
    if len(verification.left_out) > LISTED:
        lines.append(f"left out   {len(verification.left_out) - LISTED} more; --json lists them all")
    lines += [f"added      {printable(name)}: in the output, but not in the source" for name in verification.added]
    lines += [f"problem    {group}" for group in grouped(verification.problems)]
    lines.append("FAILED" if verification.problems else "OK: every tensor and file of the source is accounted for")
    return "\n".join(lines)


def verification_dict(verification: Verification) -> dict[str, Any]:
    """Return a verification for programs."""
    return {
        "ok": not verification.problems,
        "target": verification.target,
        "layers": [
            {key: _finite(value) if isinstance(value, float) else value for key, value in asdict(check).items()}
            for check in verification.layers
        ],
        "carried_layers": verification.carried,
        "problems": [group.as_dict() for group in grouped(verification.problems)],
        "added_files": list(verification.added),
        "left_out_files": left_out_dict(verification.left_out),
        "copied_weights": list(verification.copied_weights),
    }


def _worst(checks: Sequence[LayerCheck]) -> LayerCheck:
    return min(checks, key=lambda check: check.sqnr_db)


def _finite(value: float) -> float | None:
    """Return None for what JSON cannot hold: infinity (nothing was lost, or all), NaN."""
    return value if math.isfinite(value) else None


def _rounded(value: float) -> float | None:
    """Round an SQNR to the digits that do not depend on the order in which threads add."""
    return _finite(round(value, 3))


def _codes(layer: LayerPlan) -> str:
    """Say what becomes of a layer's codes, and why."""
    return str(layer.codes) if layer.why is None else f"{layer.codes} ({layer.why})"


def _tally(reasons: Iterable[str | None]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons:
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return counts
