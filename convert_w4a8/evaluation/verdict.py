"""The verdict: whether the candidate may take the baseline's place.

*ship*: the lower bound of the quality difference is above -tolerance, over all prompts and for every tag, and the
baseline scores more than the tolerance there: else no candidate, however bad, could lose more than it may.
*do not ship*: the upper bound is below -tolerance, over all or for a tag, and, where checks are passed or failed, the
exact McNemar test finds more losses than wins. *cannot tell*: everything else. A divergence that is not to be exceeded
is judged by its bounds in the same way.

That every bound must hold for *ship* needs no correction for their number. Without a limit of the divergence it must
hold for the prompts alone that have checks of their own or a rating: the form that a logged request asks for (JSON,
calls of its tools) shows what is bad only. For *do not ship* one is enough, so the level of 5 % is divided (Bonferroni)
into equal parts: for all prompts, for the tags, which share theirs, and for the divergence, as far as there are any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from convert_w4a8.evaluation.answer import Side
from convert_w4a8.evaluation.paired import (
    CONFIDENCE,
    LEAST,
    Bounds,
    Differences,
    bounds,
    mcnemar,
    more_prompts,
    ratio_bounds,
)
from convert_w4a8.text import counted, printable

Decision = Literal["ship", "do not ship", "cannot tell"]
EXIT_CODES: Mapping[Decision, int] = {"ship": 0, "do not ship": 3, "cannot tell": 4}
ALL = ""
"""The name of the group of all prompts, which no tag has."""


@dataclass(frozen=True)
class Pair:
    """The scores of one prompt on both sides, from 0 to 1. passed: whether each passed; None where it is graded.

    own: whether a check, a rating or a reference says what a good answer is; False where only the form is checked that
    a logged request asks for.
    """

    prompt: str
    tags: tuple[str, ...]
    baseline: float
    candidate: float
    passed: tuple[bool, bool] | None
    own: bool = True


@dataclass(frozen=True)
class Tolerance:
    """How much may be lost, as a share of 1: over all prompts, for a tag, and for tags that are named.

    divergence: nats per token that the divergence on the baseline's own answers may be; None: it does not matter.
    """

    overall: float
    tag: float
    by_tag: Mapping[str, float]
    divergence: float | None = None

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

    @property
    def empty(self) -> bool:
        """Whether the baseline scores so little that nothing could show a loss."""
        return _empty(self.baseline, self.tolerance)


@dataclass(frozen=True)
class Drift:
    """The divergence on the baseline's own answers, in nats per token, and what it may be. bounds: None without any."""

    answers: int
    bounds: Bounds | None
    limit: float
    decision: Decision


@dataclass(frozen=True)
class Verdict:
    """What may be done, why in words, and what it follows from.

    groups: all prompts first, then the tags. drift: where a divergence is not to be exceeded.
    """

    decision: Decision
    reasons: tuple[str, ...]
    groups: tuple[Group, ...]
    drift: Drift | None = None


def decide(
    pairs: Sequence[Pair],
    tolerance: Tolerance,
    unanswered: Sequence[str] = (),
    losses: Sequence[tuple[float, int]] = (),
) -> Verdict:
    """Return the verdict.

    unanswered: what has no answer, in words; with it, nothing is shipped. losses: divergence and tokens of each of the
    baseline's answers.
    """
    limit = tolerance.divergence
    if not pairs and limit is None:
        reason = (
            "no prompt has checks, a reference or a rating: give some, rate the answers in the page of --out, or say"
        )
        return Verdict("cannot tell", tuple(unanswered) or (f"{reason} --max-divergence",), ())
    tags = sorted({tag for pair in pairs for tag in pair.tags})
    members = {ALL: list(pairs)} | {tag: [pair for pair in pairs if tag in pair.tags] for tag in tags} if pairs else {}
    level = (1 - CONFIDENCE) / ((2 if tags else 1) + (limit is not None and bool(pairs)))
    drift = None if limit is None else _drift(losses, limit, level)
    groups = tuple(
        _group(name, of_name, tolerance.of(name), level / (len(tags) if name else 1))
        for name, of_name in members.items()
    )
    if limit is None:
        unanswered = (*unanswered, *(line for group in groups for line in _unproven(group, members[group.name])))
    found: list[Group | Drift] = [*groups, *([] if drift is None else [drift])]
    bad = [one for one in found if one.decision == "do not ship"]
    if bad:
        return Verdict("do not ship", tuple(map(_loss, bad)), groups, drift)
    undecided = [one for one in found if one.decision == "cannot tell"]
    if undecided or unanswered:
        return Verdict("cannot tell", (*unanswered, *map(_open, undecided)), groups, drift)
    reasons = []
    if groups:
        least = min(groups, key=lambda group: group.bounds.lower + group.tolerance)
        reasons = [f"{_name(least)}: at most {_points(-least.bounds.lower)} lost, {_points(least.tolerance)} may be"]
    if drift is not None and drift.bounds is not None:
        reasons.append(
            f"divergence: at most {drift.bounds.upper:.4f} nats per token of what the likeliest tokens show,"
            f" {drift.limit:g} may be"
        )
    return Verdict("ship", tuple(reasons), groups, drift)


def _unproven(group: Group, pairs: Sequence[Pair]) -> list[str]:
    """Return why a group is not shipped although its bound would allow it: few of its prompts say what is good."""
    own = [pair for pair in pairs if pair.own]
    if group.decision != "ship" or len(own) == len(pairs):
        return []
    if own and not _empty(_mean(own, "baseline"), group.tolerance) and bounds(_gains(own)).lower > -group.tolerance:
        return []
    few = f"{len(own)} of {counted(len(pairs), 'prompt')} have checks of their own or a rating"
    return [
        f"{_name(group)}: only {few}; the form that requests ask for is not enough: give checks, rate the answers in"
        " the page of --out, or say --max-divergence"
    ]


def _drift(losses: Sequence[tuple[float, int]], limit: float, level: float) -> Drift:
    """Judge divergences. level: the chance with which harm may be found where there is none."""
    if not losses:
        return Drift(0, None, limit, "cannot tell")
    values, tokens = (np.array(column, dtype=np.float64) for column in zip(*losses, strict=True))
    found = ratio_bounds(values, tokens)
    decision: Decision = "cannot tell"
    if found.upper < limit:
        decision = "ship"
    elif ratio_bounds(values, tokens, 1 - level).lower > limit:
        decision = "do not ship"
    return Drift(len(losses), found, limit, decision)


def _group(name: str, pairs: Sequence[Pair], tolerance: float, level: float) -> Group:
    """Return a group. level: the chance with which harm may be found where there is none."""
    differences, baseline = _gains(pairs), _mean(pairs, "baseline")
    passed = [pair.passed for pair in pairs if pair.passed is not None]
    losses = sum(before and not after for before, after in passed)
    wins = sum(after and not before for before, after in passed)
    found, p = bounds(differences), mcnemar(losses, wins)
    decision: Decision = "cannot tell"
    empty = _empty(baseline, tolerance)
    if found.lower > -tolerance and not empty:
        decision = "ship"
    elif bounds(differences, 1 - level).upper < -tolerance and (
        len(passed) < len(pairs) or (losses > wins and p / 2 <= level)
    ):
        decision = "do not ship"
    return Group(
        name,
        len(pairs),
        baseline,
        _mean(pairs, "candidate"),
        found,
        tolerance,
        losses,
        wins,
        p if passed else None,
        decision,
        more_prompts(differences, tolerance, 1 - level) if decision == "cannot tell" and not empty else None,
    )


def _empty(baseline: float, tolerance: float) -> bool:
    """Whether a candidate that fails everything would lose no more than it may. All may be lost: nobody asks that."""
    return baseline <= tolerance < 1


def _gains(pairs: Sequence[Pair]) -> Differences:
    return np.array([pair.candidate - pair.baseline for pair in pairs])


def _mean(pairs: Sequence[Pair], side: Side) -> float:
    return float(np.mean([getattr(pair, side) for pair in pairs]))


def _name(group: Group) -> str:
    return f"tag {printable(group.name)}" if group.name else "all prompts"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _loss(group: Group | Drift) -> str:
    if isinstance(group, Drift):
        least = group.bounds.lower if group.bounds else 0.0
        return f"divergence: at least {least:.4f} nats per token, {group.limit:g} may be"
    return f"{_name(group)}: at least {_points(-group.bounds.upper)} lost, {_points(group.tolerance)} may be"


def _open(group: Group | Drift) -> str:
    if isinstance(group, Drift):
        if group.bounds is None:
            return "divergence: no log-probabilities were to be had, so --max-divergence cannot be judged"
        if group.answers < LEAST:
            return f"divergence: {counted(group.answers, 'answer')} tell nothing; {LEAST} are needed"
        between = f"between {group.bounds.lower:.4f} and {group.bounds.upper:.4f} nats per token"
        return f"divergence: {between}, {group.limit:g} may be; more prompts would narrow that"
    if group.empty:
        few = f"the baseline scores {_points(group.baseline)}, and {_points(group.tolerance)} may be lost"
        return f"{_name(group)}: {few}, so nothing could show a loss; look at its answers, its checks and the tolerance"
    if group.more is not None:
        count = counted(group.more, "more prompt")
        what = f"about {count} would decide, if differences stay as they are"
    else:
        what = "no number of prompts would decide: the loss is about what may be lost"
    return f"{_name(group)}: between {_signed(group.bounds.lower)} and {_signed(group.bounds.upper)} points; {what}"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}"
