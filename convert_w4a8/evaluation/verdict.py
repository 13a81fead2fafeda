"""The verdict: whether the candidate may take the baseline's place.

*ship*: the lower bound of the quality difference is above -tolerance, over all prompts and for every tag.
*do not ship*: the upper bound is below -tolerance, over all or for a tag, and, where checks are passed or failed, the
exact McNemar test finds more losses than wins. *cannot tell*: everything else. That every bound must hold for *ship*
needs no correction for their number. For *do not ship* one is enough, so the level of 5 % is divided (Bonferroni): half
of it for all prompts, the other half shared by the tags; all of it for all prompts where there are no tags.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from convert_w4a8.evaluation.paired import CONFIDENCE, Bounds, bounds, mcnemar, more_prompts
from convert_w4a8.text import counted, printable

Decision = Literal["ship", "do not ship", "cannot tell"]
EXIT_CODES: Mapping[Decision, int] = {"ship": 0, "do not ship": 3, "cannot tell": 4}
ALL = ""
"""The name of the group of all prompts, which no tag has."""


@dataclass(frozen=True)
class Pair:
    """The scores of one prompt on both sides, from 0 to 1. passed: whether each passed; None where it is graded."""

    prompt: str
    tags: tuple[str, ...]
    baseline: float
    candidate: float
    passed: tuple[bool, bool] | None


@dataclass(frozen=True)
class Tolerance:
    """How much may be lost, as a share of 1: over all prompts, for a tag, and for tags that are named."""

    overall: float
    tag: float
    by_tag: Mapping[str, float]

    def of(self, name: str) -> float:
        """Return that of a group."""
        return self.overall if name == ALL else self.by_tag.get(name, self.tag)


@dataclass(frozen=True)
class Group:
    """The prompts of a tag, or all. losses, wins: prompts that only one side passed; p: exact McNemar's, or None.

    more: how many more prompts would decide, where they would; None where it is decided, or no number would do.
    """

    name: str
    prompts: int
    baseline: float
    candidate: float
    bounds: Bounds
    tolerance: float
    losses: int
    wins: int
    p: float | None
    decision: Decision
    more: int | None


@dataclass(frozen=True)
class Verdict:
    """What may be done, why in words, and the groups that it follows from: all prompts first, then the tags."""

    decision: Decision
    reasons: tuple[str, ...]
    groups: tuple[Group, ...]


def decide(pairs: Sequence[Pair], tolerance: Tolerance, unanswered: Sequence[str] = ()) -> Verdict:
    """Return the verdict. unanswered: what has no answer, in words; with it, nothing is shipped."""
    if not pairs:
        reason = "no prompt has checks, a reference or a rating: give some, or rate the answers in the page of --out"
        return Verdict("cannot tell", tuple(unanswered) or (reason,), ())
    tags = sorted({tag for pair in pairs for tag in pair.tags})
    members = {ALL: list(pairs)} | {tag: [pair for pair in pairs if tag in pair.tags] for tag in tags}
    level = (1 - CONFIDENCE) / (2 if tags else 1)
    groups = tuple(
        _group(name, found, tolerance.of(name), level / (len(tags) if name else 1)) for name, found in members.items()
    )
    bad = [group for group in groups if group.decision == "do not ship"]
    if bad:
        return Verdict("do not ship", tuple(map(_loss, bad)), groups)
    open_groups = [group for group in groups if group.decision == "cannot tell"]
    if open_groups or unanswered:
        return Verdict("cannot tell", (*unanswered, *map(_open, open_groups)), groups)
    least = min(groups, key=lambda group: group.bounds.lower + group.tolerance)
    reason = f"{_name(least)}: at most {_points(-least.bounds.lower)} lost, {_points(least.tolerance)} may be"
    return Verdict("ship", (reason,), groups)


def _group(name: str, pairs: Sequence[Pair], tolerance: float, level: float) -> Group:
    """Return a group. level: the chance with which harm may be found where there is none."""
    differences = np.array([pair.candidate - pair.baseline for pair in pairs])
    passed = [pair.passed for pair in pairs if pair.passed is not None]
    losses = sum(before and not after for before, after in passed)
    wins = sum(after and not before for before, after in passed)
    found, p = bounds(differences), mcnemar(losses, wins)
    decision: Decision = "cannot tell"
    if found.lower > -tolerance:
        decision = "ship"
    elif bounds(differences, 1 - level).upper < -tolerance and (
        len(passed) < len(pairs) or (losses > wins and p / 2 <= level)
    ):
        decision = "do not ship"
    return Group(
        name,
        len(pairs),
        float(np.mean([pair.baseline for pair in pairs])),
        float(np.mean([pair.candidate for pair in pairs])),
        found,
        tolerance,
        losses,
        wins,
        p if passed else None,
        decision,
        more_prompts(differences, tolerance, 1 - level) if decision == "cannot tell" else None,
    )


def _name(group: Group) -> str:
    return f"tag {printable(group.name)}" if group.name else "all prompts"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _loss(group: Group) -> str:
    return f"{_name(group)}: at least {_points(-group.bounds.upper)} lost, {_points(group.tolerance)} may be"


def _open(group: Group) -> str:
    if group.more is not None:
        count = counted(group.more, "more prompt")
        what = f"about {count} would decide, if differences stay as they are"
    else:
        what = "no number of prompts would decide: the loss is about what may be lost"
    return f"{_name(group)}: between {_signed(group.bounds.lower)} and {_signed(group.bounds.upper)} points; {what}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"


def as_dict(verdict: Verdict) -> dict[str, Any]:
    """Return a JSON-ready dict."""
    return {
        "decision": verdict.decision,
        "reasons": list(verdict.reasons),
        "confidence": CONFIDENCE,
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
