"""Why nothing is shipped, whatever the scores are: what they say nothing of, and what speaks against the candidate."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from convert_w4a8.evaluation.answer import SIDES, Side
from convert_w4a8.evaluation.client import endpoint_url
from convert_w4a8.evaluation.logs import Logs
from convert_w4a8.evaluation.paired import CONFIDENCE, mcnemar
from convert_w4a8.evaluation.run import Plan
from convert_w4a8.evaluation.servers import is_url
from convert_w4a8.evaluation.verdict import Pair
from convert_w4a8.text import counted, printable


def found(plan: Plan, models: Mapping[Side, str], pairs: Sequence[Pair], *, by_scores: bool) -> list[str]:
    """Return them in words. models: as the servers name them. by_scores: whether scores alone decide."""
    return [*_lost_in_production(plan.logs), *(_tags(plan, pairs) if by_scores else ()), *_itself(plan, models)]


def unscored(plan: Plan, pairs: Sequence[Pair]) -> list[str]:
    """Say how many prompts the quality says nothing of, where it says something of others."""
    without = len({prompt.id for prompt in plan.prompts if not prompt.checks} - {pair.prompt for pair in pairs})
    if not without or not pairs:
        return []
    return [f"quality: {without} of {counted(len(plan.prompts), 'prompt')} have no checks, reference or rating"]


def _tags(plan: Plan, pairs: Sequence[Pair]) -> list[str]:
    """Return why nothing is shipped, where scores say something of other prompts, but nothing of a tag."""
    scored = {tag for pair in pairs for tag in pair.tags}
    without = Counter(tag for prompt in plan.prompts if not prompt.checks for tag in prompt.tags if tag not in scored)
    return [
        f"tag {printable(tag)}: none of {counted(number, 'prompt')} has checks, a reference or a rating"
        for tag, number in sorted(without.items())
        if pairs
    ]


def _itself(plan: Plan, models: Mapping[Side, str]) -> list[str]:
    """Return why nothing is shipped, where the candidate is the baseline."""
    if plan.logs is not None and plan.logs.answers:
        return []
    baseline, candidate = (
        (endpoint_url(plan.places[side]), models[side])
        if is_url(plan.places[side])
        else (str(Path(plan.places[side]).resolve()), plan.models[side])
        for side in SIDES
    )
    if baseline != candidate:
        return []
    return ["baseline and candidate are the same server and model: this compares it with itself"]


def _lost_in_production(logs: Logs | None) -> list[str]:
    """Return why nothing is shipped, where the candidate failed more logged requests than chance explains."""
    if logs is None or logs.lost <= logs.won or mcnemar(logs.lost, logs.won) > 1 - CONFIDENCE:
        return []
    return [f"in production the candidate failed {counted(logs.lost, 'request')} that the baseline answered"]
