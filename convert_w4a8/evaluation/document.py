"""An evaluation as JSON, for programs."""

from typing import Any

from convert_w4a8.evaluation.answer import SIDES
from convert_w4a8.evaluation.paired import CONFIDENCE, LEAST
from convert_w4a8.evaluation.results import Evaluation, Measure, losses_by_tag, measure
from convert_w4a8.evaluation.verdict import ALL, Drift, Verdict


def as_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Return it for programs. Times are in seconds, rates in tokens per second."""
    differ = [one.difference for one in evaluation.compared if one.difference is not None]
    return {
        "baseline": evaluation.places["baseline"],
        "candidate": evaluation.places["candidate"],
        "models": dict(evaluation.models),
        "verdict": _verdict(evaluation.verdict),
        "ratings": evaluation.rated,
        "agreement": {
            "answers": len(evaluation.compared),
            "identical": evaluation.agreement,
            "median_first_difference": sorted(differ)[len(differ) // 2] if differ else None,
        },
        "divergence": _divergence(evaluation),
        "speed": {
            name: {side: _measured(measure) for side, measure in sides.items()}
            for name, sides in evaluation.speed.items()
        },
        "length": {side: _measured(evaluation.length[side]) | {"cut_off": evaluation.cut_off[side]} for side in SIDES},
        "production": {
            side: {"requests": found.requests, "failed": found.failed, "seconds": _measured(measure(found.seconds))}
            for side, found in evaluation.production.items()
        },
        "room": {side: dict(evaluation.room.get(side, {})) for side in SIDES},
        "predicted": {side: dict(evaluation.predicted.get(side, {})) for side in SIDES},
        "failures": [
            {"side": answer.side, "prompt": answer.prompt, "sample": answer.sample, "failure": answer.failure}
            for answer in evaluation.failures
        ],
        "missing": list(evaluation.missing),
        "prompts": [
            {
                "prompt": one.prompt.id,
                "sample": one.sample,
                "tags": list(one.prompt.tags),
                "first_difference": one.difference,
                "checks": [
                    {"type": before.type, "baseline": before.value, "candidate": after.value}
                    for before, after in zip(one.scores["baseline"], one.scores["candidate"], strict=True)
                ],
            }
            for one in evaluation.compared
        ],
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "decision": verdict.decision,
        "reasons": list(verdict.reasons),
        "confidence": CONFIDENCE,
        "divergence": None if verdict.drift is None else _drift(verdict.drift),
        "groups": [
            {
                "tag": group.name or None,
                "prompts": group.prompts,
                "baseline": group.baseline,
                "candidate": group.candidate,
                "difference": group.bounds.mean,
                "lower": group.bounds.lower,
                "upper": group.bounds.upper,
                "tolerance": group.tolerance,
                "losses": group.losses,
                "wins": group.wins,
                "mcnemar_p": group.p,
                "decision": group.decision,
                "more_prompts": group.more,
            }
            for group in verdict.groups
        ],
    }


def _drift(drift: Drift) -> dict[str, Any]:
    known = drift.bounds if drift.answers >= LEAST else None
    return {
        "answers": drift.answers,
        "lower": known.lower if known else None,
        "upper": known.upper if known else None,
        "limit": drift.limit,
        "decision": drift.decision,
    }


def _divergence(evaluation: Evaluation) -> dict[str, Any] | None:
    if not evaluation.losses:
        return None
    by_tag = losses_by_tag(evaluation)
    surprise, kl = by_tag.pop(ALL)
    return {
        "answers": len(evaluation.losses),
        "tokens": sum(loss.tokens for loss in evaluation.losses),
        "surprise": surprise,
        "kl": kl,
        "tags": [{"tag": tag, "surprise": found[0], "kl": found[1]} for tag, found in by_tag.items()],
    }


def _measured(measure: Measure) -> dict[str, Any]:
    median, p90, p99 = measure.percentiles or (None, None, None)
    return {"answers": len(measure.values), "median": median, "p90": p90, "p99": p99}
