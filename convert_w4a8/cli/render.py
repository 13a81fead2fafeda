"""Plans, results and verifications as text for people and as JSON for programs."""

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from convert_w4a8.conversion.plan import LayerPlan, Plan, kinds
from convert_w4a8.conversion.result import Result
from convert_w4a8.text import counted, human_bytes, printable, table
from convert_w4a8.verification.layers import LayerCheck
from convert_w4a8.verification.proof import Verification

_LISTED = 6


def plan_text(plan: Plan) -> str:
    """Render a plan for people."""
    counts = kinds(plan)
    options = plan.options
    lines = [
        f"input      {plan.source.NAME}, {human_bytes(plan.nbytes_in)}",
        f"output     {plan.target.NAME}, {human_bytes(plan.nbytes_out)} in {counted(len(plan.shards), 'file')},"
        f" scales: {options.scales}",
        f"convert    {counted(counts['converted'], 'layer')}, {counts['experts']} of them of experts",
    ]
    lines += [
        f"codes      {counted(count, 'layer')}: {fate}" for fate, count in _tally(map(_codes, plan.converted)).items()
    ]
    lines += [
        f"to BF16    {counted(count, 'layer')}: {reason}"
        for reason, count in _tally(layer.dequantize for layer in plan.layers).items()
    ]
    halves = sum(tensor.info.dtype == "F16" for tensor in plan.tensors)
    lines.append(
        f"as it is   {counted(len(plan.tensors) - halves, 'tensor')} byte for byte,"
        f" {counted(halves, 'tensor')} from FP16 to BF16"
    )
    lines.append(f"16-bit     {_shortened(plan.ignore)} (not quantized in the source, or not served by the kernel)")
    lines.append(
        f"memory     {human_bytes(plan.serving_nbytes)} of weights when served;"
        f" free disk needed: {human_bytes(plan.disk_nbytes)}"
    )
    lines += [f"warning    {printable(warning)}" for warning in plan.warnings]
    return "\n".join(lines)


def plan_dict(plan: Plan) -> dict[str, Any]:
    """Return a plan for programs."""
    return {
        "source": plan.source.NAME,
        "target": plan.target.NAME,
        "scales": str(plan.options.scales),
        "layers": dict(kinds(plan)),
        "codes": _tally(map(_codes, plan.converted)),
        "dequantize": {layer.module: layer.dequantize for layer in plan.layers if layer.dequantize is not None},
        "copied_tensors": len(plan.tensors),
        "ignore": list(plan.ignore),
        "warnings": list(plan.warnings),
        "files": [shard.file_name for shard in plan.shards],
        "bytes_in": plan.nbytes_in,
        "bytes_out": plan.nbytes_out,
        "serving_bytes": plan.serving_nbytes,
        "disk_bytes": plan.disk_nbytes,
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


def result_dict(result: Result, out: Path) -> dict[str, Any]:
    """Return a finished conversion for programs."""
    return {
        "output": str(out),
        "plan": plan_dict(result.plan),
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
    lines += [f"added      {printable(name)}: in the output, but not in the source" for name in verification.added]
    lines += [f"problem    {problem}" for problem in verification.problems]
    lines.append("FAILED" if verification.problems else "OK: every tensor and side file of the source is accounted for")
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
        "problems": [problem.as_dict() for problem in verification.problems],
        "added_files": list(verification.added),
    }


def _worst(checks: Sequence[LayerCheck]) -> LayerCheck:
    return min(checks, key=lambda check: check.sqnr_db)


def _finite(value: float) -> float | None:
    """Return None for what JSON cannot hold: infinity (nothing was lost, or all), NaN."""
    return value if math.isfinite(value) else None


def _codes(layer: LayerPlan) -> str:
    """Say what becomes of a layer's codes, and why."""
    return str(layer.codes) if layer.why is None else f"{layer.codes} ({layer.why})"


def _tally(reasons: Iterable[str | None]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in reasons:
        if reason is not None:
            counts[reason] = counts.get(reason, 0) + 1
    return counts


def _shortened(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(printable, names[:_LISTED])) + more
