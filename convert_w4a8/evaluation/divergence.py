"""Divergence on the baseline's own answers, token by token, where servers give `prompt_logprobs` (vLLM).

Both sides read the baseline's tokens (teacher-forced) and say how likely each next one is. What is compared for a
token: its surprise, the difference of -log p in nats; and a lower bound of the Kullback-Leibler divergence from the
baseline's distribution to the candidate's. Of each distribution the `TOP` most likely tokens are known. Those that both
sides name are kept apart; those that only the baseline names are one event, and all others are another: merging events
can only lessen a divergence (data processing inequality; Cover & Thomas, Elements of Information Theory, 2.8).
"""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert_w4a8.errors import ConvertError
from convert_w4a8.evaluation.answer import SIDES, Answer
from convert_w4a8.evaluation.client import Endpoint
from convert_w4a8.evaluation.store import Store

TOP = 20
"""Tokens of each distribution; the most that vLLM gives by default (`max_logprobs`)."""
_FAILED = "divergence left out"
_ROUNDING = 1e-5
"""What probabilities may sum to beside 1, of log-probabilities in float32."""
_TRIED = 2
"""Answers after which a server is known not to score any; one may be too long for it."""


@dataclass(frozen=True)
class TokenLoss:
    """Means over the tokens of one of the baseline's answers, in nats per token. kl: a lower bound."""

    prompt: str
    tokens: int
    surprise: float
    kl: float


def note_name(side: str, prompt: str) -> str:
    """Return the name under which a side's log-probabilities are kept."""
    return f"logprobs {side} {prompt}"


def refusal_name(side: str) -> str:
    """Return the name under which it is kept why a side has none."""
    return f"{_FAILED} {side}"


async def score_side(endpoint: Endpoint, answers: Sequence[Answer], store: Store, concurrency: int) -> None:
    """Have a server score the baseline's answers; why it cannot is kept too. answers: whole ones of the baseline."""
    limit = asyncio.Semaphore(concurrency)

    async def score(answer: Answer) -> str:
        name = note_name(endpoint.side, answer.prompt)
        if name in store.noted or not answer.token_ids:
            return ""
        prompt = list(answer.prompt_token_ids or ())
        async with limit:
            try:
                listed = await endpoint.score_tokens([*prompt, *answer.token_ids], TOP)
                store.note(name, _compact(listed[len(prompt) :], answer.token_ids))
            except (ConvertError, KeyError, TypeError, ValueError, AttributeError) as error:
                return (
                    error.problem.reason
                    if isinstance(error, ConvertError)
                    else f"gives odd prompt_logprobs ({error!r})"
                )
        return ""

    with_ids = [answer for answer in answers if answer.token_ids and answer.prompt_token_ids]
    if not with_ids:
        store.note(refusal_name(endpoint.side), "the baseline's server gives no token ids (vLLM's return_token_ids)")
        return
    reasons = [await score(answer) for answer in with_ids[:_TRIED]]
    if not all(reasons):
        reasons += await asyncio.gather(*map(score, with_ids[_TRIED:]))
    failed = [reason for reason in reasons if reason]
    extent = "" if all(reasons) else f"of {len(failed)} of {len(reasons)} answers: "
    store.note(refusal_name(endpoint.side), extent + failed[0] if failed else "")


def losses(answers: Sequence[Answer], noted: Mapping[str, Any]) -> list[TokenLoss]:
    """Compare the log-probabilities that both sides gave, answer by answer."""
    found = []
    for answer in answers:
        rows = [noted.get(note_name(side, answer.prompt)) for side in SIDES]
        if not rows[0] or not rows[1] or len(rows[0]) != len(rows[1]):
            continue
        tokens = list(zip(*rows, strict=True))
        found.append(
            TokenLoss(
                answer.prompt,
                len(tokens),
                math.fsum(before[0] - after[0] for before, after in tokens) / len(tokens),
                math.fsum(kl_bound(before[1], after[1]) for before, after in tokens) / len(tokens),
            )
        )
    return found


def unscored(answers: Sequence[Answer], noted: Mapping[str, Any]) -> int:
    """Return how many answers that have something to score have no divergence."""
    scored = {loss.prompt for loss in losses(answers, noted)}
    return sum(
        bool(answer.token_ids or answer.tokens or answer.shown) for answer in answers if answer.prompt not in scored
    )


def unread(side: str, answers: Sequence[Answer], noted: Mapping[str, Any]) -> bool:
    """Whether a server has answers to score still: some were not scored, and it is not known to score none."""
    names = {note_name(side, answer.prompt) for answer in answers if answer.token_ids and answer.prompt_token_ids}
    some = any(name in noted for name in names) or not noted.get(refusal_name(side))
    return refusal_name(side) not in noted or (some and not names <= noted.keys())


def refusals(noted: Mapping[str, Any]) -> list[str]:
    """Return why divergence was left out, by side."""
    return [f"{side}: {_FAILED}: {noted[refusal_name(side)]}" for side in SIDES if noted.get(refusal_name(side))]


def kl_bound(before: Mapping[str, float], after: Mapping[str, float]) -> float:
    """Return a lower bound of the divergence of two distributions, from log-probabilities of some of their tokens."""
    both = before.keys() & after.keys()
    p = [math.exp(before[token]) for token in both]
    q = [math.exp(after[token]) for token in both]
    rest_p, rest_q = max(0.0, 1 - math.fsum(p)), max(0.0, 1 - math.fsum(q))
    found = math.fsum(math.exp(before[token]) * (before[token] - after[token]) for token in both)
    if rest_p > 0 and rest_q > 0:
        alone = before.keys() - both
        p_alone = min(rest_p, math.fsum(math.exp(before[token]) for token in alone))
        least = math.exp(sorted(after.values())[-TOP]) if len(after) >= TOP else 1.0
        left = rest_q - math.fsum(math.exp(after[token]) for token in after.keys() - both) + _ROUNDING
        # none of them is likelier than the TOP-th of the candidate, nor all together than what its own ones leave
        q_alone = min(p_alone * rest_q / rest_p, len(alone) * least, max(left, _ROUNDING))
        found += _term(p_alone, q_alone) + _term(rest_p - p_alone, rest_q - q_alone)
    return max(0.0, found)


def _term(p: float, q: float) -> float:
    return p * math.log(p / q) if p > 0 and q > 0 else 0.0


def _compact(listed: Sequence[Any], token_ids: Sequence[int]) -> list[tuple[float, dict[str, float]]]:
    """Return for each token its log-probability, and those of the likely ones by id."""
    rows = []
    for entry, token in zip(listed, token_ids, strict=True):
        found = {str(key): float(value["logprob"]) for key, value in entry.items()}
        if not all(map(math.isfinite, found.values())):
            raise ValueError("a log-probability is not finite")
        rows.append((found[str(token)], found))
    return rows
