"""What an evaluation found: quality, agreement, speed and room, from the answers."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from convert_w4a8.evaluation import divergence, reservations, verdict
from convert_w4a8.evaluation.answer import SIDES, Answer, Side
from convert_w4a8.evaluation.checks import Score, score
from convert_w4a8.evaluation.logs import Production
from convert_w4a8.evaluation.memory import predict
from convert_w4a8.evaluation.prompts import Prompt
from convert_w4a8.evaluation.ratings import Rating
from convert_w4a8.evaluation.run import Plan, baseline_answers
from convert_w4a8.evaluation.store import Store
from convert_w4a8.evaluation.verdict import Pair, Tolerance, Verdict
from convert_w4a8.text import counted

SHARES = (50, 90, 99)


@dataclass(frozen=True)
class Compared:
    """One prompt's answers of one sample on both sides, with the scores that each check gave them.

    difference: the first character at which the answers differ; None where they are identical.
    """

    prompt: Prompt
    sample: int
    answers: Mapping[Side, Answer]
    scores: Mapping[Side, tuple[Score, ...]]
    difference: int | None


@dataclass(frozen=True)
class Measure:
    """A quantity of one side. values: of each answer. percentiles: median, p90, p99: what that share does not exceed.

    Of rates (tokens/s), what that share reaches at least.
    """

    values: tuple[float, ...]
    percentiles: tuple[float, float, float] | None


@dataclass(frozen=True)
class Evaluation:
    """All of it. speed: "ttft" and "tpot" in seconds and "rate" in tokens per second, by side.

    models: as the servers name them. agreement: share of identical answers. room: as `metrics.as_dict` gives it.
    predicted: as `memory.predict` does. missing: what was left out and why. rated: how many ratings are in the verdict.
    production: how logged requests went, by side; empty without logs. length: "tokens" of an answer by side, as speed.
    """

    places: Mapping[Side, str]
    models: Mapping[Side, str]
    verdict: Verdict
    compared: tuple[Compared, ...]
    failures: tuple[Answer, ...]
    speed: Mapping[str, Mapping[Side, Measure]]
    agreement: float | None
    losses: tuple[divergence.TokenLoss, ...]
    room: Mapping[Side, Mapping[str, Any]]
    predicted: Mapping[Side, Mapping[str, Any]]
    missing: tuple[str, ...]
    tags: Mapping[str, tuple[str, ...]]
    rated: int
    digest: str
    length: Mapping[Side, Measure]
    cut_off: Mapping[Side, float | None]
    production: Mapping[Side, Production]


def collect(
    plan: Plan, store: Store, tolerance: Tolerance, ratings: Mapping[tuple[str, int], Rating], digest: str
) -> Evaluation:
    """Score, compare and decide. digest: of the answers."""
    compared, unanswered = [], []
    for prompt, sample in plan.jobs:
        answers = {side: store.answers.get((side, prompt.id, sample)) for side in SIDES}
        whole = {side: answer for side, answer in answers.items() if answer is not None and answer.failure is None}
        if len(whole) < len(SIDES):
            unanswered += [side for side in SIDES if side not in whole]
            continue
        scores = {side: _scores(prompt, whole, side) for side in SIDES}
        difference = first_difference(whole["baseline"].shown, whole["candidate"].shown)
        compared.append(Compared(prompt, sample, whole, scores, difference))
    total = len(plan.jobs)
    recorded = plan.logs is not None and bool(plan.logs.answers)
    remedy = "as the logs say" if recorded else "--resume asks again"
    notes = [
        f"{unanswered.count(side)} of {total} answers of the {side} are missing: {remedy}"
        for side in SIDES
        if side in unanswered
    ]
    unrated = sum(
        one.difference is not None and not one.prompt.own and (one.prompt.id, one.sample) not in ratings
        for one in compared
    )
    if ratings and unrated:
        notes.append(f"{counted(unrated, 'pair')} of answers that differ, without checks: not rated")
    pairs = _pairs(compared, ratings)
    models = {side: str(store.noted.get(f"model {side}", "")) for side in SIDES}
    notes += reservations.found(plan, models, pairs, by_scores=tolerance.divergence is None)
    read = baseline_answers(store)
    losses = tuple(divergence.losses(read, store.noted))
    unscored = divergence.unscored(read, store.noted)
    if tolerance.divergence is not None and losses and unscored:
        notes.append(
            f"divergence: {unscored} of {counted(len(read), 'answer')} could not be scored: --resume tries again"
        )
    speed = _speed(store)
    room = {side: store.noted[f"room {side}"] for side in SIDES if f"room {side}" in store.noted}
    return Evaluation(
        places=plan.places,
        models=models,
        verdict=verdict.decide(pairs, tolerance, notes, [(loss.kl, loss.tokens) for loss in losses]),
        compared=tuple(compared),
        failures=tuple(answer for answer in store.answers.values() if answer.failure),
        speed=speed,
        agreement=fmean(one.difference is None for one in compared) if compared else None,
        losses=losses,
        room=room,
        predicted={} if recorded else {s: found for s in SIDES if (found := predict(plan.places[s])) is not None},
        missing=(*(plan.logs.notes if plan.logs else ()), *reservations.unscored(plan, pairs), *_missing(store, room)),
        tags={prompt.id: prompt.tags for prompt in plan.prompts},
        rated=len(ratings),
        digest=digest,
        length={side: measure([a.tokens for a in _whole(store, side)]) for side in SIDES},
        cut_off={side: _cut_off(_whole(store, side)) for side in SIDES},
        production=plan.logs.production if plan.logs else {},
    )


def _scores(prompt: Prompt, answers: Mapping[Side, Answer], side: Side) -> tuple[Score, ...]:
    """Return what the checks give an answer. The candidate's without calls, where the baseline calls, fails requests'.

    The other way round nothing is won: that the candidate calls a tool is no sign that the baseline should have.
    """
    answer = answers[side]
    without = not answer.calls and bool(answers["baseline"].calls)
    return tuple(
        Score(check.type, 0.0, False, "calls no tool, as the baseline does")
        if check.derived and check.type == "valid_calls" and without
        else score(check, answer.text, answer.calls)
        for check in prompt.checks
    )


def first_difference(before: str, after: str) -> int | None:
    """Return the index of the first character in which two texts differ; None where they are the same."""
    if before == after:
        return None
    return next(
        (n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )


def losses_by_tag(evaluation: Evaluation) -> dict[str, tuple[float, float]]:
    """Return surprise and divergence of each tag, means over tokens in nats; of all prompts under the empty name."""
    groups: dict[str, list[divergence.TokenLoss]] = {}
    for loss in evaluation.losses:
        for tag in (verdict.ALL, *evaluation.tags[loss.prompt]):
            groups.setdefault(tag, []).append(loss)
    return {tag: (_mean(found, "surprise"), _mean(found, "kl")) for tag, found in sorted(groups.items())}


def drops(evaluation: Evaluation) -> dict[str, Any]:
    """Return what each tag lost, for `--drop-by-tag`: divergence where it was measured, else the loss of the score."""
    if evaluation.losses:
        found = {tag: kl for tag, (_, kl) in losses_by_tag(evaluation).items() if tag}
        return {"drops": found, "unit": "KL nats per token"}
    found = {group.name: max(0.0, -group.bounds.mean) for group in evaluation.verdict.groups if group.name}
    return {"drops": found, "unit": "score"}


def _mean(found: Sequence[divergence.TokenLoss], name: str) -> float:
    return math.fsum(loss.tokens * getattr(loss, name) for loss in found) / sum(loss.tokens for loss in found)


def _pairs(compared: Sequence[Compared], ratings: Mapping[tuple[str, int], Rating]) -> list[Pair]:
    """Return a pair for each prompt that is scored: means over checks, a rating among them, and over samples."""
    by_prompt: dict[str, list[tuple[Prompt, list[float], list[float], bool, bool]]] = {}
    for one in compared:
        values = {side: [found.value for found in one.scores[side]] for side in SIDES}
        graded = any(found.graded for side in SIDES for found in one.scores[side])
        rating = ratings.get((one.prompt.id, one.sample))
        if rating is not None:
            values["baseline"].append(rating.baseline)
            values["candidate"].append(rating.candidate)
        elif ratings and one.difference is None and not one.prompt.own:  # the same answer is as good
            values["baseline"].append(1.0)
            values["candidate"].append(1.0)
        if values["baseline"]:
            own = one.prompt.own or len(values["baseline"]) > len(one.prompt.checks)
            entry = (one.prompt, values["baseline"], values["candidate"], graded, own)
            by_prompt.setdefault(one.prompt.id, []).append(entry)
    pairs = []
    for name, entries in by_prompt.items():
        before = fmean(fmean(entry[1]) for entry in entries)
        after = fmean(fmean(entry[2]) for entry in entries)
        passed = None
        if len(entries) == 1 and not entries[0][3]:
            passed = (all(entries[0][1]), all(entries[0][2]))
        pairs.append(Pair(name, entries[0][0].tags, before, after, passed, all(entry[4] for entry in entries)))
    return pairs


def _whole(store: Store, side: Side) -> list[Answer]:
    return [answer for answer in store.answers.values() if answer.side == side and answer.failure is None]


def _speed(store: Store) -> dict[str, dict[Side, Measure]]:
    of: dict[str, Callable[[Answer], float | None]] = {
        "ttft": lambda answer: answer.first_token,
        "tpot": lambda answer: answer.time_per_token,
        "rate": lambda answer: answer.tokens_per_second,
    }
    return {
        name: {side: measure(map(take, _whole(store, side)), descending=name == "rate") for side in SIDES}
        for name, take in of.items()
    }


def measure(values: Iterable[float | None], *, descending: bool = False) -> Measure:
    """Return what values amount to, those that are None left out. descending: of rates."""
    known = [value for value in values if value is not None]
    return Measure(tuple(known), _percentiles(known, descending=descending))


def _cut_off(answers: Sequence[Answer]) -> float | None:
    """Return the share of answers that ended because of max_tokens."""
    return fmean(answer.finish == "length" for answer in answers) if answers else None


def _percentiles(values: Sequence[float], *, descending: bool) -> tuple[float, float, float] | None:
    if not values:
        return None
    shares = [100 - share for share in SHARES] if descending else SHARES
    median, most, nearly_all = map(float, np.percentile(values, shares))
    return median, most, nearly_all


def _missing(store: Store, room: Mapping[Side, Mapping[str, Any]]) -> list[str]:
    lines = divergence.refusals(store.noted)
    for side in SIDES:
        lines += [f"{side}: {line}" for line in room.get(side, {}).get("missing", ())]
        whole = _whole(store, side)
        uncounted = sum(answer.tokens is None for answer in whole)
        if uncounted:
            lines.append(f"{side}: {uncounted} of {len(whole)} answers came without usage; they have no time per token")
    return lines
